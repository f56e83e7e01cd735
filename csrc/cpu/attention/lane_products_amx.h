// The two integer products of prefill on AMX tiles: 16 x 16 sums of int32, 64 bytes deep.
//
// Tiles: 0-3 sums, 4-5 keys or values (16 rows of 64 bytes), 6-7 queries or weights.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../vectors.h"
#include "lanes.h"

#ifdef TURBO_AMX

namespace turbo::TURBO_ISA {

struct alignas(64) TileShapes {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

// Configures the tiles while a task runs.
class Tiles {
  public:
    explicit Tiles(int) { shape(64); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // For factors that are `depth` bytes deep (a multiple of 4 up to 64).
    static void shape(int depth) {
        TileShapes shapes;
        for (int t = 0; t < 8; ++t) {
            shapes.bytes[t] = static_cast<std::uint16_t>(t == 4 || t == 5 ? depth : 64);
            shapes.rows[t] = static_cast<std::uint8_t>(t >= 6 ? depth / 4 : 16);
        }
        // The instruction reads the whole struct, which the intrinsic of GCC does not declare.
        __asm__ volatile("" : : "r"(&shapes) : "memory");
        _tile_loadconfig(&shapes);
    }
};

// 32 tokens x 32 queries at once; the sums begin at zero if `first`, else at those in `out`.
inline void score_tiles(const std::uint8_t* keys, const std::int8_t* q, int head_dim, std::int32_t* out, bool first) {
    constexpr int kStride = 4 * kQueryLanes;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, out, kStride);
        _tile_loadd(1, out + 16, kStride);
        _tile_loadd(2, out + 16 * kQueryLanes, kStride);
        _tile_loadd(3, out + 16 * kQueryLanes + 16, kStride);
    }
    _tile_loadd(4, keys, head_dim);
    _tile_loadd(6, q, kStride);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, q + 64, kStride);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, keys + 16 * head_dim, head_dim);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
}

inline void store_tiles(std::int32_t* out) {
    constexpr int kStride = 4 * kQueryLanes;
    _tile_stored(0, out, kStride);
    _tile_stored(1, out + 16, kStride);
    _tile_stored(2, out + 16 * kQueryLanes, kStride);
    _tile_stored(3, out + 16 * kQueryLanes + 16, kStride);
}

inline void lane_scores(const UnpackedKV& block, const LaneQueries& g, int head_dim, GroupWork& w) {
    const int whole = head_dim / 64 * 64, rest = head_dim - whole;
    for (int t = 0; t < kBlock; t += 32) {
        const std::uint8_t* keys = block.keys + t * head_dim;
        for (int c = 0; c < whole; c += 64) {
            // Sums stay in their tiles between iterations.
            if (c == 0) {
                score_tiles(keys, g.q[0][0], head_dim, w.scores[t], true);
            } else {
                const std::int8_t* q = g.q[c / 4][0];
                _tile_loadd(4, keys + c, head_dim);
                _tile_loadd(6, q, 4 * kQueryLanes);
                _tile_dpbssd(0, 4, 6);
                _tile_loadd(7, q + 64, 4 * kQueryLanes);
                _tile_dpbssd(1, 4, 7);
                _tile_loadd(5, keys + c + 16 * head_dim, head_dim);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
        if (whole) store_tiles(w.scores[t]);
    }
    if (!rest) return;
    Tiles::shape(rest);
    for (int t = 0; t < kBlock; t += 32) {
        score_tiles(block.keys + t * head_dim + whole, g.q[whole / 4][0], head_dim, w.scores[t], whole == 0);
        store_tiles(w.scores[t]);
    }
    Tiles::shape(64);
}

// sums [32][kQueryLanes] of 32 channels from `c` on. Beyond value_dim, the values are older bytes, whose sums are not
// used.
inline void output_tiles(const UnpackedKV& block, int c, std::int32_t (*sums)[kQueryLanes]) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, block.values + kBlock * c, kBlock);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, block.values + kBlock * (c + 16), kBlock);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    store_tiles(sums[0]);
}

template <bool Rescales>
inline void add_outputs(Group& g, const GroupWork& w, int c, int channels, const std::int32_t (*sums)[kQueryLanes]) {
    F rescale[kQueryVectors], factor[kQueryVectors];
    for (int n = 0; n < kQueryVectors; ++n) {
        rescale[n] = f_load(w.rescale + 16 * n), factor[n] = f_load(w.factor + 16 * n);
    }
    for (int k = 0; k < channels; ++k)
        for (int n = 0; n < kQueryVectors; ++n) {
            float* at = g.out[c + k] + 16 * n;
            const F before = Rescales ? f_load(at) * rescale[n] : f_load(at);
            f_store(at, f_fma(f_from_int(i_load(sums[k] + 16 * n)), factor[n], before));
        }
}

inline void lane_outputs(const UnpackedKV& block, Group& g, int value_dim, const GroupWork& w, bool rescales) {
    // Tiles are one iteration ahead: their sums take longer to arrive than to be added.
    alignas(64) std::int32_t sums[2][32][kQueryLanes];
    _tile_loadd(6, w.p[0][0], 4 * kQueryLanes);
    _tile_loadd(7, w.p[0][16], 4 * kQueryLanes);
    output_tiles(block, 0, sums[0]);
    for (int c = 0, at = 0; c < value_dim; c += 32, at ^= 1) {
        if (c + 32 < value_dim) output_tiles(block, c + 32, sums[at ^ 1]);
        const int channels = std::min(32, value_dim - c);
        if (rescales)
            add_outputs<true>(g, w, c, channels, sums[at]);
        else
            add_outputs<false>(g, w, c, channels, sums[at]);
    }
}

}  // namespace turbo::TURBO_ISA

#endif
