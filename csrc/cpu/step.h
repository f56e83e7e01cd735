// A decode step in one call: new tokens into the INT8 buffer, attention over pages and buffer, the
// result rotated back. For a step that fills no block; everything it needs stands in one struct,
// which the caller keeps from step to step.
#pragma once

#include "attention/arguments.h"
#include "quantize/interface.h"

namespace turbo {

struct StepArgs {
    AttendArgs attend;  // without positions and open rows, which the step makes itself
    FloatRows k, v;
    std::int64_t tokens;
    std::int64_t mean_from;      // position from which on keys lose attend.mean
    const std::int64_t* before;  // [B], tokens before the step
    // The buffer: int8 [B, H, capacity, D] and bfloat16 [B, H, capacity], row 0 at position start[b].
    std::int8_t* codes[2];
    std::uint16_t* scales[2];
    std::int64_t capacity;
};

// 0, or 1, 2, 3 where q, k, v hold what is not finite: the buffer is then as it was.
int run_step(const StepArgs& args);

}  // namespace turbo
