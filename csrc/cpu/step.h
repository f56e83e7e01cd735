// New tokens of a cache, of a decode step or a prompt, in one call: quantizes them, attends to pages, buffer and new
// tokens, undoes the rotation, and compresses the blocks that fill into pages. The caller may keep the argument struct
// from step to step.
#pragma once

#include "attention/arguments.h"
#include "store.h"

namespace turbo {

struct StepArgs {
    AttendArgs attend;  // the step sets positions and tail rows; without queries it only stores
    StoreArgs store;    // with tail.start
    // The buffer: int8 [B, H, capacity, D] (Dv for values) and scales [B, H, capacity], bfloat16, or float32 with
    // universal scales. Row 0 holds position tail.start[b]; rows beyond a sequence's length are zero. When
    // blocks fill, the rows after them move to the front.
    std::int8_t* codes[2];
    void* scales[2];
    std::int64_t capacity;
};

// On a non-finite value, buffer and pages are left unchanged.
NonFinite run_step(const StepArgs& step);

}  // namespace turbo
