// Storing the new tokens of a step: as INT8 rows, then the blocks that they fill as pages. A cache attends in between
// (step.h), a server after both.
#pragma once

#include "attention/arguments.h"
#include "kernels.h"

namespace turbo {

// B sequences have `tokens` new tokens each, after before[b] stored ones.
struct StoreArgs {
    std::int64_t batch, heads, head_dim, value_dim, tokens, rotate;
    FloatRows k, v;
    const std::uint16_t* mean;  // bfloat16 [B, H, D] or null, subtracted from keys
    std::int64_t mean_from;     // the first position whose key is stored without the mean
    // float32 [B, H] of K and of V: the scale of every new row, as in the paper; or null: one for each row.
    const float* universal[2];
    const std::int64_t* before;
    Int8Rows tail;  // has room for the new tokens
    // Addresses [B, fresh_blocks] of the pages for the blocks from position tail.start[b] on that the step fills, 0
    // behind the last; null if it fills none. Pages have this `layout`, and the channels of K in `order`
    // (AttendArgs).
    const std::uint64_t* fresh;
    std::int64_t fresh_blocks, page_bytes, search;
    PageSections layout;
    const std::int32_t* order;
    std::int64_t threads;
};

// What a step returns: all values were finite and at most 1e18 in magnitude, or where one was not.
enum Unfit : int { kFine = 0, kUnfitQuery = 1, kUnfitKey = 2, kUnfitValue = 3 };

// Quantizes k and v into their rows, which are not valid where one is unfit.
Unfit quantize_new(const Kernels& kernels, const StoreArgs& s);

// Compresses the blocks that are full into the pages `fresh`.
void fill_pages(const Kernels& kernels, const StoreArgs& s);

// Both; without a page written where a key or value is unfit.
Unfit store(const StoreArgs& s);

}  // namespace turbo
