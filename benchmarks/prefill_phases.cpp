// Times the phases of a prefill on the kernels' own code: a group of queries over one block of 64 keys; and what the
// softmax among them takes in 16-bit integers. Built and called by prefill_phases.py.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#define TURBO_ISA bench
#ifdef __AMX_INT8__
#define TURBO_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
#define TURBO_VECTORS "vec_avx512.h"
#else
#define TURBO_VECTORS "vec_avx2.h"
#endif
#include "attention/lane_products.h"
#include "attention/lane_products_amx.h"
#include "attention/operand.h"

using namespace turbo;
using namespace turbo::bench;

namespace {

// As many 16-bit lanes as queries of a group.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
using Words = __m512i;
Words set(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
Words load(const void* p) { return _mm512_loadu_si512(p); }
void store(void* p, Words a) { _mm512_storeu_si512(p, a); }
Words add(Words a, Words b) { return _mm512_add_epi16(a, b); }
Words sub(Words a, Words b) { return _mm512_sub_epi16(a, b); }
Words sub_saturated(Words a, Words b) { return _mm512_subs_epi16(a, b); }
Words larger(Words a, Words b) { return _mm512_max_epi16(a, b); }
Words smaller(Words a, Words b) { return _mm512_min_epi16(a, b); }
Words bits_or(Words a, Words b) { return _mm512_or_si512(a, b); }
Words high(Words a, Words b) { return _mm512_mulhi_epi16(a, b); }
Words high_unsigned(Words a, Words b) { return _mm512_mulhi_epu16(a, b); }
Words rounded(Words a, Words b) { return _mm512_mulhrs_epi16(a, b); }
template <int N>
Words left(Words a) {
    return _mm512_slli_epi16(a, N);
}
template <int N>
Words right(Words a) {
    return _mm512_srli_epi16(a, N);
}
Words lookup(Words table, Words at) { return _mm512_shuffle_epi8(table, at); }
Words table_of(__m128i table) { return _mm512_broadcast_i32x4(table); }
// 32-bit products over 2^shift, saturated; lanes in the order that `store_bytes` and `words` undo.
Words packed(const std::int32_t* p, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    return _mm512_packs_epi32(_mm512_sra_epi32(i_load(p).v, count), _mm512_sra_epi32(i_load(p + 16).v, count));
}
void interleaved(Words a, Words b, void* p) {
    store(p, _mm512_unpacklo_epi16(a, b));
    store(static_cast<char*>(p) + 64, _mm512_unpackhi_epi16(a, b));
}
#else
using Words = __m256i;
Words set(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
Words load(const void* p) { return load_half(p); }
void store(void* p, Words a) { store_half(p, a); }
Words add(Words a, Words b) { return _mm256_add_epi16(a, b); }
Words sub(Words a, Words b) { return _mm256_sub_epi16(a, b); }
Words sub_saturated(Words a, Words b) { return _mm256_subs_epi16(a, b); }
Words larger(Words a, Words b) { return _mm256_max_epi16(a, b); }
Words smaller(Words a, Words b) { return _mm256_min_epi16(a, b); }
Words bits_or(Words a, Words b) { return _mm256_or_si256(a, b); }
Words high(Words a, Words b) { return _mm256_mulhi_epi16(a, b); }
Words high_unsigned(Words a, Words b) { return _mm256_mulhi_epu16(a, b); }
Words rounded(Words a, Words b) { return _mm256_mulhrs_epi16(a, b); }
template <int N>
Words left(Words a) {
    return _mm256_slli_epi16(a, N);
}
template <int N>
Words right(Words a) {
    return _mm256_srli_epi16(a, N);
}
Words lookup(Words table, Words at) { return _mm256_shuffle_epi8(table, at); }
Words table_of(__m128i table) { return _mm256_broadcastsi128_si256(table); }
Words packed(const std::int32_t* p, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    const I x = i_load(p);
    return _mm256_packs_epi32(_mm256_sra_epi32(x.a, count), _mm256_sra_epi32(x.b, count));
}
void interleaved(Words a, Words b, void* p) {
    store(p, _mm256_unpacklo_epi16(a, b));
    store(static_cast<char*>(p) + 32, _mm256_unpackhi_epi16(a, b));
}
#endif

// 2^-y as unsigned Q15 for y in unsigned Q12, as prefill_phases.py defines it: three products to the high half, the
// last by a power of two.
template <bool Cubic>
inline Words power(Words y, const int* c) {
    const Words powers = table_of(_mm_setr_epi8(-128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0));
    const Words f = left<4>(y);
    Words a = set(c[1]);
    if constexpr (Cubic) a = sub(a, high_unsigned(set(c[2]), f));
    a = sub(set(c[0]), high_unsigned(a, f));
    return high_unsigned(sub(set(-1), high_unsigned(a, f)), lookup(powers, bits_or(right<4>(y), set(0x80))));
}

struct Integers {
    std::int16_t key[kBlock], value[kBlock];  // scales over their block's largest, Q15
    int shift, unit, coefficients[3];
};

// Scores to weights, in 16 bits from the products on; w.x is what is kept between.
template <bool Cubic>
inline void integer_weights(const Integers& s, Group& g, GroupWork& w, float value_unit) {
    auto* kept = reinterpret_cast<std::int16_t*>(w.x[0]);
    Words top = set(-32768), total = set(0);
    for (int t = 0; t < kBlock; ++t) {
        const Words x = rounded(packed(w.scores[t], s.shift), set(s.key[t]));
        store(kept + t * kQueryLanes, x);
        top = larger(top, x);
    }
    const Words unit = set(s.unit), most = set(4095), levels = set(127);
    for (int t = 0; t < kBlock; t += 4) {
        Words code[4];
        for (int k = 0; k < 4; ++k) {
            const Words below = sub_saturated(top, load(kept + (t + k) * kQueryLanes));
            const Words weight = power<Cubic>(left<3>(smaller(high(below, unit), most)), s.coefficients);
            total = add(total, rounded(weight, levels));
            code[k] = rounded(rounded(weight, set(s.value[t + k])), levels);
        }
        interleaved(bits_or(code[0], left<8>(code[1])), bits_or(code[2], left<8>(code[3])), w.p[t / 4][0]);
    }
    alignas(64) std::int32_t sums[kQueryLanes], tops[kQueryLanes];
    interleaved(total, set(0), sums);
    interleaved(set(0), top, tops);
    bool shrinks = false;
    for (int n = 0; n < kQueryVectors; ++n) {
        const F row_max = f_from_int(i_load(tops + 16 * n)) * f_load(g.form[0].unit + 16 * n);
        shrinks |= fold_lanes(g, w, n, row_max, f_from_int(i_load(sums + 16 * n)) / f_set(kLevels), f_set(value_unit));
    }
    w.shrinks = shrinks;
}

template <class Phase>
double best(int repeats, Phase&& phase) {
    constexpr int kCalls = 20;
    double least = 1e30;
    for (int r = 0; r < repeats; ++r) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < kCalls; ++i) {
            phase();
            __asm__ volatile("" : : : "memory");
        }
        const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
        least = std::min(least, took.count() / kCalls);
    }
    return least;
}

}  // namespace

extern "C" int queries_at_once() { return kQueryLanes; }

// 2^-y of n (a multiple of 32) numbers.
extern "C" void powers(const std::uint16_t* y, std::uint16_t* out, int n, int degree, const int* coefficients) {
    for (int i = 0; i < n; i += kQueryLanes) {
        const Words x = load(y + i);
        store(out + i, degree == 3 ? power<true>(x, coefficients) : power<false>(x, coefficients));
    }
}

// Nanoseconds of: scores, logits, weights (static scale, a scale per row), outputs; both passes of the softmax in
// integers (square, cubic).
extern "C" void time_phases(int head_dim, const int* square, const int* cubic, int repeats, double* out) {
#ifdef TURBO_AMX
    syscall(SYS_arch_prctl, 0x1023, 18);  // Linux wants to be asked for tile registers
#endif
    const Tiles tiles(head_dim);
    static Operand block;
    static Group g;
    static GroupWork w;
    static BlockScales scales;
    static const AttendArgs a{};
    const Job job{a, 0, 0};
    std::uint32_t seed = 1;
    const auto code = [&] { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 16) % 239 - 119; };
    for (auto& x : block.keys) x = static_cast<std::uint8_t>(code()) ^ kFlip;
    for (auto& x : block.values) x = static_cast<std::int8_t>(code());
    for (auto& x : g.form[0].q)
        for (auto& lane : x)
            for (auto& q : lane) q = static_cast<std::int8_t>(code());
    Integers integers{{}, {}, 5, 900, {square[0], square[1], 0}};
    alignas(64) float value[kBlock];
    for (int t = 0; t < kBlock; ++t) {
        value[t] = 0.01f * static_cast<float>(130 + code()), scales.key[t] = 0.02f;
        integers.key[t] = integers.value[t] = static_cast<std::int16_t>(30000 + 20 * code());
    }
    set_value_scales(scales, value);
    std::fill(g.form[0].unit, g.form[0].unit + kQueryLanes, 5e-4f);
    const Exponential coarse(-6.0f, false), fine(-6.0f, true);
    F row_max[kQueryVectors];
    out[0] = best(repeats, [&] { lane_scores(block, g.form[0], head_dim, w); });
    const auto logits = [&] { group_logits(job, 0, 0, scales, g, w, false, row_max); };
    out[1] = best(repeats, logits);
    out[2] = best(repeats, [&] { group_weights<false>(Levels<Softmax::sas, false>{coarse}, scales, g, w, row_max); });
    // These write over the logits, so that both are timed.
    out[3] = best(repeats, [&] {
        logits();
        group_scaled_weights(Levels<Softmax::sas, true>{fine}, scales, g, w, row_max);
    });
    out[4] = best(repeats, [&] { lane_outputs(block, g, head_dim, w, false); });
    out[5] = best(repeats, [&] { integer_weights<false>(integers, g, w, scales.value_unit); });
    std::copy(cubic, cubic + 3, integers.coefficients);
    out[6] = best(repeats, [&] { integer_weights<true>(integers, g, w, scales.value_unit); });
}
