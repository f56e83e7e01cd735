// Arguments of stage 1 and of the page codec. Every member takes eight bytes, as in the ctypes structs of
// kernels/cpu/quantize.py. Strides are in elements; channels are contiguous. B sequences, H heads, T tokens, D
// channels.
#pragma once

#include <cstdint>

#include "../attention/arguments.h"

namespace turbo {

// Quantizes tokens begin[b] to end[b] (exclusive) of every head; token t is written to row target[b] + t.
struct TokenArgs {
    std::int64_t batch, heads, head_dim, rotate;
    FloatRows x;
    const std::int64_t* begin;   // [B]
    const std::int64_t* end;     // [B]
    const std::int64_t* first;   // [B], position of token 0
    const std::int64_t* target;  // [B], row of token 0
    // bfloat16 [B, H, D] (rotated, if `rotate`) or null, subtracted from the tokens from position `mean_from` on.
    const std::uint16_t* mean;
    std::int64_t mean_from;
    // [B, H], the scale of every row, to whose range values are clamped; null for a scale per row.
    const float* given_scale;
    std::int8_t* codes;  // rows of D
    float* scales;
    std::int64_t batch_rows, head_rows;  // strides of the result between sequences and heads, in rows
    std::int64_t threads;
};

// The mean of rows `begin` to `end` (exclusive) of every head, for smoothing (kv/stage1.py).
struct MeanArgs {
    std::int64_t batch, heads, head_dim, begin, end;
    const std::int64_t* wanted;  // [B], 0 for sequences whose mean stays as it is
    const std::int8_t* codes;
    const float* scales;
    std::int64_t batch_rows, head_rows;
    std::uint16_t* mean;  // bfloat16 [B, H, D]
};

// INT8 tiles [N, H, block, D] of K and [N, H, block, Dv] of V with scales [N, H, block], and N pages. `head_rows`: the
// stride between the tiles of heads, in rows, at least `block`. Encoding permutes the channels of K by `order` [H, D]
// (AttendArgs), after undoing the rotation if `rotated`; decoding returns rows as stored.
struct PageArgs {
    std::int64_t pages, heads, head_dim, value_dim, block, head_rows, page_bytes, search;
    PageSections layout;
    std::uint8_t* bytes;
    std::int8_t* codes[2];
    float* scales[2];
    const std::int32_t* order;  // or null
    std::int64_t rotated;
    std::int64_t threads;
};

// Each kernel processes one part, so that callers can distribute parts over threads. The first one returns whether all
// values it read were finite and at most 1e18 in magnitude.
struct QuantizeKernels {
    bool (*quantize_tokens)(const TokenArgs&, std::int64_t b, std::int64_t h, std::int64_t begin, std::int64_t end);
    void (*first_block_mean)(const MeanArgs&, std::int64_t b, std::int64_t h);
    void (*encode_head)(const PageArgs&, std::int64_t page, std::int64_t head, std::int64_t side);
    void (*decode_head)(const PageArgs&, std::int64_t page, std::int64_t head, std::int64_t side);
};

}  // namespace turbo
