// Sixteen 32-bit lanes on AVX-512 VNNI. The same names exist in vec_avx2.h and vec_serial.h, with bit-equal results:
// floats are never contracted, and sums over lanes follow one fixed tree.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa.h"

namespace turbo::TURBO_ISA {

#ifdef TURBO_AMX
constexpr std::uint8_t kFlip = 0;  // tiles multiply signed bytes
#else
constexpr std::uint8_t kFlip = 0x80;  // the first factor is unsigned: X8 + 128
#endif
constexpr int kQueryVectors = 2;  // of sixteen queries each, processed at once
// Decode rows that share an unpacked vector of codes, the maximum if there are more; and sums held in registers.
constexpr int kRowsPerPass = 4, kMaxRowsPerPass = 8, kSumsPerPass = 16;
constexpr std::int32_t kOffset = 128;  // dot_full multiplies codes as they are stored: X8 + 128

struct F {
    __m512 v;
};
struct I {
    __m512i v;
};
struct Bytes {
    __m512i v;
};
using Prepared = Bytes;

inline F f_set(float x) { return {_mm512_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F f_max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F f_min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F f_fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F f_residual(F x, F y, F guess) { return {_mm512_fnmadd_ps(guess.v, y.v, x.v)}; }  // x - y guess
// x / y of small integers, given 1 / y: a guess, corrected by its residual. It rounds to the same integer as the
// quotient, because halves, the only ties, come out exactly.
inline F f_quotient(F x, F y, F inverse) {
    const F guess = x * inverse;
    return f_fma(f_residual(x, y, guess), inverse, guess);
}
// x / y rounded as by a division, given 1 / y rounded likewise (Markstein): a guess within two units in the last place,
// corrected twice. Neither the quotient nor the residual of a guess may overflow; if they underflow, this and the
// division are both close to zero.
inline F f_divide(F x, F y, F inverse) {
    const F guess = f_quotient(x, y, inverse);
    return f_fma(f_residual(x, y, guess), inverse, guess);
}
// sum + x^2, rounded once or twice: for sums that are exact.
inline F f_add_square(F sum, F x) { return f_fma(x, x, sum); }
inline F f_abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F f_floor(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline F f_round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F f_from_int(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I i_from_float(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // rounds half to even
inline F f_from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
// a where x >= y, else 0.
inline F f_keep_ge(F x, F y, F a) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GE_OQ), a.v)}; }
// a where x > y, else 0.
inline F f_keep_gt(F x, F y, F a) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_GT_OQ), a.v)}; }
inline bool f_any_lt(F x, F y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ) != 0; }
// x - floor(x) and floor(x), x >= 0.
inline F f_fraction(F x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline I i_truncate(F x) { return {_mm512_cvttps_epi32(x.v)}; }
// a where low <= t < high, else b.
inline F f_between(I low, I t, I high, F a, F b) {
    const __mmask16 in = _mm512_cmple_epi32_mask(low.v, t.v) & _mm512_cmplt_epi32_mask(t.v, high.v);
    return {_mm512_mask_mov_ps(b.v, in, a.v)};
}
// a where low <= lane + first < high, else b.
inline F f_within(int first, int low, int high, F a, F b) {
    const __m512i lane = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(first));
    const __mmask16 in =
        _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(low)) & _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(high));
    return {_mm512_mask_mov_ps(b.v, in, a.v)};
}
// table[index] for indices 0 .. 15 of a table of 16.
inline F f_lookup(const float* table, I index) { return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table))}; }

inline I i_set(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I i_load(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void i_store(std::int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I i_min(I a, I b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline I i_max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I i_shl(I a, I by) { return {_mm512_sllv_epi32(a.v, by.v)}; }
inline I i_shr(I a, I by) { return {_mm512_srlv_epi32(a.v, by.v)}; }
inline I i_sar(I a, I by) { return {_mm512_srav_epi32(a.v, by.v)}; }
template <int N>
inline I i_shr(I a) {
    return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
inline I i_sar(I a) {
    return {_mm512_srai_epi32(a.v, N)};
}
inline I i_bits(F a) { return {_mm512_castps_si512(a.v)}; }
template <int N>
inline I i_shl(I a) {
    return {_mm512_slli_epi32(a.v, N)};
}
inline I i_from_u8(const std::uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I i_from_s8(const std::int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The lanes as bytes (each 0 .. 255).
inline void i_store_u8(std::uint8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// The lanes as bytes (each -128 .. 127).
inline void i_store_s8(std::int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
inline std::int32_t i_sum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline std::int32_t i_reduce_max(I a) { return _mm512_reduce_max_epi32(a.v); }
inline float f_reduce_max(F a) { return _mm512_reduce_max_ps(a.v); }
// Lanes 0-7 plus lanes 8-15 of a, then the same of b.
inline I i_fold_halves(I a, I b) {
    const __m512i low = _mm512_inserti64x4(a.v, _mm512_castsi512_si256(b.v), 1);
    const __m512i high = _mm512_shuffle_i64x2(a.v, b.v, 0xEE);
    return {_mm512_add_epi32(low, high)};
}

inline Bytes b_load(const void* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes b_zero() { return {_mm512_setzero_si512()}; }
inline Bytes b_broadcast(const void* p) {
    std::int32_t x;
    __builtin_memcpy(&x, p, 4);
    return {_mm512_set1_epi32(x)};
}
// The word 2i in lanes 0-7, the word 2i + 1 in lanes 8-15, of 16 words.
inline Bytes b_word_pair(const std::uint8_t* words, int i) {
    const __m512i index =
        _mm512_add_epi32(_mm512_set1_epi32(2 * i), _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
    return {_mm512_permutexvar_epi32(index, _mm512_loadu_si512(words))};
}
template <int N>
inline Bytes b_shr(Bytes a, int mask) {
    return {_mm512_and_si512(N ? _mm512_srli_epi16(a.v, N) : a.v, _mm512_set1_epi8(static_cast<char>(mask)))};
}
template <int N>
inline Bytes b_shl(Bytes a, int mask) {
    return {_mm512_and_si512(_mm512_slli_epi16(a.v, N), _mm512_set1_epi8(static_cast<char>(mask)))};
}
// The same, ORed with b: one instruction after the shift.
template <int N>
inline Bytes b_shr_or(Bytes a, int mask, Bytes b) {
    const __m512i shifted = N ? _mm512_srli_epi16(a.v, N) : a.v;
    return {_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(static_cast<char>(mask)), b.v, 0xEA)};
}
template <int N>
inline Bytes b_shl_or(Bytes a, int mask, Bytes b) {
    const __m512i shifted = _mm512_slli_epi16(a.v, N);
    return {_mm512_ternarylogic_epi32(shifted, _mm512_set1_epi8(static_cast<char>(mask)), b.v, 0xEA)};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
inline void b_store(void* p, Bytes a) { _mm512_storeu_si512(p, a.v); }

// acc += the four products of each lane: codes u8 below 128, q s8.
inline I dot_small(I acc, Bytes codes, Bytes q) { return {_mm512_dpbusd_epi32(acc.v, codes.v, q.v)}; }
// The same for stored INT8 (X8 + 128); callers start from -kOffset * sum(q).
inline Prepared prepare(Bytes codes) { return codes; }
inline I dot_full(I acc, Prepared codes, Bytes q) { return {_mm512_dpbusd_epi32(acc.v, codes.v, q.v)}; }

// With the byte lookup of VBMI, packed keys become X8 + 128 through a table for each quad of channels.
#define TURBO_TABLES

// table[16 i + code] = code * step[i] + zero[i] + 128 for the four channels i; for the codes of a width it fits a byte.
inline Bytes b_code_table(const std::int8_t* step, const std::int8_t* zero) {
    const __m512i spread = _mm512_set_epi64(0x0303030303030303, 0x0303030303030303, 0x0202020202020202,
                                            0x0202020202020202, 0x0101010101010101, 0x0101010101010101, 0, 0);
    const __m512i even = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 2, 4, 6, 8, 10, 12, 14));
    const __m512i odd = _mm512_broadcast_i32x4(
        _mm_setr_epi16(1 << 8, 3 << 8, 5 << 8, 7 << 8, 9 << 8, 11 << 8, 13 << 8, static_cast<short>(15 << 8)));
    const __m512i steps = _mm512_and_si512(_mm512_shuffle_epi8(b_broadcast(step).v, spread), _mm512_set1_epi16(0xFF));
    const __m512i zeros = _mm512_shuffle_epi8(b_broadcast(zero).v, spread);
    const __m512i product = _mm512_or_si512(_mm512_and_si512(_mm512_mullo_epi16(even, steps), _mm512_set1_epi16(0xFF)),
                                            _mm512_mullo_epi16(odd, steps));
    return {_mm512_xor_si512(_mm512_add_epi8(product, zeros), _mm512_set1_epi8(static_cast<char>(0x80)))};
}

// table[16 (byte % 4) + code] for every byte; indices are codes ORed with `b_table_channels`.
inline Bytes b_table_channels() { return {_mm512_set1_epi32(0x30201000)}; }
inline Bytes b_from_table(Bytes table, Bytes indices) { return {_mm512_permutexvar_epi8(indices.v, table.v)}; }

// Every byte + 128.
inline Bytes b_offset(Bytes a) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8(static_cast<char>(0x80)))}; }
// a + b in the bytes whose bit n is set in `plane`, else a.
inline Bytes b_add_where(Bytes a, Bytes plane, int n, Bytes b) {
    const __mmask64 set = _mm512_test_epi8_mask(plane.v, _mm512_set1_epi8(static_cast<char>(1 << n)));
    return {_mm512_mask_add_epi8(a.v, set, a.v, b.v)};
}

// Eight doubles.
struct D {
    __m512d v;
};
inline D d_set(double x) { return {_mm512_set1_pd(x)}; }
inline D d_load(const double* p) { return {_mm512_loadu_pd(p)}; }
inline void d_store(double* p, D a) { _mm512_storeu_pd(p, a.v); }
inline D d_from_floats(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline void d_store_floats(float* p, D a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }
inline D operator+(D a, D b) { return {_mm512_add_pd(a.v, b.v)}; }
inline D operator-(D a, D b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline D operator*(D a, D b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline D d_fma(D a, D b, D c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
// Sums in the lanes without the bit Distance of their index, differences in those with it, of pairs of lanes that
// differ in this bit.
template <int Distance>
inline D d_butterfly(D a) {
    const __m512d other = Distance == 1   ? _mm512_permute_pd(a.v, 0x55)
                          : Distance == 2 ? _mm512_permutex_pd(a.v, 0x4E)
                                          : _mm512_shuffle_f64x2(a.v, a.v, 0x4E);
    const auto sign = [](int lane) { return lane & Distance ? -1.0 : 1.0; };
    const __m512d signs = _mm512_setr_pd(sign(0), sign(1), sign(2), sign(3), sign(4), sign(5), sign(6), sign(7));
    return {_mm512_fmadd_pd(a.v, signs, other)};
}

// Lanes of 16 bits, one for each query processed at once: kQueryVectors vectors of 32-bit lanes, packed with signed or
// unsigned saturation.
struct W {
    __m512i v;  // packed within quarters
};
inline W w_set(int x) { return {_mm512_set1_epi16(static_cast<short>(x))}; }
inline W w_load(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void w_store(void* p, W a) { _mm512_storeu_si512(p, a.v); }
inline W w_pack(const I* x) { return {_mm512_packs_epi32(x[0].v, x[1].v)}; }
inline W w_pack_unsigned(const I* x) { return {_mm512_packus_epi32(x[0].v, x[1].v)}; }
inline void w_unpack(W a, I* x) {
    x[0] = {_mm512_srai_epi32(_mm512_unpacklo_epi16(a.v, a.v), 16)};
    x[1] = {_mm512_srai_epi32(_mm512_unpackhi_epi16(a.v, a.v), 16)};
}
inline void w_unpack_unsigned(W a, I* x) {
    x[0] = {_mm512_unpacklo_epi16(a.v, _mm512_setzero_si512())};
    x[1] = {_mm512_unpackhi_epi16(a.v, _mm512_setzero_si512())};
}
// 32-bit lanes of low + 2^16 high, in order.
inline void w_store_joined(void* p, W low, W high) {
    _mm512_storeu_si512(p, _mm512_unpacklo_epi16(low.v, high.v));
    _mm512_storeu_si512(static_cast<std::uint8_t*>(p) + 64, _mm512_unpackhi_epi16(low.v, high.v));
}
inline W operator+(W a, W b) { return {_mm512_add_epi16(a.v, b.v)}; }
inline W operator-(W a, W b) { return {_mm512_sub_epi16(a.v, b.v)}; }
inline W operator|(W a, W b) { return {_mm512_or_si512(a.v, b.v)}; }
inline W w_max(W a, W b) { return {_mm512_max_epi16(a.v, b.v)}; }
inline W w_min_unsigned(W a, W b) { return {_mm512_min_epu16(a.v, b.v)}; }
inline W operator*(W a, W b) { return {_mm512_mullo_epi16(a.v, b.v)}; }           // the lower 16 bits
inline W w_product_high(W a, W b) { return {_mm512_mulhi_epu16(a.v, b.v)}; }      // unsigned, over 2^16
inline W w_product_rounded(W a, W b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }  // over 2^15
inline W w_shr(W a, W by) { return {_mm512_srlv_epi16(a.v, by.v)}; }              // by 0 to 31 bits
template <int N>
inline W w_shl(W a) {
    return {_mm512_slli_epi16(a.v, N)};
}
template <int N>
inline W w_shr(W a) {
    return {_mm512_srli_epi16(a.v, N)};
}
// The largest lane, and the sum of lanes that are not negative.
inline int w_largest(W a) {
    const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(a.v), _mm512_extracti64x4_epi64(a.v, 1));
    const __m128i quarter = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i flip = _mm_set1_epi16(0x7FFF);  // reverses the order, and turns it into that of unsigned numbers
    const int least = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(quarter, flip)));
    return static_cast<std::int16_t>(least ^ 0x7FFF);
}
inline std::int32_t w_sum(W a) { return i_sum({_mm512_madd_epi16(a.v, _mm512_set1_epi16(1))}); }
// a where low <= t < high, else b.
inline W w_between(W low, W t, W high, W a, W b) {
    const __mmask32 in = _mm512_cmple_epi16_mask(low.v, t.v) & _mm512_cmplt_epi16_mask(t.v, high.v);
    return {_mm512_mask_mov_epi16(b.v, in, a.v)};
}
// a where x is not y, else 0.
inline W w_keep_other(W x, W y, W a) { return {_mm512_maskz_mov_epi16(_mm512_cmpneq_epi16_mask(x.v, y.v), a.v)}; }

// Transposes 16 rows of 16 words; rows begin `in_stride` and `out_stride` bytes after one another.
inline void words_transposed(const std::uint8_t* in, int in_stride, std::uint8_t* out, int out_stride) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(in + i * in_stride);
    // Pairs of words, then of pairs, then quarters of rows.
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; ++k) {
            x[i + 2 * k] = _mm512_unpacklo_epi64(y[i + k], y[i + k + 2]);
            x[i + 2 * k + 1] = _mm512_unpackhi_epi64(y[i + k], y[i + k + 2]);
        }
    for (int k = 0; k < 4; ++k) {
        const __m512i low = _mm512_shuffle_i32x4(x[k], x[k + 4], 0x88),
                      low_odd = _mm512_shuffle_i32x4(x[k], x[k + 4], 0xDD);
        const __m512i high = _mm512_shuffle_i32x4(x[k + 8], x[k + 12], 0x88);
        const __m512i high_odd = _mm512_shuffle_i32x4(x[k + 8], x[k + 12], 0xDD);
        _mm512_storeu_si512(out + k * out_stride, _mm512_shuffle_i32x4(low, high, 0x88));
        _mm512_storeu_si512(out + (k + 4) * out_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
        _mm512_storeu_si512(out + (k + 8) * out_stride, _mm512_shuffle_i32x4(low, high, 0xDD));
        _mm512_storeu_si512(out + (k + 12) * out_stride, _mm512_shuffle_i32x4(low_odd, high_odd, 0xDD));
    }
}

}  // namespace turbo::TURBO_ISA
