// Sixteen 32-bit lanes as two AVX2 registers, with the dot product of AVX-VNNI if compiled for it (TURBO_AVXVNNI). Same
// names and results as vec_serial.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa.h"

namespace turbo::TURBO_ISA {

constexpr std::uint8_t kFlip = 0x80;  // the first factor is unsigned: X8 + 128
constexpr int kQueryVectors = 1;
constexpr int kRowsPerPass = 2, kMaxRowsPerPass = 2, kSumsPerPass = 4;

struct F {
    __m256 a, b;
};
struct I {
    __m256i a, b;
};
struct Bytes {
    __m256i a, b;
};

inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_residual(F x, F y, F guess) {
    return {_mm256_fnmadd_ps(guess.a, y.a, x.a), _mm256_fnmadd_ps(guess.b, y.b, x.b)};
}
// x / y of small integers, given 1 / y: a guess, corrected by its residual. It rounds to the same integer as the
// quotient, because halves, the only ties, come out exactly.
inline F f_quotient(F x, F y, F inverse) {
    const F guess = x * inverse;
    return f_fma(f_residual(x, y, guess), inverse, guess);
}
inline F f_divide(F x, F y, F inverse) {
    const F guess = f_quotient(x, y, inverse);
    return f_fma(f_residual(x, y, guess), inverse, guess);
}
inline F f_add_square(F sum, F x) { return f_fma(x, x, sum); }
inline F f_abs(F x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline F f_floor(F x) { return {_mm256_floor_ps(x.a), _mm256_floor_ps(x.b)}; }
inline F f_round(F x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
}
inline F f_from_int(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I i_from_float(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }  // half to even
inline F f_from_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline F f_keep_ge(F x, F y, F z) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), z.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ), z.b)};
}
inline F f_keep_gt(F x, F y, F z) {
    return {_mm256_and_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), z.a),
            _mm256_and_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ), z.b)};
}
inline bool f_any_lt(F x, F y) {
    const __m256 less = _mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ));
    return _mm256_movemask_ps(less) != 0;
}
inline F f_fraction(F x) { return x - f_floor(x); }
inline I i_truncate(F x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
inline __m256 between_half(__m256i low, __m256i t, __m256i high, __m256 x, __m256 y) {
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(low, t), _mm256_cmpgt_epi32(high, t));
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(in));
}
inline F f_between(I low, I t, I high, F x, F y) {
    return {between_half(low.a, t.a, high.a, x.a, y.a), between_half(low.b, t.b, high.b, x.b, y.b)};
}
inline __m256 within_half(int first, int low, int high, __m256 x, __m256 y) {
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane);
    const __m256i in = _mm256_andnot_si256(below, _mm256_cmpgt_epi32(_mm256_set1_epi32(high), lane));
    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(in));
}
inline F f_within(int first, int low, int high, F x, F y) {
    return {within_half(first, low, high, x.a, y.a), within_half(first + 8, low, high, x.b, y.b)};
}
inline __m256 lookup_half(const float* table, __m256i index) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F f_lookup(const float* table, I index) { return {lookup_half(table, index.a), lookup_half(table, index.b)}; }

inline I i_set(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_half(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline I i_load(const std::int32_t* p) { return {load_half(p), load_half(p + 8)}; }
inline void i_store(std::int32_t* p, I x) {
    store_half(p, x.a);
    store_half(p + 8, x.b);
}
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I operator|(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline I i_min(I x, I y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
inline I i_max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline I operator*(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline I i_shl(I x, I by) { return {_mm256_sllv_epi32(x.a, by.a), _mm256_sllv_epi32(x.b, by.b)}; }
inline I i_shr(I x, I by) { return {_mm256_srlv_epi32(x.a, by.a), _mm256_srlv_epi32(x.b, by.b)}; }
inline I i_sar(I x, I by) { return {_mm256_srav_epi32(x.a, by.a), _mm256_srav_epi32(x.b, by.b)}; }
template <int N>
inline I i_shr(I x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
template <int N>
inline I i_sar(I x) {
    return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}
inline I i_bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
template <int N>
inline I i_shl(I x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
inline __m128i load_eight(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline I i_from_u8(const std::uint8_t* p) {
    return {_mm256_cvtepu8_epi32(load_eight(p)), _mm256_cvtepu8_epi32(load_eight(p + 8))};
}
inline I i_from_s8(const std::int8_t* p) {
    return {_mm256_cvtepi8_epi32(load_eight(p)), _mm256_cvtepi8_epi32(load_eight(p + 8))};
}
inline void i_store_u8(std::uint8_t* p, I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline void i_store_s8(std::int8_t* p, I x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline std::int32_t i_sum(I x) {
    const __m256i both = _mm256_add_epi32(x.a, x.b);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
    return _mm_cvtsi128_si32(sum);
}
inline std::int32_t i_reduce_max(I x) {
    const __m256i both = _mm256_max_epi32(x.a, x.b);
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}
inline float f_reduce_max(F x) {
    const __m256 both = _mm256_max_ps(x.a, x.b);
    __m128 top = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    top = _mm_max_ps(top, _mm_movehl_ps(top, top));
    return _mm_cvtss_f32(_mm_max_ss(top, _mm_shuffle_ps(top, top, 1)));
}
inline I i_fold_halves(I x, I y) { return {_mm256_add_epi32(x.a, x.b), _mm256_add_epi32(y.a, y.b)}; }

inline Bytes b_load(const void* p) { return {load_half(p), load_half(static_cast<const std::uint8_t*>(p) + 32)}; }
inline Bytes b_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Bytes b_broadcast(const void* p) {
    std::int32_t x;
    __builtin_memcpy(&x, p, 4);
    return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
inline Bytes b_word_pair(const std::uint8_t* words, int i) {
    return {b_broadcast(words + 8 * i).a, b_broadcast(words + 8 * i + 4).a};
}
template <int N>
inline Bytes b_shr(Bytes x, int mask) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, N), m), _mm256_and_si256(_mm256_srli_epi16(x.b, N), m)};
}
template <int N>
inline Bytes b_shl(Bytes x, int mask) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
    return {_mm256_and_si256(_mm256_slli_epi16(x.a, N), m), _mm256_and_si256(_mm256_slli_epi16(x.b, N), m)};
}
inline Bytes operator|(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
template <int N>
inline Bytes b_shr_or(Bytes a, int mask, Bytes b) {
    return b_shr<N>(a, mask) | b;
}
template <int N>
inline Bytes b_shl_or(Bytes a, int mask, Bytes b) {
    return b_shl<N>(a, mask) | b;
}
inline void b_store(void* p, Bytes x) {
    store_half(p, x.a);
    store_half(static_cast<std::uint8_t*>(p) + 32, x.b);
}

#ifdef TURBO_AVXVNNI
constexpr std::int32_t kOffset = 128;
using Prepared = Bytes;
inline I dot_small(I acc, Bytes codes, Bytes q) {
    return {_mm256_dpbusd_avx_epi32(acc.a, codes.a, q.a), _mm256_dpbusd_avx_epi32(acc.b, codes.b, q.b)};
}
inline Prepared prepare(Bytes codes) { return codes; }
inline I dot_full(I acc, Prepared codes, Bytes q) { return dot_small(acc, codes, q); }
#else
// maddubs adds pairs of products in 16 bits and saturates. Codes of 31 at most times +-118 never reach
// it. INT8 codes do (2 * 247 * 119), so they are taken as sign and magnitude: 2 * 128 * 119 = 30,464
// and 2 * 128 * 127 = 32,512 stay below 32,767.
constexpr std::int32_t kOffset = 0;
struct Prepared {
    Bytes magnitude, codes;
};
inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
inline I dot_small(I acc, Bytes codes, Bytes q) {
    return {dot_half(acc.a, codes.a, q.a), dot_half(acc.b, codes.b, q.b)};
}
// acc += the two 16-bit products of each lane: faster if both factors are signed.
#define TURBO_WIDE_KEYS
inline I dot_wide(I acc, Bytes x, Bytes y) {
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
}
// Sums of dot_small's products in 16 bits (vectors.h has them in 32).
#define TURBO_SHORT_SUMS
using Partial = Bytes;
constexpr std::int32_t kPartialLimit = 0x7fff;
inline Partial partial_zero() { return b_zero(); }
inline Partial dot_partial(Partial acc, Bytes codes, Bytes q) {
    return {_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(codes.a, q.a)),
            _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(codes.b, q.b))};
}
template <int Shift>
inline I add_partial(I acc, Partial x) {
    const __m256i factor = _mm256_set1_epi16(1 << Shift);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, factor)),
            _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, factor))};
}
inline Prepared prepare(Bytes codes) {
    const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
    const Bytes x = {_mm256_xor_si256(codes.a, flip), _mm256_xor_si256(codes.b, flip)};
    return {{_mm256_abs_epi8(x.a), _mm256_abs_epi8(x.b)}, x};
}
inline I dot_full(I acc, Prepared p, Bytes q) {
    return {dot_half(acc.a, p.magnitude.a, _mm256_sign_epi8(q.a, p.codes.a)),
            dot_half(acc.b, p.magnitude.b, _mm256_sign_epi8(q.b, p.codes.b))};
}
#endif

struct D {
    __m256d a, b;
};
inline D d_set(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
inline D d_load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
inline void d_store(double* p, D x) {
    _mm256_storeu_pd(p, x.a);
    _mm256_storeu_pd(p + 4, x.b);
}
inline D d_from_floats(const float* p) {
    return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
inline void d_store_floats(float* p, D x) {
    _mm_storeu_ps(p, _mm256_cvtpd_ps(x.a));
    _mm_storeu_ps(p + 4, _mm256_cvtpd_ps(x.b));
}
inline D operator+(D x, D y) { return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
inline D operator-(D x, D y) { return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)}; }
inline D operator*(D x, D y) { return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)}; }
inline D d_fma(D x, D y, D z) { return {_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b)}; }
template <int Distance>
inline __m256d butterfly_half(__m256d x) {
    const __m256d other = Distance == 1 ? _mm256_permute_pd(x, 5) : _mm256_permute4x64_pd(x, 0x4E);
    const __m256d signs = Distance == 1 ? _mm256_setr_pd(1, -1, 1, -1) : _mm256_setr_pd(1, 1, -1, -1);
    return _mm256_fmadd_pd(x, signs, other);
}
template <int Distance>
inline D d_butterfly(D x) {
    if constexpr (Distance == 4)
        return {_mm256_add_pd(x.a, x.b), _mm256_sub_pd(x.a, x.b)};
    else
        return {butterfly_half<Distance>(x.a), butterfly_half<Distance>(x.b)};
}

struct W {
    __m256i v;  // packed within halves
};
inline W w_set(int x) { return {_mm256_set1_epi16(static_cast<short>(x))}; }
inline W w_load(const void* p) { return {load_half(p)}; }
inline void w_store(void* p, W x) { store_half(p, x.v); }
inline W w_pack(const I* x) { return {_mm256_packs_epi32(x->a, x->b)}; }
inline W w_pack_unsigned(const I* x) { return {_mm256_packus_epi32(x->a, x->b)}; }
inline void w_unpack(W x, I* out) {
    *out = {_mm256_srai_epi32(_mm256_unpacklo_epi16(x.v, x.v), 16),
            _mm256_srai_epi32(_mm256_unpackhi_epi16(x.v, x.v), 16)};
}
inline void w_unpack_unsigned(W x, I* out) {
    const __m256i zero = _mm256_setzero_si256();
    *out = {_mm256_unpacklo_epi16(x.v, zero), _mm256_unpackhi_epi16(x.v, zero)};
}
inline void w_store_joined(void* p, W low, W high) {
    store_half(p, _mm256_unpacklo_epi16(low.v, high.v));
    store_half(static_cast<std::uint8_t*>(p) + 32, _mm256_unpackhi_epi16(low.v, high.v));
}
inline W operator+(W x, W y) { return {_mm256_add_epi16(x.v, y.v)}; }
inline W operator-(W x, W y) { return {_mm256_sub_epi16(x.v, y.v)}; }
inline W operator|(W x, W y) { return {_mm256_or_si256(x.v, y.v)}; }
inline W w_max(W x, W y) { return {_mm256_max_epi16(x.v, y.v)}; }
inline W w_min_unsigned(W x, W y) { return {_mm256_min_epu16(x.v, y.v)}; }
inline W operator*(W x, W y) { return {_mm256_mullo_epi16(x.v, y.v)}; }
inline W w_product_high(W x, W y) { return {_mm256_mulhi_epu16(x.v, y.v)}; }
inline W w_product_rounded(W x, W y) { return {_mm256_mulhrs_epi16(x.v, y.v)}; }
template <int N>
inline W w_shl(W x) {
    return {_mm256_slli_epi16(x.v, N)};
}
template <int N>
inline W w_shr(W x) {
    return {_mm256_srli_epi16(x.v, N)};
}
inline W w_shr(W x, W by) {  // only 32-bit lanes have shifts that differ by lane
    const __m256i even = _mm256_set1_epi32(0xFFFF);
    const __m256i low = _mm256_srlv_epi32(_mm256_and_si256(x.v, even), _mm256_and_si256(by.v, even));
    const __m256i high = _mm256_srlv_epi32(_mm256_srli_epi32(x.v, 16), _mm256_srli_epi32(by.v, 16));
    return {_mm256_or_si256(low, _mm256_slli_epi32(high, 16))};
}
inline int w_largest(W x) {
    const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    const int least = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(0x7FFF))));
    return static_cast<std::int16_t>(least ^ 0x7FFF);
}
inline std::int32_t w_sum(W x) { return i_sum({_mm256_madd_epi16(x.v, _mm256_set1_epi16(1)), _mm256_setzero_si256()}); }
inline W w_between(W low, W t, W high, W x, W y) {
    const __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi16(low.v, t.v), _mm256_cmpgt_epi16(high.v, t.v));
    return {_mm256_blendv_epi8(y.v, x.v, in)};
}
inline W w_keep_other(W x, W y, W z) { return {_mm256_andnot_si256(_mm256_cmpeq_epi16(x.v, y.v), z.v)}; }

// Transposes 16 rows of 16 words; rows begin `in_stride` and `out_stride` bytes after one another.
inline void words_transposed(const std::uint8_t* in, int in_stride, std::uint8_t* out, int out_stride) {
    for (int row = 0; row < 16; row += 8)
        for (int word = 0; word < 16; word += 8) {
            __m256i x[8], y[8];
            for (int i = 0; i < 8; ++i) x[i] = load_half(in + (row + i) * in_stride + 4 * word);
            // Pairs of words, then of pairs, then halves of rows.
            for (int i = 0; i < 8; i += 2) {
                y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
                y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
            }
            for (int i = 0; i < 8; i += 4)
                for (int k = 0; k < 2; ++k) {
                    x[i + 2 * k] = _mm256_unpacklo_epi64(y[i + k], y[i + k + 2]);
                    x[i + 2 * k + 1] = _mm256_unpackhi_epi64(y[i + k], y[i + k + 2]);
                }
            std::uint8_t* at = out + word * out_stride + 4 * row;
            for (int k = 0; k < 4; ++k) {
                store_half(at + k * out_stride, _mm256_permute2x128_si256(x[k], x[k + 4], 0x20));
                store_half(at + (k + 4) * out_stride, _mm256_permute2x128_si256(x[k], x[k + 4], 0x31));
            }
        }
}

}  // namespace turbo::TURBO_ISA
