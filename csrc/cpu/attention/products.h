// The two integer products of R decode rows with a block of INT8 rows (tail_block.h: UnpackedRows).
#pragma once

#include <cstdint>

#include "../vectors.h"
#include "arguments.h"

namespace turbo::TURBO_ISA {

template <int R>
constexpr int kVectors = kSumsPerPass / R;  // of tokens or channels at once

// out[r][t] = sum_c q[r][c] X8[t][c], exact. sums[r] = sum_c q[r][c].
template <int R>
inline void key_products(const std::int8_t* const* q, const std::int32_t* sums, const std::uint8_t* keys, int quads,
                         std::int32_t (*out)[kBlock]) {
    constexpr int N = kVectors<R>;
    for (int t = 0; t < kBlock; t += 16 * N) {
        I acc[R][N];
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) acc[r][n] = i_set(-kOffset * sums[r]);
        const std::uint8_t* line = keys + 4 * t;
        for (int quad = 0; quad < quads; ++quad, line += 4 * kBlock) {
            Prepared k[N];
            for (int n = 0; n < N; ++n) k[n] = prepare(b_load(line + 64 * n));
            for (int r = 0; r < R; ++r) {
                const Bytes word = b_broadcast(q[r] + 4 * quad);
                for (int n = 0; n < N; ++n) acc[r][n] = dot_full(acc[r][n], k[n], word);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) i_store(out[r] + t + 16 * n, acc[r][n]);
    }
}

// acc[r][c] = acc[r][c] * rescale[r] + unit[r] * sum_t p[r][t] X8[t][c] for N vectors of channels.
template <int R, int N>
inline void value_products_at(const std::uint8_t (*p)[kBlock], const std::int32_t* sums, const std::uint8_t* values,
                              int padded_dim, int channel, float* const* out, const float* rescale, const float* unit) {
    I acc[R][N];
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) acc[r][n] = i_set(-kOffset * sums[r]);
    const std::uint8_t* line = values + 4 * channel;
    for (int quad = 0; quad < kBlock / 4; ++quad, line += 4 * padded_dim) {
        Prepared v[N];
        for (int n = 0; n < N; ++n) v[n] = prepare(b_load(line + 64 * n));
        for (int r = 0; r < R; ++r) {
            const Bytes word = b_broadcast(p[r] + 4 * quad);
            for (int n = 0; n < N; ++n) acc[r][n] = dot_full(acc[r][n], v[n], word);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) {
            float* at = out[r] + channel + 16 * n;
            f_store(at, f_fma(f_from_int(acc[r][n]), f_set(unit[r]), f_load(at) * f_set(rescale[r])));
        }
}

template <int R>
inline void value_products(const std::uint8_t (*p)[kBlock], const std::int32_t* sums, const std::uint8_t* values,
                           int padded_dim, float* const* out, const float* rescale, const float* unit) {
    constexpr int N = kVectors<R>;
    int channel = 0;
    for (; channel + 16 * N <= padded_dim; channel += 16 * N)
        value_products_at<R, N>(p, sums, values, padded_dim, channel, out, rescale, unit);
    for (; channel < padded_dim; channel += 16)
        value_products_at<R, 1>(p, sums, values, padded_dim, channel, out, rescale, unit);
}

}  // namespace turbo::TURBO_ISA
