// Decode rows over one block: weights from scores, and their merge into the running result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../vectors.h"
#include "fixed_rows.h"
#include "lanes.h"
#include "queries.h"
#include "softmax.h"
#include "tile_rows.h"
#include "visibility.h"

namespace turbo::TURBO_ISA {

// A row of a task: query head `group` of the KV head, query `query`.
struct Row {
    int group;
    std::int64_t query;
    QueryRow taken;
};

// Running result of the rows of a task: row_max and row_sum [rows], out [rows][Dp], unnormalized.
struct Running {
    float* row_max;
    float* row_sum;
    float* out;
    int padded_dim;
};

struct Weights {  // of the rows of a pass
    alignas(64) std::int32_t scores[kMaxRowsPerPass][kBlock];
    alignas(64) std::uint8_t p[kMaxRowsPerPass][kBlock];
    std::int32_t p_sum[kMaxRowsPerPass];
    alignas(64) float rescale[16], unit[16];
};

// Weights of one row from their distances to its maximum: the largest product of a weight and the scale of its value
// gets the code 127.
template <class Level>
inline BlockStats scaled_weights(const Level& level, const F* distance, const BlockScales& scales, float row_max,
                                 std::uint8_t* p, std::int32_t& p_sum) {
    F product[4];
    I row_sum = i_set(0), sum = i_set(0);
    for (int n = 0; n < 4; ++n) {
        const F weight = level(distance[n]);
        row_sum = row_sum + i_from_float(weight);
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
    return {row_max, static_cast<float>(i_sum(row_sum)) / kFineLevels, top / (kRowLargest * kFineLevels)};
}

// Weights of one row: writes p and p_sum. before: the running maximum.
template <class Level>
inline BlockStats row_weights(const Job& job, const Level& level, const Row& row, std::int64_t block,
                              VisibleKeys visible, const BlockScales& scales, float before, const std::int32_t* scores,
                              std::uint8_t* p, std::int32_t& p_sum) {
    const AttendArgs& a = job.a;
    const F lowest = f_set(-std::numeric_limits<float>::infinity());
    const F unit = f_set(row.taken.unit), mean = f_set(mean_logit_of(a, row.taken, block));
    F x[4];
    for (int n = 0; n < 4; ++n)
        x[n] = f_fma(f_from_int(i_load(scores + 16 * n)), unit * f_load(scales.key + 16 * n), mean);
    if (a.softcap > 0)
        for (int n = 0; n < 4; ++n) x[n] = f_set(a.softcap) * f_tanh(x[n] / f_set(a.softcap));
    if (a.mask_kind) {
        alignas(64) float mask[kBlock];
        mask_values(a, job.b, job.h * a.group + row.group, row.query, block, mask);
        for (int n = 0; n < 4; ++n) x[n] = x[n] + f_load(mask + 16 * n);
    }
    if (!visible.all())
        for (int n = 0; n < 4; ++n) x[n] = f_within(16 * n, visible.low, visible.high, x[n], lowest);
    float row_max = f_reduce_max(f_max(f_max(x[0], x[1]), f_max(x[2], x[3])));
    if (a.by_tile && row_max > -std::numeric_limits<float>::infinity()) row_max = std::max(row_max, before);
    const F against = f_set(row_max == -std::numeric_limits<float>::infinity() ? 0.0f : row_max);
    const F unseen = against - lowest;
    for (int n = 0; n < 4; ++n) x[n] = against - x[n];
    if (a.by_tile) return tile_weights(level, x, scales, row_max, p, p_sum);
    if (a.row_scale) return scaled_weights(level, x, scales, row_max, p, p_sum);
    I row_sum = i_set(0), sum = i_set(0);
    F value[4];
    for (int n = 0; n < 4; ++n) value[n] = f_load(scales.value + 16 * n);
    float value_unit = scales.value_unit;
    if (a.stored && (!visible.all() || a.mask_kind)) {
        F largest = f_set(0.0f);
        for (int n = 0; n < 4; ++n) largest = f_max(largest, f_keep_gt(unseen, x[n], f_load(scales.own + 16 * n)));
        const float top = f_reduce_max(largest);
        for (int n = 0; n < 4; ++n) value[n] = f_load(scales.own + 16 * n) / f_set(top > 0 ? top : 1.0f);
        value_unit = top / kLevels;
    }
    for (int n = 0; n < 4; ++n) {
        const F levels = level(x[n]);
        const I code = i_from_float(levels * value[n]);
        row_sum = row_sum + i_from_float(levels);
        sum = sum + code;
        i_store_u8(p + 16 * n, code);
    }
    p_sum = i_sum(sum);
    return {row_max, static_cast<float>(i_sum(row_sum)) / kLevels, value_unit};
}

// Merges the row max and row sum of a block into the running ones of `rows` rows; sets the factor by which their output
// is rescaled (w.rescale) and the unit of the products of the block (w.unit).
inline void fold(Weights& w, Running& state, int rows, const int* index, const BlockStats* seen) {
    const float none = -std::numeric_limits<float>::infinity();
    alignas(64) float old_max[16], new_max[16], block_max[16];
    for (int r = 0; r < 16; ++r) {
        old_max[r] = r < rows ? state.row_max[index[r]] : none;
        block_max[r] = r < rows ? seen[r].row_max : none;
        new_max[r] = std::max(old_max[r], block_max[r]);
        if (r < rows) state.row_max[index[r]] = new_max[r];
        if (new_max[r] == none) new_max[r] = 0.0f;
    }
    alignas(64) float each[16];
    f_store(w.rescale, f_exp(f_load(old_max) - f_load(new_max)));
    f_store(each, f_exp(f_load(block_max) - f_load(new_max)));
    for (int r = 0; r < rows; ++r) {
        float& row_sum = state.row_sum[index[r]];
        row_sum = row_sum * w.rescale[r] + seen[r].row_sum * each[r];
        w.unit[r] = seen[r].value_unit * each[r];
    }
}

// The same for weights relative to the running maximum: `seen` has that, or -infinity if a row saw nothing.
template <class Level>
inline void fold_tiles(const AttendArgs& a, const Level& level, Weights& w, Running& state, int rows, const int* index,
                       const BlockStats* seen) {
    const float none = -std::numeric_limits<float>::infinity();
    alignas(64) float step[16] = {};
    for (int r = 0; r < rows; ++r)
        if (seen[r].row_max > none) step[r] = seen[r].row_max - state.row_max[index[r]];
    f_store(w.rescale, tile_rescale(a, level, f_load(step)));
    for (int r = 0; r < rows; ++r) {
        w.unit[r] = seen[r].value_unit;
        if (seen[r].row_max == none) {
            w.rescale[r] = 1.0f;  // SAS at 0 is not 1
            continue;
        }
        float& row_sum = state.row_sum[index[r]];
        row_sum = row_sum * w.rescale[r] + seen[r].row_sum;
        state.row_max[index[r]] = seen[r].row_max;
    }
}

}  // namespace turbo::TURBO_ISA
