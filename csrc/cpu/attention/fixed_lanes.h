// Weights of prefill in fixed point (fixed_softmax.h): a lane is a query.
#pragma once

#include <cstdint>
#include <limits>

#include "../vectors.h"
#include "fixed_softmax.h"
#include "lanes.h"

namespace turbo::TURBO_ISA {

// `FixedRows` of a group over a block, in lanes of 16 bits: how its scores become distances.
struct FixedGroup {
    I shift[kQueryVectors];
    F logit[kQueryVectors], cut[kQueryVectors];
    W most, power, factor;  // a distance is min(difference, most) power factor / 2^16

    FixedGroup(const LaneQueries& q, float key_top) {
        I near[kQueryVectors], each[kQueryVectors], by[kQueryVectors];
        for (int n = 0; n < kQueryVectors; ++n) {
            const FixedRows rows(f_load(q.unit + 16 * n), i_load(q.shift + 16 * n), key_top);
            shift[n] = rows.shift, logit[n] = rows.logit, cut[n] = rows.cut();
            near[n] = rows.most, each[n] = rows.power, by[n] = rows.factor;
        }
        most = w_pack_unsigned(near), power = w_pack_unsigned(each), factor = w_pack_unsigned(by);
    }
};

// Writes INT8 codes to w.p, and w.rescale and w.factor, like `group_scaled_weights` of lanes.h, from the products in
// w.scores. `Partial`: some keys are hidden, by w.low and w.high and, unless it is null, by `shown` (1 if a mask shows
// a key, else 0).
template <bool Partial>
inline bool group_fixed_weights(const FixedScales& scales, const LaneQueries& q, const F* mean, bool row_scale,
                                const std::int32_t (*shown)[kQueryLanes], Group& g, GroupWork& w) {
    constexpr int kRow = 2 * kQueryLanes;  // bytes
    const FixedGroup fixed(q, scales.key_top);
    auto* kept = reinterpret_cast<std::uint8_t*>(w.scores);  // 16-bit scores, then products, over the 32-bit scores
    const W unseen = w_set(kUnseen);
    W first = unseen, end = unseen, top = unseen;
    I lanes[kQueryVectors];
    if constexpr (Partial) {
        for (int n = 0; n < kQueryVectors; ++n) lanes[n] = i_load(w.low + 16 * n);
        first = w_pack(lanes);
        for (int n = 0; n < kQueryVectors; ++n) lanes[n] = i_load(w.high + 16 * n);
        end = w_pack(lanes);
    }
    for (int t = 0; t < kBlock; ++t) {
        for (int n = 0; n < kQueryVectors; ++n) lanes[n] = i_sar(i_load(w.scores[t] + 16 * n), fixed.shift[n]);
        W score = w_product_rounded(w_pack(lanes), w_set(scales.key[t]));
        if constexpr (Partial) {
            score = w_between(first, w_set(t), end, score, unseen);
            if (shown) {
                for (int n = 0; n < kQueryVectors; ++n) lanes[n] = i_load(shown[t] + 16 * n);
                score = w_between(w_set(1), w_pack(lanes), w_set(2), score, unseen);
            }
        }
        w_store(kept + kRow * t, score);
        top = w_max(top, score);
    }
    I sum[kQueryVectors];
    for (int n = 0; n < kQueryVectors; ++n) sum[n] = i_set(0);
    W largest = w_set(0);
    for (int t = 0; t < kBlock; t += 16) {  // the sums of 16 tokens fit 16 bits
        W part = w_set(0);
        for (int k = t; k < t + 16; ++k) {
            const W score = w_load(kept + kRow * k);
            W weight = fixed_weight(top - score, fixed.most, fixed.power, fixed.factor);
            if constexpr (Partial) weight = w_keep_other(score, unseen, weight);
            part = part + w_product_rounded(weight, w_set(kFixedSums));
            const W product = w_product_rounded(weight, w_set(scales.value[k]));
            largest = w_max(largest, product);
            w_store(kept + kRow * k, product);
        }
        w_unpack_unsigned(part, lanes);
        for (int n = 0; n < kQueryVectors; ++n) sum[n] = sum[n] + lanes[n];
    }
    I levels[kQueryVectors];
    F unit[kQueryVectors];
    w_unpack(largest, lanes);
    for (int n = 0; n < kQueryVectors; ++n) {
        levels[n] = row_scale ? fixed_levels(lanes[n]) : i_set(static_cast<std::int32_t>(kLevels));
        unit[n] = row_scale ? fixed_unit(levels[n], scales.value_top) : f_set(scales.value_top / kLevels);
    }
    const W packed = w_pack(levels);
    for (int t = 0; t < kBlock; t += 4) {
        W code[4];
        for (int k = 0; k < 4; ++k) code[k] = w_product_rounded(w_load(kept + kRow * (t + k)), packed);
        w_store_joined(w.p[t / 4], code[0] | w_shl<8>(code[1]), code[2] | w_shl<8>(code[3]));
    }
    w_unpack(top, lanes);
    const F none = f_set(-std::numeric_limits<float>::infinity()), lowest = f_set(static_cast<float>(kUnseen));
    bool rescales = false;
    for (int n = 0; n < kQueryVectors; ++n) {
        const F seen = f_from_int(lanes[n]), logit = f_fma(seen + fixed.cut[n], fixed.logit[n], mean[n]);
        const F row_max = f_keep_gt(seen, lowest, logit) + f_keep_ge(lowest, seen, none);
        const F row_sum = f_from_int(sum[n]) / f_set(static_cast<float>(kFixedSums));
        rescales = fold_lanes(g, w, n, row_max, row_sum, unit[n]) || rescales;
    }
    return rescales;
}

inline bool group_fixed(const Job& job, std::int64_t block, const FixedScales& scales, const LaneQueries& q, Group& g,
                        GroupWork& w) {
    const AttendArgs& a = job.a;
    F mean[kQueryVectors];
    const bool with_mean = mean_subtracted(a, block);
    for (int n = 0; n < kQueryVectors; ++n) mean[n] = with_mean ? f_load(g.mean + 16 * n) : f_set(0.0f);
    if (!a.mask_kind)
        return w.all ? group_fixed_weights<false>(scales, q, mean, a.row_scale, nullptr, g, w)
                     : group_fixed_weights<true>(scales, q, mean, a.row_scale, nullptr, g, w);
    alignas(64) std::int32_t shown[kBlock][kQueryLanes] = {};
    for (int lane = 0; lane < g.used; ++lane) {
        alignas(64) std::int32_t of_lane[kBlock];
        mask_shows(a, job.b, job.h * a.group + g.head[lane], g.query[lane], block, of_lane);
        for (int t = 0; t < kBlock; ++t) shown[t][lane] = of_lane[t];
        if (w.all) w.low[lane] = 0, w.high[lane] = kBlock;
    }
    return group_fixed_weights<true>(scales, q, mean, a.row_scale, shown, g, w);
}

}  // namespace turbo::TURBO_ISA
