// Sixteen 32-bit lanes in portable C++, for any processor: the specification, which the other headers match bit for
// bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace turbo::TURBO_ISA {

constexpr std::uint8_t kFlip = 0x80;
constexpr int kQueryVectors = 1;
constexpr int kRowsPerPass = 2, kMaxRowsPerPass = 2, kSumsPerPass = 4;
constexpr std::int32_t kOffset = 128;

struct F {
    float v[16];
};
struct I {
    std::int32_t v[16];
};
struct Bytes {
    std::uint8_t v[64];
};
using Prepared = Bytes;

template <class R, class G>
inline R lanes(G&& get) {
    R r;
    for (int i = 0; i < 16; ++i) r.v[i] = get(i);
    return r;
}

inline F f_set(float x) {
    return lanes<F>([&](int) { return x; });
}
inline F f_load(const float* p) {
    F r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline void f_store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline F operator+(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F operator-(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F operator*(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F operator/(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F f_max(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F f_min(F a, F b) {
    return lanes<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F f_fma(F a, F b, F c) {
    return lanes<F>([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
// As in vec_avx512.h, for processors where a fused multiply-add is slower than a division.
inline F f_quotient(F x, F y, F) { return x / y; }
inline F f_divide(F x, F y, F) { return x / y; }
inline F f_add_square(F sum, F x) { return sum + x * x; }
inline F f_abs(F a) {
    return lanes<F>([&](int i) { return std::fabs(a.v[i]); });
}
inline F f_floor(F a) {
    return lanes<F>([&](int i) { return std::floor(a.v[i]); });
}
inline F f_round(F a) {
    return lanes<F>([&](int i) { return std::nearbyint(a.v[i]); });
}
inline F f_from_int(I a) {
    return lanes<F>([&](int i) { return static_cast<float>(a.v[i]); });
}
// Rounds half to even; values beyond int32 become the smallest int32, as on x86.
inline I i_from_float(F a) {
    return lanes<I>([&](int i) {
        const float x = std::nearbyint(a.v[i]);
        return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<std::int32_t>(x) : INT32_MIN;
    });
}
inline F f_from_bits(I a) {
    F r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline F f_keep_ge(F x, F y, F a) {
    return lanes<F>([&](int i) { return x.v[i] >= y.v[i] ? a.v[i] : 0.0f; });
}
inline F f_keep_gt(F x, F y, F a) {
    return lanes<F>([&](int i) { return x.v[i] > y.v[i] ? a.v[i] : 0.0f; });
}
inline bool f_any_lt(F x, F y) {
    bool any = false;
    for (int i = 0; i < 16; ++i) any |= x.v[i] < y.v[i];
    return any;
}
inline F f_fraction(F x) { return x - f_floor(x); }
inline I i_truncate(F x) { return i_from_float(f_floor(x)); }
inline F f_between(I low, I t, I high, F a, F b) {
    return lanes<F>([&](int i) { return low.v[i] <= t.v[i] && t.v[i] < high.v[i] ? a.v[i] : b.v[i]; });
}
inline F f_within(int first, int low, int high, F a, F b) {
    return lanes<F>([&](int i) { return first + i >= low && first + i < high ? a.v[i] : b.v[i]; });
}
inline F f_lookup(const float* table, I index) {
    return lanes<F>([&](int i) { return table[index.v[i] & 15]; });
}

inline I i_set(std::int32_t x) {
    return lanes<I>([&](int) { return x; });
}
inline I i_load(const std::int32_t* p) {
    I r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline void i_store(std::int32_t* p, I a) { std::memcpy(p, a.v, sizeof a.v); }
inline I operator+(I a, I b) {
    return lanes<I>([&](int i) { return a.v[i] + b.v[i]; });
}
inline I operator-(I a, I b) {
    return lanes<I>([&](int i) { return a.v[i] - b.v[i]; });
}
inline I operator|(I a, I b) {
    return lanes<I>([&](int i) { return a.v[i] | b.v[i]; });
}
inline I i_min(I a, I b) {
    return lanes<I>([&](int i) { return std::min(a.v[i], b.v[i]); });
}
inline I i_max(I a, I b) {
    return lanes<I>([&](int i) { return std::max(a.v[i], b.v[i]); });
}
// The lower 32 bits of the products.
inline I operator*(I a, I b) {
    return lanes<I>([&](int i) {
        return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) * static_cast<std::uint32_t>(b.v[i]));
    });
}
// Shifts by 0 to 31 bits that differ by lane: to the left; to the right, with zeros; to the right, with the sign.
inline I i_shl(I a, I by) {
    return lanes<I>([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << by.v[i]); });
}
inline I i_shr(I a, I by) {
    return lanes<I>([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) >> by.v[i]); });
}
inline I i_sar(I a, I by) {
    return lanes<I>([&](int i) { return a.v[i] >> by.v[i]; });
}
template <int N>
inline I i_shr(I a) {
    return i_shr(a, lanes<I>([](int) { return N; }));
}
template <int N>
inline I i_sar(I a) {
    return i_sar(a, lanes<I>([](int) { return N; }));
}
template <int N>
inline I i_shl(I a) {
    return lanes<I>([&](int i) { return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.v[i]) << N); });
}
inline I i_bits(F a) {
    I r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return r;
}
inline I i_from_u8(const std::uint8_t* p) {
    return lanes<I>([&](int i) { return std::int32_t{p[i]}; });
}
inline I i_from_s8(const std::int8_t* p) {
    return lanes<I>([&](int i) { return std::int32_t{p[i]}; });
}
inline void i_store_u8(std::uint8_t* p, I a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(a.v[i]);
}
inline void i_store_s8(std::int8_t* p, I a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}
inline std::int32_t i_sum(I a) {
    std::int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += a.v[i];
    return sum;
}
inline std::int32_t i_reduce_max(I a) {
    std::int32_t largest = a.v[0];
    for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
    return largest;
}
inline float f_reduce_max(F a) { return *std::max_element(a.v, a.v + 16); }
inline I i_fold_halves(I a, I b) {
    return lanes<I>([&](int i) { return i < 8 ? a.v[i] + a.v[i + 8] : b.v[i - 8] + b.v[i]; });
}

inline Bytes b_load(const void* p) {
    Bytes r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline Bytes b_zero() { return {}; }
inline Bytes b_broadcast(const void* p) {
    Bytes r;
    for (int i = 0; i < 16; ++i) std::memcpy(r.v + 4 * i, p, 4);
    return r;
}
inline Bytes b_word_pair(const std::uint8_t* words, int i) {
    Bytes r;
    for (int lane = 0; lane < 16; ++lane) std::memcpy(r.v + 4 * lane, words + 4 * (2 * i + lane / 8), 4);
    return r;
}
template <int N>
inline Bytes b_shr(Bytes a, int mask) {
    for (auto& x : a.v) x = static_cast<std::uint8_t>(x >> N & mask);
    return a;
}
template <int N>
inline Bytes b_shl(Bytes a, int mask) {
    for (auto& x : a.v) x = static_cast<std::uint8_t>(x << N & mask);
    return a;
}
inline Bytes operator|(Bytes a, Bytes b) {
    for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
    return a;
}
template <int N>
inline Bytes b_shr_or(Bytes a, int mask, Bytes b) {
    return b_shr<N>(a, mask) | b;
}
template <int N>
inline Bytes b_shl_or(Bytes a, int mask, Bytes b) {
    return b_shl<N>(a, mask) | b;
}
inline void b_store(void* p, Bytes a) { std::memcpy(p, a.v, sizeof a.v); }

inline I dot_small(I acc, Bytes codes, Bytes q) {
    for (int lane = 0; lane < 16; ++lane)
        for (int i = 4 * lane; i < 4 * lane + 4; ++i) acc.v[lane] += codes.v[i] * static_cast<std::int8_t>(q.v[i]);
    return acc;
}
inline Prepared prepare(Bytes codes) { return codes; }
inline I dot_full(I acc, Prepared codes, Bytes q) { return dot_small(acc, codes, q); }

struct D {
    double v[8];
};
template <class G>
inline D doubles(G&& get) {
    D r;
    for (int i = 0; i < 8; ++i) r.v[i] = get(i);
    return r;
}
inline D d_set(double x) {
    return doubles([&](int) { return x; });
}
inline D d_load(const double* p) {
    return doubles([&](int i) { return p[i]; });
}
inline void d_store(double* p, D a) { std::memcpy(p, a.v, sizeof a.v); }
inline D d_from_floats(const float* p) {
    return doubles([&](int i) { return static_cast<double>(p[i]); });
}
inline void d_store_floats(float* p, D a) {
    for (int i = 0; i < 8; ++i) p[i] = static_cast<float>(a.v[i]);
}
inline D operator+(D a, D b) {
    return doubles([&](int i) { return a.v[i] + b.v[i]; });
}
inline D operator-(D a, D b) {
    return doubles([&](int i) { return a.v[i] - b.v[i]; });
}
inline D operator*(D a, D b) {
    return doubles([&](int i) { return a.v[i] * b.v[i]; });
}
// For exact products, which make it equal to a fused multiply-add.
inline D d_fma(D a, D b, D c) { return a * b + c; }
template <int Distance>
inline D d_butterfly(D a) {
    return doubles([&](int i) { return i & Distance ? a.v[i ^ Distance] - a.v[i] : a.v[i] + a.v[i ^ Distance]; });
}

struct W {
    std::uint16_t v[16];
};
inline int signed_word(std::uint16_t x) { return static_cast<std::int16_t>(x); }
inline W w_set(int x) {
    return lanes<W>([&](int) { return static_cast<std::uint16_t>(x); });
}
inline W w_load(const void* p) {
    W r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline void w_store(void* p, W a) { std::memcpy(p, a.v, sizeof a.v); }
inline W w_pack(const I* x) {
    return lanes<W>([&](int i) { return static_cast<std::uint16_t>(std::clamp(x->v[i], -32768, 32767)); });
}
inline W w_pack_unsigned(const I* x) {
    return lanes<W>([&](int i) { return static_cast<std::uint16_t>(std::clamp(x->v[i], 0, 65535)); });
}
inline void w_unpack(W a, I* x) {
    *x = lanes<I>([&](int i) { return signed_word(a.v[i]); });
}
inline void w_unpack_unsigned(W a, I* x) {
    *x = lanes<I>([&](int i) { return a.v[i]; });
}
inline void w_store_joined(void* p, W low, W high) {
    const I joined =
        lanes<I>([&](int i) { return static_cast<std::int32_t>(low.v[i] | std::uint32_t{high.v[i]} << 16); });
    std::memcpy(p, joined.v, sizeof joined.v);
}
template <class Operation>
inline W words(Operation&& of) {
    return lanes<W>([&](int i) { return static_cast<std::uint16_t>(of(i)); });
}
inline W operator+(W a, W b) {
    return words([&](int i) { return a.v[i] + b.v[i]; });
}
inline W operator-(W a, W b) {
    return words([&](int i) { return a.v[i] - b.v[i]; });
}
inline W operator|(W a, W b) {
    return words([&](int i) { return a.v[i] | b.v[i]; });
}
inline W w_max(W a, W b) {
    return words([&](int i) { return std::max(signed_word(a.v[i]), signed_word(b.v[i])); });
}
inline W w_min_unsigned(W a, W b) {
    return words([&](int i) { return std::min(a.v[i], b.v[i]); });
}
inline W operator*(W a, W b) {
    return words([&](int i) { return std::uint32_t{a.v[i]} * b.v[i]; });
}
inline W w_product_high(W a, W b) {
    return words([&](int i) { return std::uint32_t{a.v[i]} * b.v[i] >> 16; });
}
inline W w_product_rounded(W a, W b) {
    return words([&](int i) { return (signed_word(a.v[i]) * signed_word(b.v[i]) + (1 << 14)) >> 15; });
}
inline W w_shr(W a, W by) {
    return words([&](int i) { return a.v[i] >> std::min<int>(by.v[i], 31); });
}
template <int N>
inline W w_shl(W a) {
    return words([&](int i) { return a.v[i] << N; });
}
template <int N>
inline W w_shr(W a) {
    return words([&](int i) { return a.v[i] >> N; });
}
inline int w_largest(W a) {
    int largest = -32768;
    for (const std::uint16_t x : a.v) largest = std::max(largest, signed_word(x));
    return largest;
}
inline std::int32_t w_sum(W a) {
    std::int32_t sum = 0;
    for (const std::uint16_t x : a.v) sum += signed_word(x);
    return sum;
}
inline W w_between(W low, W t, W high, W a, W b) {
    return words([&](int i) {
        const int at = signed_word(t.v[i]);
        return signed_word(low.v[i]) <= at && at < signed_word(high.v[i]) ? a.v[i] : b.v[i];
    });
}
inline W w_keep_other(W x, W y, W a) {
    return words([&](int i) { return x.v[i] != y.v[i] ? a.v[i] : 0; });
}

// Transposes 16 rows of 16 words; rows begin `in_stride` and `out_stride` bytes after one another.
inline void words_transposed(const std::uint8_t* in, int in_stride, std::uint8_t* out, int out_stride) {
    for (int row = 0; row < 16; ++row)
        for (int word = 0; word < 16; ++word)
            std::memcpy(out + word * out_stride + 4 * row, in + row * in_stride + 4 * word, 4);
}

}  // namespace turbo::TURBO_ISA
