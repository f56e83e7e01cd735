// Times the phases of a prefill on the kernels' own code: a group of queries over one block of 64 keys. Built and
// called by prefill_phases.py.
#include <algorithm>
#include <chrono>
#include <cstdint>

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
#include "attention/fixed_lanes.h"
#include "attention/lane_products.h"
#include "attention/lane_products_amx.h"
#include "attention/tail_block.h"

using namespace turbo;
using namespace turbo::bench;

namespace {

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

// fixed_power of n (a multiple of 32) numbers.
extern "C" void powers(const std::uint16_t* y, std::uint16_t* out, int n) {
    for (int i = 0; i < n; i += kQueryLanes) w_store(out + i, fixed_power(w_load(y + i)));
}

// Nanoseconds of: scores, weights in floating point (with a scale per row), the same in fixed point, outputs.
extern "C" void time_phases(int head_dim, int repeats, double* out) {
#ifdef TURBO_AMX
    syscall(SYS_arch_prctl, 0x1023, 18);  // Linux wants to be asked for tile registers
#endif
    const Tiles tiles(head_dim);
    static UnpackedKV block;
    static Group g;
    static GroupWork w, scored;
    static BlockScales scales;
    static FixedScales fixed;
    static AttendArgs a{};
    const Job job{a, 0, 0};
    std::uint32_t seed = 1;
    const auto code = [&] { return static_cast<int>((seed = seed * 1664525u + 1013904223u) >> 16) % 239 - 119; };
    block.keys = block.own_keys;
    for (auto& x : block.own_keys) x = static_cast<std::uint8_t>(code()) ^ kFlip;
    for (auto& x : block.values) x = static_cast<std::int8_t>(code());
    for (auto& x : g.form[0].q)
        for (auto& lane : x)
            for (auto& q : lane) q = static_cast<std::int8_t>(code());
    alignas(64) float value[kBlock];
    for (int t = 0; t < kBlock; ++t) {
        value[t] = 0.01f * static_cast<float>(130 + code()), scales.key[t] = 0.02f;
    }
    set_value_scales(scales, value);
    set_fixed_scales(scales, fixed);
    std::fill(g.form[0].unit, g.form[0].unit + kQueryLanes, 5e-4f);
    std::fill(g.form[0].shift, g.form[0].shift + kQueryLanes, 5);
    a.row_scale = 1, w.all = true;
    const Exponential exponential(-9.0f, true);
    out[0] = best(repeats, [&] { lane_scores(block, g.form[0], head_dim, w); });
    scored = w;
    // Weights take the place of the scores that they are computed from: copies of these are timed, too, and taken off.
    const auto copied = [&] { std::memcpy(w.scores, scored.scores, sizeof w.scores); };
    const double copy = best(repeats, copied);
    out[1] = best(repeats,
                  [&] {
                      copied();
                      F row_max[kQueryVectors];
                      group_logits(job, 0, 0, scales, g, w, false, row_max);
                      group_scaled_weights(Levels<Softmax::sas, true>{exponential}, scales, g, w, row_max);
                  }) -
             copy;
    out[2] = best(repeats,
                  [&] {
                      copied();
                      group_fixed(job, 0, fixed, g.form[0], g, w);
                  }) -
             copy;
    out[3] = best(repeats, [&] { lane_outputs(block, g, head_dim, w, false); });
}
