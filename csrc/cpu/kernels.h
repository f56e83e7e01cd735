// The kernels of one instruction set, as a table. Each kernels_<isa>.cpp compiles the same headers
// with other compiler flags and vector types.
#pragma once

#include "attention/arguments.h"
#include "quantize/interface.h"
#include "threads.h"

namespace turbo {

struct Kernels : QuantizeKernels {
    const char* isa;
    void (*attend)(const AttendArgs&);
    std::int64_t (*peak_round)(std::int64_t rounds);
};

}  // namespace turbo
