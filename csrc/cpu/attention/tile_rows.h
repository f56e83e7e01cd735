// The weights of the paper (p_scale "tile") in decode, where each query row is a tile of its own: a lane is a token.
#pragma once

#include <cstdint>

#include "../vectors.h"
#include "fixed_rows.h"
#include "lanes.h"
#include "softmax.h"

namespace turbo::TURBO_ISA {

// The scale of the codes of a tile, from its largest product of a weight and a relative value scale.
inline float tile_scale(float largest) { return largest > 0 ? largest / kCodeMax : 1.0f; }

// The rescale factor of running results if the maximum grows by `step`, which is infinite if nothing was seen before.
template <class Level>
TURBO_ALWAYS_INLINE F tile_rescale(const AttendArgs& a, const Level& level, F step) {
    return a.approximate_rescale ? level(step) : f_exp(f_set(0.0f) - step);
}

// The sum of sixteen lanes in a fixed order, on which the rounding of floats depends.
inline float lane_sum(F x) {
    alignas(64) float lanes[16];
    f_store(lanes, x);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Weights of one row from their distances to `row_max`, its running maximum with this block. The normalizer is the sum
// of weights before they are quantized.
template <class Level>
inline BlockStats tile_weights(const Level& level, const F* distance, const BlockScales& scales, float row_max,
                               std::uint8_t* p, std::int32_t& p_sum) {
    F product[4], row_sum = f_set(0.0f), largest = f_set(0.0f);
    for (int n = 0; n < 4; ++n) {
        const F weight = level(distance[n]);
        row_sum = row_sum + weight;
        product[n] = weight * f_load(scales.value + 16 * n);
        largest = f_max(largest, product[n]);
    }
    const float scale = tile_scale(f_reduce_max(largest));
    I sum = i_set(0);
    for (int n = 0; n < 4; ++n) {
        const I code = i_from_float(product[n] / f_set(scale));
        sum = sum + code;
        i_store_u8(p + 16 * n, code);
    }
    p_sum = i_sum(sum);
    return {row_max, lane_sum(row_sum), scales.value_top * scale};
}

}  // namespace turbo::TURBO_ISA
