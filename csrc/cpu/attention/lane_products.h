// The two integer products of prefill, with a query per lane (layouts in lanes.h), by dot products of four bytes;
// lane_products_amx.h has them for tiles.
#pragma once

#include <cstdint>

#include "../vectors.h"
#include "lanes.h"

#ifndef TURBO_AMX

namespace turbo::TURBO_ISA {

struct Tiles {
    explicit Tiles(int) {}
};

constexpr int kAcross = kQueryVectors == 2 ? 8 : 4;  // tokens or channels at once: 16 or 4 sums

#ifdef TURBO_WIDE_KEYS

inline void lane_scores(const UnpackedKV& block, const LaneQueries& g, int head_dim, GroupWork& w) {
    static_assert(kQueryVectors == 1);
    for (int t = 0; t < kBlock; t += kAcross) {
        I acc[kAcross];
        for (int k = 0; k < kAcross; ++k) acc[k] = i_set(0);
        const std::int16_t* keys = block.wide + t * head_dim;
#pragma GCC unroll 2
        for (int pair = 0; pair < head_dim / 2; ++pair) {
            const Bytes q = b_load(g.q[pair][0]);
            for (int k = 0; k < kAcross; ++k) {
                acc[k] = dot_wide(acc[k], b_broadcast(keys + k * head_dim + 2 * pair), q);
            }
        }
        for (int k = 0; k < kAcross; ++k) i_store(w.scores[t + k], acc[k]);
    }
}

#else

inline void lane_scores(const UnpackedKV& block, const LaneQueries& g, int head_dim, GroupWork& w) {
    for (int t = 0; t < kBlock; t += kAcross) {
        I acc[kAcross][kQueryVectors];
        for (int n = 0; n < kQueryVectors; ++n) {
            const I start = i_set(0) - i_shl<7>(i_load(g.sum + 16 * n));
            for (int k = 0; k < kAcross; ++k) acc[k][n] = kOffset ? start : i_set(0);
        }
        const std::uint8_t* keys = block.keys + t * head_dim;
        for (int quad = 0; quad < head_dim / 4; ++quad) {
            Bytes q[kQueryVectors];
            for (int n = 0; n < kQueryVectors; ++n) q[n] = b_load(g.q[quad][16 * n]);
            for (int k = 0; k < kAcross; ++k) {
                const Prepared key = prepare(b_broadcast(keys + k * head_dim + 4 * quad));
                for (int n = 0; n < kQueryVectors; ++n) acc[k][n] = dot_full(acc[k][n], key, q[n]);
            }
        }
        for (int k = 0; k < kAcross; ++k)
            for (int n = 0; n < kQueryVectors; ++n) i_store(w.scores[t + k] + 16 * n, acc[k][n]);
    }
}

#endif

template <bool Rescales>
inline void lane_outputs_as(const UnpackedKV& block, Group& g, int value_dim, const GroupWork& w) {
    F rescale[kQueryVectors], factor[kQueryVectors];
    for (int n = 0; n < kQueryVectors; ++n) {
        rescale[n] = f_load(w.rescale + 16 * n), factor[n] = f_load(w.factor + 16 * n);
    }
    for (int c = 0; c < value_dim; c += kAcross) {
        I acc[kAcross][kQueryVectors];
        for (int k = 0; k < kAcross; ++k)
            for (int n = 0; n < kQueryVectors; ++n) acc[k][n] = i_set(0);
        const std::int8_t* values = block.values + kBlock * c;
        for (int quad = 0; quad < kBlock / 4; ++quad) {
            Bytes p[kQueryVectors];
            for (int n = 0; n < kQueryVectors; ++n) p[n] = b_load(w.p[quad][16 * n]);
            for (int k = 0; k < kAcross; ++k) {
                // Weights are at most 127: pairs of products stay within 16 bits (2 * 127 * 128).
                const Bytes value = b_broadcast(values + kBlock * k + 4 * quad);
                for (int n = 0; n < kQueryVectors; ++n) acc[k][n] = dot_small(acc[k][n], p[n], value);
            }
        }
        for (int k = 0; k < kAcross; ++k)
            for (int n = 0; n < kQueryVectors; ++n) {
                float* at = g.out[c + k] + 16 * n;
                const F before = Rescales ? f_load(at) * rescale[n] : f_load(at);
                f_store(at, f_fma(f_from_int(acc[k][n]), factor[n], before));
            }
    }
}

inline void lane_outputs(const UnpackedKV& block, Group& g, int value_dim, const GroupWork& w, bool rescales) {
    if (rescales)
        lane_outputs_as<true>(block, g, value_dim, w);
    else
        lane_outputs_as<false>(block, g, value_dim, w);
}

}  // namespace turbo::TURBO_ISA

#endif
