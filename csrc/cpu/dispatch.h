// Selects the kernels for this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace turbo {

// Instruction sets that were compiled and that the processor supports, the best first.
std::vector<std::string> usable_isas();

// The kernels for a name of usable_isas(); throws std::invalid_argument for any other name.
const Kernels& kernels_for(const std::string& isa);

// The kernels of the best instruction set, or of the one that the environment variable TURBOATTENTION_ISA names.
const Kernels& kernels();

}  // namespace turbo
