// Which kernels this processor runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace turbo {

// Instruction sets that were compiled and that the processor has, the best first.
std::vector<std::string> usable_isas();

// The kernels for a name of usable_isas(); throws std::invalid_argument for another.
const Kernels& kernels_for(const std::string& isa);

// The best ones, or those that the environment variable TURBOATTENTION_ISA names.
const Kernels& kernels();

}  // namespace turbo
