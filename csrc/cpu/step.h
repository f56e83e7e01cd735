// A decode step in one call: new tokens quantized, attention over pages, buffer and them, the result
// rotated back, blocks that fill compressed into their pages. Everything it needs stands in one struct,
// which the caller keeps from step to step.
#pragma once

#include "attention/arguments.h"
#include "quantize/interface.h"

namespace turbo {

struct StepArgs {
    AttendArgs attend;  // without positions and open rows, which the step makes itself; no queries: it only stores
    FloatRows k, v;
    std::int64_t tokens;
    std::int64_t mean_from;      // position from which on keys lose attend.mean
    const std::int64_t* before;  // [B], tokens before the step
    // The buffer: int8 [B, H, capacity, D] and bfloat16 [B, H, capacity], row 0 at position start[b].
    std::int8_t* codes[2];
    std::uint16_t* scales[2];
    std::int64_t capacity;
    // [B], the address of the page that takes a sequence's block, 0 where none fills; null if none does
    // anywhere. A block that fills starts at start[b], and no second one does in the same step. Its page
    // is laid out as attend.compressed says.
    const std::int64_t* fresh;
    std::int64_t page_bytes, search;
};

// 0, or 1, 2, 3 where q, k, v hold what is not finite: the buffer is then as it was, and no page is read.
int run_step(const StepArgs& args);

}  // namespace turbo
