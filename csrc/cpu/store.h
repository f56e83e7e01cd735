// Stores the new tokens of a step over paged memory in open blocks, and compresses the blocks they fill into pages.
// This precedes attention of all sequences.
#pragma once

#include "quantize/interface.h"

namespace turbo {

// B sequences have `tokens` new tokens each, after before[b] stored ones. Open blocks are int8 rows of D with a float32
// scale per row; those of sequence b start at row open_rows[b], with `head_rows` rows per head. With a ring (a multiple
// of 64), position p is row p % ring; without, row p - start, where start is before[b] rounded down to a multiple
// of 64.
struct StoreArgs {
    std::int64_t batch, heads, head_dim, tokens, rotate;
    FloatRows k, v;     // with starts
    const float* mean;  // [H, D] or null, subtracted from every key
    const std::int64_t* before;
    std::int8_t* codes[2];
    float* scales[2];
    const std::int64_t* open_rows;
    std::int64_t head_rows, ring;
    // Page addresses [B, page_stride]; pages have the layout `plan`.
    const std::uint64_t* pages;
    std::int64_t page_stride, page_bytes, search;
    PagePlan plan;
    std::int64_t threads;
};

// Returns 0, or 1, 2 if k, v has values that are not finite. Then no page is written, and open rows from position
// before[b] on are invalid.
int store(const StoreArgs& args);

}  // namespace turbo
