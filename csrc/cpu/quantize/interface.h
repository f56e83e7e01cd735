// What stage 1, the rotation and the page codec are given: plain pointers and sizes. Every member is
// eight bytes, as Python packs them (kernels/cpu/quantize.py). Strides count elements, channels are
// contiguous. B sequences, H heads, T tokens, D channels.
#pragma once

#include <cstdint>

#include "../attention/arguments.h"

namespace turbo {

// Tokens begin[b] .. end[b] of every head, to INT8 with a scale each, at row target[b] + t of the result.
struct TokenArgs {
    std::int64_t batch, heads, head_dim, rotate;
    const std::int32_t* order;  // [H, D], the channel that each place takes, or null
    FloatRows x;
    const std::int64_t* begin;   // [B]
    const std::int64_t* end;     // [B]
    const std::int64_t* first;   // [B], position of token 0
    const std::int64_t* target;  // [B], row of token 0
    const float* mean;           // [B, H, D] (in that order) or null, subtracted from `mean_from` on
    std::int64_t mean_from;
    std::int8_t* codes;  // rows of D
    float* scales;
    std::int64_t batch_rows, head_rows;  // rows of the result from one sequence, one head, to the next
    std::int64_t threads;
};

// Query rows [B, H G, Lq], to INT8 [B, H, G, Lq, D] with their units; rows from valid[b] on are zero.
struct QueryArgs {
    std::int64_t batch, heads, group, rows, head_dim, rotate;
    const std::int32_t* order;  // as for tokens
    FloatRows x;
    const std::int64_t* valid;  // [B]
    const float* mean;          // [B, H, D] or null
    double scale;               // of the logits
    std::int8_t* codes;
    float* units;
    float* mean_logits;  // null without a mean
    std::int64_t threads;
};

// float32 [B, H, T, D], contiguous, to rows of any kind; rotated back if `rotate`.
struct RestoreArgs {
    std::int64_t batch, heads, rows, head_dim, rotate;
    const float* x;
    FloatRows out;
    std::int64_t threads;
};

// The mean of rows `begin` to `end` (exclusive) of every head: what it means is in kv/staging.py.
struct MeanArgs {
    std::int64_t batch, heads, head_dim, begin, end;
    const std::int64_t* wanted;  // [B], zero for sequences whose mean stays as it is
    const std::int8_t* codes;
    const float* scales;
    std::int64_t batch_rows, head_rows;
    float* mean;  // [B, H, D]
};

// INT8 tiles [N, H, B, D] with scales [N, H, B] (K, then V), and N pages. `head_rows`: rows from one
// head's tile to the next, at least B.
struct PageArgs {
    std::int64_t pages, heads, head_dim, block, head_rows, page_bytes, search;
    PagePlan plan;
    std::uint8_t* bytes;
    std::int8_t* codes[2];
    float* scales[2];
    std::int64_t threads;
};

// Each works on one part, so that the callers may share the parts among threads. The first two tell
// whether every value they read was finite and at most 1e18 in magnitude.
struct QuantizeKernels {
    bool (*quantize_tokens)(const TokenArgs&, std::int64_t b, std::int64_t h, std::int64_t begin, std::int64_t end);
    bool (*quantize_queries)(const QueryArgs&, std::int64_t b, std::int64_t query_head, std::int64_t begin,
                             std::int64_t end);
    void (*restore_rows)(const RestoreArgs&, std::int64_t b, std::int64_t h, std::int64_t begin, std::int64_t end);
    void (*first_block_mean)(const MeanArgs&, std::int64_t b, std::int64_t h);
    void (*encode_head)(const PageArgs&, std::int64_t page, std::int64_t head, std::int64_t side);
    void (*decode_head)(const PageArgs&, std::int64_t page, std::int64_t head, std::int64_t side);
};

}  // namespace turbo
