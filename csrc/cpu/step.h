// A decode step of a cache in one call: quantizes the new tokens, attends to pages, buffer and new tokens, undoes the
// rotation, and compresses blocks that fill into pages. The caller keeps the argument struct from step to step.
#pragma once

#include "attention/arguments.h"
#include "store.h"

namespace turbo {

struct StepArgs {
    AttendArgs attend;  // positions and tail rows are set by the step; without queries it only stores
    StoreArgs store;    // with tail.start; fresh_blocks is 1, since a step fills at most one block per sequence
    // The buffer: int8 [B, H, capacity, D] (values: Dv) and scales [B, H, capacity], bfloat16 or, with universal ones,
    // float32; row 0 at position start[b]; rows past a sequence's length are zero. Where a block fills, the rows behind
    // it move to the front.
    std::int8_t* codes[2];
    void* scales[2];
    std::int64_t capacity;
};

// Where a value is unfit, buffer and pages are as they were.
Unfit run_step(const StepArgs& step);

}  // namespace turbo
