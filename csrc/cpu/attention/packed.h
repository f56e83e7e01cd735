// The two integer products of decode over a page in packed form: no INT8 values are written to memory.
//
// K: with byte lookups (TURBO_TABLES), codes become INT8 in registers. Without,
// q . (code step + zero) = (q step) . code + q . zero; q step has up to 16 bits, is split into 128 high + low, both
// int8, and takes two dot products over the same unpacked codes.
// V: sum_t p (code step + zero) = step sum_t p code + zero sum_t p.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../memory.h"
#include "../vectors.h"
#include "page.h"

namespace turbo::TURBO_ISA {

// The number of octets of K that have Wide bits; the others have Narrow bits.
template <int Wide, int Narrow>
inline int wide_octets(int head_dim) {
    return Wide == Narrow ? head_dim / 8 : head_dim / 16;
}

#ifdef TURBO_TABLES

// The lookup table for the keys of four channels: values by code (at 5 bits by its lower four bits), and what the
// highest bit adds (at 5 bits and at 1).
struct KeyTable {
    Bytes values, top;
};

template <int Bits>
inline KeyTable key_table(const std::int8_t* step, const std::int8_t* zero) {
    const Bytes top = b_shl<Bits - 1>(b_broadcast(step), 256 - (1 << (Bits - 1)));
    return {Bits == 1 ? b_offset(b_broadcast(zero)) : b_code_table(step, zero), top};
}

// X8 + 128 of vector `i` of an octet (page.h, `unpack`). A plane of one bit takes as many bytes as a vector, with a bit
// for every vector, which serves as a mask: a masked addition is the fastest.
template <int Bits>
TURBO_ALWAYS_INLINE Bytes table_keys(const KeyTable& table, const std::uint8_t* octet, int i) {
    constexpr int kIndexed = Bits == 5 ? 4 : Bits;
    Bytes keys = table.values;
    if constexpr (Bits > 1) keys = b_from_table(keys, unpack<kIndexed>(octet, i, b_table_channels()));
    if constexpr (Bits == 5 || Bits == 1) keys = b_add_where(keys, b_load(octet + 64 * (Bits - 1)), i, table.top);
    return keys;
}

// acc[r][n] += the products of q[r] with vector `from + n` of the keys of octets `first` to `last`, whose codes are at
// `octet`.
template <int Bits, int R, int N>
TURBO_ALWAYS_INLINE void add_octets(I (&acc)[R][N], const std::int8_t* const* q, const PageHead& source, int from,
                                    const std::uint8_t* octet, int first, int last) {
    for (int o = first; o < last; ++o, octet += octet_bytes(Bits)) {
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; ++quad) {
            const int channel = 8 * o + 4 * quad;
            const KeyTable table = key_table<Bits>(source.steps(0) + channel, source.zeros(0) + channel);
            Bytes key[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) key[n] = table_keys<Bits>(table, octet, 4 * quad + from + n);
            for (int r = 0; r < R; ++r) {
                const Bytes word = b_broadcast(q[r] + channel);
                for (int n = 0; n < N; ++n) acc[r][n] = dot_full(acc[r][n], key[n], word);
            }
        }
    }
}

// out[r][t] = sum_c q[r][c] (code[t][c] step[c] + zero[c]), exact. sums[r] = sum_c q[r][c].
template <int Wide, int Narrow, int R>
inline void packed_key_products(const std::int8_t* const* q, const std::int32_t* sums, const PageHead& source,
                                int head_dim, std::int32_t (*out)[kBlock]) {
    constexpr int N = kSumsPerPass / R;
    const std::uint8_t* codes = source.codes(0);
    const int wide = wide_octets<Wide, Narrow>(head_dim);
#pragma GCC unroll 4
    for (int from = 0; from < 4; from += N) {
        I acc[R][N];
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) acc[r][n] = i_set(-128 * sums[r]);
        add_octets<Wide>(acc, q, source, from, codes, 0, wide);
        if constexpr (Wide != Narrow)
            add_octets<Narrow>(acc, q, source, from, codes + wide * octet_bytes(Wide), wide, head_dim / 8);
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) i_store(out[r] + 16 * (from + n), acc[r][n]);
    }
}

#else

template <int R>
struct ScaledQueries {
    alignas(64) std::int8_t low[R][kMaxHeadDim];
    alignas(64) std::int8_t high[R][kMaxHeadDim];
    std::int32_t offset[R];  // q . zero
};

template <int R>
inline void scale_queries(ScaledQueries<R>& out, const std::int8_t* const* q, const PageHead& source, int head_dim) {
    const std::int8_t* step = source.steps(0);
    const std::int8_t* zero = source.zeros(0);
    for (int r = 0; r < R; ++r) {
        const std::int8_t* row = q[r];
        std::int32_t sum = 0;
        for (int c = 0; c < head_dim; ++c) {
            // |q step| <= 119 * 127 = 15,113: high within +-118, low within -64 .. 63.
            const std::int16_t product = static_cast<std::int16_t>(row[c] * step[c]);
            const std::int16_t high = static_cast<std::int16_t>((product + 64) >> 7);
            out.high[r][c] = static_cast<std::int8_t>(high);
            out.low[r][c] = static_cast<std::int8_t>(product - high * 128);
            sum += row[c] * zero[c];
        }
        out.offset[r] = sum;
    }
}

// acc[r] += the products of q[r] step with vector `n` of the codes of octets `first` to `last`, which begin at `octet`.
template <int Bits, int R>
TURBO_ALWAYS_INLINE void add_octets(I (&acc)[R], const ScaledQueries<R>& q, int n, const std::uint8_t* octet, int first,
                                    int last) {
    // A lane of 16 bits accumulates two products of a quad, of a code and at most 118.
    constexpr int kOctetsPerRun = kPartialLimit / (2 * 2 * 118 * ((1 << Bits) - 1));
    while (first < last) {
        const int end = std::min(last - first, kOctetsPerRun) + first;
        Partial low[R], high[R];
        for (int r = 0; r < R; ++r) low[r] = high[r] = partial_zero();
        for (; first < end; ++first, octet += octet_bytes(Bits)) {
#pragma GCC unroll 2
            for (int quad = 0; quad < 2; ++quad) {
                const Bytes code = unpack<Bits>(octet, 4 * quad + n);
                for (int r = 0; r < R; ++r) {
                    low[r] = dot_partial(low[r], code, b_broadcast(q.low[r] + 8 * first + 4 * quad));
                    high[r] = dot_partial(high[r], code, b_broadcast(q.high[r] + 8 * first + 4 * quad));
                }
            }
        }
        for (int r = 0; r < R; ++r) acc[r] = add_partial<7>(add_partial<0>(acc[r], low[r]), high[r]);
    }
}

// out[r][t] = sum_c q[r][c] (code[t][c] step[c] + zero[c]), exact.
template <int Wide, int Narrow, int R>
inline void packed_key_products(const std::int8_t* const* q, const std::int32_t*, const PageHead& source, int head_dim,
                                std::int32_t (*out)[kBlock]) {
    ScaledQueries<R> scaled;
    scale_queries<R>(scaled, q, source, head_dim);
    const std::uint8_t* codes = source.codes(0);
    const int wide = wide_octets<Wide, Narrow>(head_dim);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
        I acc[R];
        for (int r = 0; r < R; ++r) acc[r] = i_set(scaled.offset[r]);
        add_octets<Wide>(acc, scaled, n, codes, 0, wide);
        if constexpr (Wide != Narrow)
            add_octets<Narrow>(acc, scaled, n, codes + wide * octet_bytes(Wide), wide, head_dim / 8);
        for (int r = 0; r < R; ++r) i_store(out[r] + 16 * n, acc[r]);
    }
}

#endif

// acc[r][c] = acc[r][c] * rescale[r] + unit[r] * sum_t p[r][t] X8[t][c], from codes. The integers stay below 2^24, so
// that float32 is exact.
template <int Bits, int R>
inline void packed_value_products(const std::uint8_t (*p)[kBlock], const std::int32_t* sums, const PageHead& source,
                                  int head_dim, float* const* out, const float* rescale, const float* unit) {
    alignas(64) std::uint8_t words[R][8][64];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < 8; ++i) b_store(words[r][i], b_word_pair(p[r], i));
    alignas(64) static const std::int8_t kOnes[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const int octets = head_dim / 8;
    for (int o = 0; o < octets; o += 2) {
        I acc[R][2];
        // With an odd number of octets the last one is read twice; the copy lands in padding.
        for (int half = 0; half < 2; ++half) {
            const std::uint8_t* octet = source.codes(1) + std::min(o + half, octets - 1) * octet_bytes(Bits);
            for (int r = 0; r < R; ++r) acc[r][half] = i_set(0);
            if constexpr (Bits == 8) {
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    const Prepared ready = prepare(unpack<Bits>(octet, i));
                    for (int r = 0; r < R; ++r) acc[r][half] = dot_full(acc[r][half], ready, b_load(words[r][i]));
                }
            } else {
                // A lane of 16 bits accumulates two products per vector, of a code and a weight of at most 127.
                static_assert(8 * 2 * 127 * ((1 << Bits) - 1) <= kPartialLimit);
                Partial sum[R];
                for (int r = 0; r < R; ++r) sum[r] = partial_zero();
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    const Bytes code = unpack<Bits>(octet, i);
                    for (int r = 0; r < R; ++r) sum[r] = dot_partial(sum[r], code, b_load(words[r][i]));
                }
                for (int r = 0; r < R; ++r) acc[r][half] = add_partial<0>(acc[r][half], sum[r]);
            }
        }
        alignas(64) std::int8_t edge[2][16] = {};
        const std::int8_t* step = kOnes;
        const std::int8_t* zero = edge[1];
        if constexpr (Bits < 8) {
            step = source.steps(1) + 8 * o, zero = source.zeros(1) + 8 * o;
            if (o + 1 == octets) {
                std::memcpy(edge[0], step, 8);
                std::memcpy(edge[1], zero, 8);
                step = edge[0], zero = edge[1];
            }
        }
        const F steps = f_from_int(i_from_s8(step)), zeros = f_from_int(i_from_s8(zero));
        for (int r = 0; r < R; ++r) {
            const F sum = f_set(static_cast<float>(sums[r]));
            const F offset = Bits == 8 ? f_set(static_cast<float>(-kOffset * sums[r])) : zeros * sum;
            const F exact = f_fma(f_from_int(i_fold_halves(acc[r][0], acc[r][1])), steps, offset);
            float* at = out[r] + 8 * o;
            f_store(at, f_fma(exact, f_set(unit[r]), f_load(at) * f_set(rescale[r])));
        }
    }
}

}  // namespace turbo::TURBO_ISA
