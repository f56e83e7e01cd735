// A decode step in one call: quantizes the new tokens, attends to pages, buffer and new tokens, undoes the rotation,
// and compresses blocks that fill into pages. The caller keeps the argument struct from step to step.
#pragma once

#include "attention/arguments.h"
#include "quantize/interface.h"

namespace turbo {

struct StepArgs {
    AttendArgs attend;  // positions and open rows are set by the step; without queries it only stores
    FloatRows k, v;
    std::int64_t tokens;
    std::int64_t mean_from;      // first position whose key is stored without attend.mean
    const std::int64_t* before;  // [B], tokens before the step
    // The buffer: int8 [B, H, capacity, D] (values: Dv) and bfloat16 [B, H, capacity], row 0 at position start[b].
    std::int8_t* codes[2];
    std::uint16_t* scales[2];
    std::int64_t capacity;
    // [B], the address of the page for the block that a sequence fills, or 0; null if no sequence fills one. The block
    // starts at start[b]; a step fills at most one per sequence. Pages have the layout attend.compressed.
    const std::int64_t* fresh;
    std::int64_t page_bytes, search;
};

// Returns 0, or 1, 2, 3 if q, k, v has values that are not finite; buffer and pages are then unchanged.
int run_step(const StepArgs& args);

}  // namespace turbo
