// Stage 1 of rows: rotate, smooth, quantize (flashq/symmetric.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "../isa.h"
#include "../vectors.h"
#include "convert.h"
#include "interface.h"
#include "rotate.h"

namespace turbo::TURBO_ISA {

constexpr float kCodeMax = 119.0f;
constexpr float kLargest = 1e18f;  // the largest magnitude accepted (validation.py)
constexpr float kSmallestScale = 0x1p-100f;

// The bits of the largest magnitude. As integers they compare like the magnitudes, with infinity and NaN largest.
inline std::uint32_t max_magnitude_bits(const float* x, int count) {
    I lanes = i_set(0);
    const int whole = count / 16 * 16;
    for (int c = 0; c < whole; c += 16) lanes = i_max(lanes, i_bits(f_abs(f_load(x + c))));
    auto largest = static_cast<std::uint32_t>(i_reduce_max(lanes));
    for (int c = whole; c < count; ++c) {
        const std::uint32_t magnitude = bits_of(x[c]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

inline float safe_scale(float scale) {
    if (scale == 0.0f) return 1.0f;
    return scale < kSmallestScale ? kSmallestScale : scale;
}

// Rounded up to 4 mantissa bits.
inline float up_to_grid(float scale) {
    constexpr std::uint32_t kStep = 1u << 19;
    return float_of((bits_of(scale) + (kStep - 1)) & ~(kStep - 1));
}

// Permutes channels: channel order[c] moves to index c.
inline void reorder_row(float* x, int head_dim, const std::int32_t* order) {
    float old[kMaxHeadDim];
    std::memcpy(old, x, sizeof(float) * head_dim);
    for (int c = 0; c < head_dim; ++c) x[c] = old[order[c]];
}

// round_half_even(x / scale); `sink` receives the codes, sixteen channels at a time. The lowest bits of the sum with
// 1.5 * 2^23 are the rounded integer.
template <class Sink>
TURBO_ALWAYS_INLINE void quantize_row(const float* x, int count, float scale, std::int8_t* codes, const Sink& sink) {
    const F divisor = f_set(scale), inverse = f_set(1.0f / scale), round = f_set(12582912.0f);
    const auto code_of = [&](const float* at) {
        return i_bits(f_divide(f_load(at), divisor, inverse) + round) - i_bits(round);
    };
    const int whole = count / 16 * 16;
    for (int c = 0; c < whole; c += 16) {
        const I code = code_of(x + c);
        i_store_s8(codes + c, code);
        sink(code);
    }
    if (whole == count) return;
    float last[16] = {};
    std::memcpy(last, x + whole, 8 * sizeof(float));
    std::int8_t bytes[16];
    const I code = code_of(last);
    i_store_s8(bytes, code);
    std::memcpy(codes + whole, bytes, 8);
    sink(code);
}

inline void quantize_row(const float* x, int count, float scale, std::int8_t* codes) {
    quantize_row(x, count, scale, codes, [](I) {});
}

// Quantizes a row with its own scale, rounded up to the grid; returns the scale.
inline float quantize_token(const float* x, int count, std::int8_t* codes) {
    const float scale = safe_scale(up_to_grid(float_of(max_magnitude_bits(x, count)) / kCodeMax));
    quantize_row(x, count, scale, codes);
    return scale;
}

// Quantizes a row with a given scale; values beyond its range are clamped.
inline void quantize_clamped(float* x, int count, float scale, std::int8_t* codes) {
    const float limit = kCodeMax * scale;
    for (int c = 0; c < count; ++c) x[c] = x[c] > limit ? limit : x[c] < -limit ? -limit : x[c];
    quantize_row(x, count, scale, codes);
}

// Converts INT8 keys to the form of compressed pages (kv/channel_order.py): undoes the rotation if `rotated`, permutes
// the channels and quantizes again.
inline void ordered_rows(const std::int8_t* rows, const float* scales, int tokens, int head_dim,
                         const std::int32_t* order, bool rotated, std::int8_t* codes, float* new_scales) {
    static const Signs signs;
    float x[kMaxHeadDim];
    for (int t = 0; t < tokens; ++t, rows += head_dim, codes += head_dim) {
        new_scales[t] = scales[t];
        if (!rotated) {
            for (int c = 0; c < head_dim; ++c) codes[c] = rows[order[c]];
            continue;
        }
        for (int c = 0; c < head_dim; ++c) x[c] = rows[c] * scales[t];
        unrotate_row(x, head_dim, signs);
        reorder_row(x, head_dim, order);
        new_scales[t] = quantize_token(x, head_dim, codes);
    }
}

inline bool quantize_tokens(const TokenArgs& a, std::int64_t b, std::int64_t h, std::int64_t begin, std::int64_t end) {
    static const Signs signs;
    const int head_dim = static_cast<int>(a.head_dim);
    const std::uint16_t* mean = a.mean ? a.mean + (b * a.heads + h) * head_dim : nullptr;
    const float* given = a.given_scale ? a.given_scale + b * a.heads + h : nullptr;
    const std::int64_t first_row = b * a.batch_rows + h * a.head_rows + a.target[b];
    float x[kMaxHeadDim];
    bool finite = true;
    for (std::int64_t t = begin; t < end; ++t) {
        load_row(a.x, row_offset(a.x, b, h, t), head_dim, x);
        finite &= max_magnitude_bits(x, head_dim) <= bits_of(kLargest);
        if (a.rotate) rotate_row(x, head_dim, signs);
        if (mean && a.first[b] + t >= a.mean_from) {
            for (int c = 0; c < head_dim; ++c) x[c] -= float_from_bfloat(mean[c]);
        }
        std::int8_t* codes = a.codes + (first_row + t) * head_dim;
        if (given) quantize_clamped(x, head_dim, *given, codes);
        a.scales[first_row + t] = given ? *given : quantize_token(x, head_dim, codes);
    }
    return finite;
}

// Dot product in double, in which products of floats are exact: sixteen partial sums, added in a fixed order.
inline double dot_row(const float* x, const float* y, int count) {
    D sum = d_set(0.0), other = d_set(0.0);
    int c = 0;
    for (; c + 16 <= count; c += 16) {
        sum = d_fma(d_from_floats(x + c), d_from_floats(y + c), sum);
        other = d_fma(d_from_floats(x + c + 8), d_from_floats(y + c + 8), other);
    }
    if (c < count) sum = d_fma(d_from_floats(x + c), d_from_floats(y + c), sum);
    double sums[8];
    d_store(sums, sum + other);
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// Products of codes and scales with 4 mantissa bits sum exactly in double, in any order.
inline void first_block_mean(const MeanArgs& a, std::int64_t b, std::int64_t h) {
    if (!a.wanted[b]) return;
    const int head_dim = static_cast<int>(a.head_dim);
    double sums[kMaxHeadDim] = {};
    for (std::int64_t t = a.begin; t < a.end; ++t) {
        const std::int64_t row = b * a.batch_rows + h * a.head_rows + t;
        const double scale = a.scales[row];
        const std::int8_t* codes = a.codes + row * head_dim;
        for (int c = 0; c < head_dim; ++c) sums[c] += codes[c] * scale;
    }
    std::uint16_t* mean = a.mean + (b * a.heads + h) * head_dim;
    const double count = static_cast<double>(a.end - a.begin);
    for (int c = 0; c < head_dim; ++c) mean[c] = bfloat_from_float(static_cast<float>(sums[c] / count));
}

}  // namespace turbo::TURBO_ISA
