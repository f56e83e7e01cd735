// Few query rows over one block: weights from scores, and what they add to the running result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../vectors.h"
#include "lanes.h"
#include "queries.h"
#include "sight.h"
#include "softmax.h"

namespace turbo::TURBO_ISA {

// The rows of one task: query head g (of the group), query i.
struct Row {
    int group;
    std::int64_t query;
    QueryRow taken;
};

// Running result of the rows of a task: peak and total [rows], out [rows][Dp], unnormalized.
struct Running {
    float* peak;
    float* total;
    float* out;
    int wide;
};

struct Weights {  // of R rows
    alignas(64) std::int32_t scores[kFewRowsAtOnce][kBlock];
    alignas(64) std::uint8_t p[kFewRowsAtOnce][kBlock];
    std::int32_t p_sum[kFewRowsAtOnce];
    alignas(64) float keep[16], unit[16];
};

// What a row saw in a block: its maximum, the sum of its weights, and what one unit of its products is.
struct Seen {
    float peak, total, value_unit;
};

// Weights of one row from their distances to its maximum: the largest product of a weight and its value's scale is
// the code 127.
template <class Level>
inline Seen scaled_weights(const Level& level, const F* distance, const BlockScales& scales, float peak,
                           std::uint8_t* p, std::int32_t& p_sum) {
    F product[4];
    I total = i_set(0), sum = i_set(0);
    for (int n = 0; n < 4; ++n) {
        const F weight = level(distance[n]);
        total = total + i_from_float(weight);
        product[n] = weight * f_load(scales.own + 16 * n);
    }
    const float top = f_reduce_max(f_max(f_max(product[0], product[1]), f_max(product[2], product[3])));
    const F over = f_set(kRowLargest / (top > 0 ? top : 1.0f));
    for (int n = 0; n < 4; ++n) {
        const I code = i_from_float(product[n] * over);
        sum = sum + code;
        i_store_u8(p + 16 * n, code);
    }
    p_sum = i_sum(sum);
    return {peak, static_cast<float>(i_sum(total)) / kFineLevels, top / (kRowLargest * kFineLevels)};
}

// Weights of one row: fills p and p_sum.
template <class Level>
inline Seen row_weights(const Job& job, const Level& level, const Row& row, std::int64_t block, Sight sight,
                        const BlockScales& scales, const std::int32_t* scores, std::uint8_t* p, std::int32_t& p_sum) {
    const AttendArgs& a = job.a;
    const F lowest = f_set(-std::numeric_limits<float>::infinity());
    const F unit = f_set(row.taken.unit);
    F x[4];
    const F mean = f_set(has_mean(a) && block >= a.mean_from ? row.taken.mean_logit : 0.0f);
    for (int n = 0; n < 4; ++n)
        x[n] = f_fma(f_from_int(i_load(scores + 16 * n)), unit * f_load(scales.key + 16 * n), mean);
    if (a.softcap > 0)
        for (int n = 0; n < 4; ++n) x[n] = f_set(a.softcap) * f_tanh(x[n] / f_set(a.softcap));
    if (a.mask_kind) {
        alignas(64) float mask[kBlock];
        mask_values(a, job.b, job.h * a.group + row.group, row.query, block, mask);
        for (int n = 0; n < 4; ++n) x[n] = x[n] + f_load(mask + 16 * n);
    }
    if (!sight.all())
        for (int n = 0; n < 4; ++n) x[n] = f_within(16 * n, sight.low, sight.high, x[n], lowest);
    const float peak = f_reduce_max(f_max(f_max(x[0], x[1]), f_max(x[2], x[3])));
    const F against = f_set(peak == -std::numeric_limits<float>::infinity() ? 0.0f : peak);
    const F unseen = against - lowest;
    for (int n = 0; n < 4; ++n) x[n] = against - x[n];
    if (a.row_scale) return scaled_weights(level, x, scales, peak, p, p_sum);
    I total = i_set(0), sum = i_set(0);
    F value[4];
    for (int n = 0; n < 4; ++n) value[n] = f_load(scales.value + 16 * n);
    float value_unit = scales.value_unit;
    if (a.stored && (!sight.all() || a.mask_kind)) {
        F largest = f_set(0.0f);
        for (int n = 0; n < 4; ++n) largest = f_max(largest, f_keep_gt(unseen, x[n], f_load(scales.own + 16 * n)));
        const float top = f_reduce_max(largest);
        for (int n = 0; n < 4; ++n) value[n] = f_load(scales.own + 16 * n) / f_set(top > 0 ? top : 1.0f);
        value_unit = top / kLevels;
    }
    for (int n = 0; n < 4; ++n) {
        const F levels = level(x[n]);
        const I code = i_from_float(levels * value[n]);
        total = total + i_from_float(levels);
        sum = sum + code;
        i_store_u8(p + 16 * n, code);
    }
    p_sum = i_sum(sum);
    return {peak, static_cast<float>(i_sum(total)) / kLevels, value_unit};
}

// Folds what `rows` rows saw in a block into their running maximum and total; leaves in `w` by how much
// their output shrinks (keep) and what a product of this block counts (unit).
inline void fold(Weights& w, Running& state, int rows, const int* index, const Seen* seen) {
    const float none = -std::numeric_limits<float>::infinity();
    alignas(64) float old_peak[16], new_peak[16], block_peak[16];
    for (int r = 0; r < 16; ++r) {
        old_peak[r] = r < rows ? state.peak[index[r]] : none;
        block_peak[r] = r < rows ? seen[r].peak : none;
        new_peak[r] = std::max(old_peak[r], block_peak[r]);
        if (r < rows) state.peak[index[r]] = new_peak[r];
        if (new_peak[r] == none) new_peak[r] = 0.0f;
    }
    alignas(64) float each[16];
    f_store(w.keep, f_exp(f_load(old_peak) - f_load(new_peak)));
    f_store(each, f_exp(f_load(block_peak) - f_load(new_peak)));
    for (int r = 0; r < rows; ++r) {
        float& total = state.total[index[r]];
        total = total * w.keep[r] + seen[r].total * each[r];
        w.unit[r] = seen[r].value_unit * each[r];
    }
}

}  // namespace turbo::TURBO_ISA
