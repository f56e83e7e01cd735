// New tokens into open blocks, and the blocks they fill into pages: what a step of many sequences over paged
// memory stores before any of them attends.
#pragma once

#include "quantize/interface.h"

namespace turbo {

// B sequences take `tokens` tokens each, behind before[b] stored ones. Open blocks are int8 rows of D and one float32
// scale a row: those of sequence b begin at row open_rows[b], `head_rows` for each head. With a ring, a multiple of 64,
// position p is row p % ring of them; without, row p - start, where start is the last multiple of 64 up to before[b].
struct StoreArgs {
    std::int64_t batch, heads, head_dim, tokens, rotate;
    FloatRows k, v;     // with starts
    const float* mean;  // [H, D] or null, off every key
    const std::int64_t* before;
    std::int8_t* codes[2];
    float* scales[2];
    const std::int64_t* open_rows;
    std::int64_t head_rows, ring;
    // Page addresses [B, page_stride], laid out as `plan` says.
    const std::uint64_t* pages;
    std::int64_t page_stride, page_bytes, search;
    PagePlan plan;
    std::int64_t threads;
};

// 0, or 1, 2 where k, v hold what is not finite: no page is written then, and open rows from before[b] on are not
// valid.
int store(const StoreArgs& args);

}  // namespace turbo
