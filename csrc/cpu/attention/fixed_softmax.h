// The softmax in fixed point, starting from integer products (numerics.md, "SAS in 16-bit integers"), in lanes of 16
// bits: a lane is a query in fixed_lanes.h and a token in fixed_rows.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../vectors.h"
#include "softmax.h"

namespace turbo::TURBO_ISA {

constexpr int kOctave = 2048;                 // an octave, a distance of ln 2
constexpr float kFixedOne = 32767.0f;         // the weight 1, and the largest relative scale
constexpr float kFixedUnits = 32768.0f;       // divisor of a product of two such numbers
constexpr float kFarthest = 15.0f * kOctave;  // distances from here on have the weight 0
constexpr float kSteepest = 8191.0f;          // the largest distance per unit of a score
constexpr std::int32_t kUnseen = -32768;      // the score of a key that is not seen, below all others
constexpr std::int32_t kFixedSums = 2048;     // the weight 1 in sums of weights
constexpr float kOctavesPerNat = 1.44269504f;
// 2^-f = 1 - f (c0 - f (c1 - f c2)) on [0, 1], in units of 2^-15.
constexpr std::int32_t kFixedCubic[3] = {22660, 7570, 1294};

// 2^-(y / kOctave) in units of 1 / kFixedOne, y unsigned.
inline W fixed_power(W y) {
    const W f = w_shl<5>(y);
    const W inner = w_set(kFixedCubic[1]) - w_product_high(w_set(kFixedCubic[2]), f);
    const W slope = w_set(kFixedCubic[0]) - w_product_high(inner, f);
    return w_shr(w_set(32767) - w_product_high(slope, f), w_shr<11>(y));
}

// The weight of a score that is `difference` below the largest; `FixedRows` has the rest.
inline W fixed_weight(W difference, W most, W power, W factor) {
    return fixed_power(w_product_high(w_min_unsigned(difference, most) * power, factor));
}

// The weight for a distance in nats.
template <bool Cut>
struct Levels<Softmax::sas16, Cut> {
    const Exponential& e;
    static constexpr bool kFixed = true;

    TURBO_ALWAYS_INLINE F operator()(F y) const {
        I lanes[kQueryVectors] = {i_from_float(f_min(y * f_set(kOctavesPerNat * kOctave), f_set(65535.0f)))};
        w_unpack(fixed_power(w_pack_unsigned(lanes)), lanes);
        return f_from_int(lanes[0]) * f_set(e.full / kFixedOne);
    }
};

// The shift after which the products of a query with INT8 keys fit 16 bits, from the sum of magnitudes of its codes.
inline std::int32_t fixed_shift(std::int32_t magnitudes) {
    std::int32_t shift = 0;
    while (127 * magnitudes >> shift > 32767) ++shift;
    return shift;
}

// Scales of a block relative to the largest.
struct FixedScales {
    alignas(64) std::int32_t key[64], value[64];
    float key_top, value_top;
};

// Turns the scores of sixteen rows over a block into distances: a score is (product >> shift) times the relative scale
// of the key, a distance min(difference, most) power factor / 2^16, in units of 1 / kOctave octaves.
struct FixedRows {
    I shift, most, power, factor;
    F logit;  // per unit of a score

    // unit: of the rows' products; key_top: the block's largest key scale.
    FixedRows(F unit, I row_shift, float key_top) : shift(row_shift) {
        logit = unit * f_set(key_top) * f_from_bits(i_shl<23>(shift + i_set(127))) * f_set(kFixedUnits / kFixedOne);
        const F slope = f_min(logit * f_set(kOctavesPerNat * kOctave), f_set(kSteepest));
        const I steps = i_max(i_shr<23>(i_bits(slope)) - i_set(126), i_set(0));
        const F scaled = slope * f_from_bits(i_shl<23>(i_set(127 + 16) - steps));
        factor = i_min(i_from_float(scaled), i_set(65535));
        const F enough = f_min(f_set(kFarthest) / f_max(slope, f_set(1e-30f)), f_set(65535.0f));
        most = i_min(i_truncate(enough) + i_set(1), i_shr(i_set(65535), steps));
        power = i_shl(i_set(1), steps);
    }

    // The mean loss of a score from shifting its product.
    F cut() const { return f_keep_ge(f_from_int(shift), f_set(1.0f), f_set(0.5f)); }
};

// From the largest product of a weight and a relative value scale in a row: codes are products times this / 2^15.
inline I fixed_levels(I largest) {
    const F over = f_set(kLevels * kFixedUnits) / f_max(f_from_int(largest), f_set(1.0f));
    return i_truncate(f_min(over, f_set(kFixedOne)));
}

// The unit of such codes; `value_top` is the largest value scale of the block.
constexpr float kFixedShare = kFixedUnits / kFixedOne * (kFixedUnits / kFixedOne);
inline F fixed_unit(I levels, float value_top) { return f_set(value_top * kFixedShare) / f_from_int(levels); }

// The same for one row.
inline std::int32_t fixed_levels(std::int32_t largest) {
    const float over = kLevels * kFixedUnits / std::max(static_cast<float>(largest), 1.0f);
    return static_cast<std::int32_t>(std::min(over, kFixedOne));
}
inline float fixed_unit(std::int32_t levels, float value_top) {
    return value_top * kFixedShare / static_cast<float>(levels);
}

}  // namespace turbo::TURBO_ISA
