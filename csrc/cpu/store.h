// Stores the new tokens of a step as INT8 rows, then compresses the blocks that they fill into pages. A cache attends
// between the two (step.h), a server afterwards.
#pragma once

#include "attention/arguments.h"
#include "kernels.h"

namespace turbo {

// Each of B sequences has `tokens` new tokens, after before[b] stored ones.
struct StoreArgs {
    std::int64_t batch, heads, head_dim, value_dim, tokens, rotate;
    FloatRows k, v;
    const std::uint16_t* mean;  // bfloat16 [B, H, D] or null, subtracted from keys
    std::int64_t mean_from;     // the first position from whose key the mean is subtracted
    // float32 [B, H] for K and for V, the scale of every new row, as in the paper; null for a scale per row.
    const float* universal[2];
    const std::int64_t* before;
    Int8Rows tail;  // has room for the new tokens
    // Page addresses [B, fresh_blocks] for the blocks that the step fills, from the block at position tail.start[b] on,
    // 0 after a sequence's last, and for blocks that no later query sees; null if no block fills. Pages have this
    // `layout`, and K's channels in `order` (AttendArgs); those of the first `sink_blocks` blocks of a sequence have
    // the layout `sinks`.
    const std::uint64_t* fresh;
    std::int64_t fresh_blocks, page_bytes, search;
    PageSections layout;
    std::int64_t sink_blocks, sink_bytes;
    PageSections sinks;
    const std::int32_t* order;
    std::int64_t threads;
};

// Which input of a step has a value that is not finite, or above 1e18 in magnitude.
enum NonFinite : int { kAllFinite = 0, kNonFiniteQuery = 1, kNonFiniteKey = 2, kNonFiniteValue = 3 };

// Quantizes k and v into tail rows, which are not valid if a value is non-finite.
NonFinite quantize_new(const Kernels& kernels, const StoreArgs& s);

// Compresses the blocks that are full into the pages `fresh`.
void fill_pages(const Kernels& kernels, const StoreArgs& s);

// Both; writes no page if a key or value is non-finite.
NonFinite store(const StoreArgs& s);

}  // namespace turbo
