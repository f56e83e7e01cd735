// Prefill over blocks: a lane is a query. Maxima, sums and rescaling are then plain vector operations, and both integer
// products read keys and values as rows:
//
//   scores^T [64 tokens][queries] = keys [64 tokens][D] . queries [D / 4 quads][queries][4 channels] (2 of 16 bits)
//   out^T    [Dv][queries]       += values [Dv][64 tokens] . weights [16 quads of tokens][queries][4]
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../vectors.h"
#include "arguments.h"
#include "queries.h"
#include "softmax.h"
#include "visibility.h"

namespace turbo::TURBO_ISA {

constexpr int kQueryLanes = 16 * kQueryVectors;  // queries at once

// One block of keys and values, unpacked to INT8. Keys are X8 ^ kFlip (X8 + 128 if the dot product takes its first
// factor unsigned), in own_keys or in the rows of a tail block; values are X8.
struct UnpackedKV {
    const std::uint8_t* keys;
    alignas(64) std::uint8_t own_keys[kBlock * kMaxHeadDim];
    alignas(64) std::int8_t values[(kMaxHeadDim + 32) * kBlock];  // tiles read beyond the last channels
    alignas(64) std::uint8_t work[kBlock * kMaxHeadDim];
#ifdef TURBO_WIDE_KEYS
    alignas(64) std::int16_t wide[kBlock * kMaxHeadDim];  // the keys' INT8 as 16 bits
#endif
};

// Widens the keys to 16 bits, if lane_scores reads them in that form.
inline void finish_keys([[maybe_unused]] UnpackedKV& block, [[maybe_unused]] int head_dim) {
#ifdef TURBO_WIDE_KEYS
    for (int i = 0; i < kBlock * head_dim; ++i) block.wide[i] = static_cast<std::int8_t>(block.keys[i] ^ kFlip);
#endif
}

// Scales of the tokens of a block.
struct BlockScales {
    alignas(64) float key[kBlock];
    alignas(64) float own[kBlock];    // of values
    alignas(64) float value[kBlock];  // the same, relative to the largest
    float value_top, value_unit;      // the largest, and the largest / 127
};

inline void set_value_scales(BlockScales& block, const float* scale) {
    F largest = f_load(scale);
    for (int t = 16; t < kBlock; t += 16) largest = f_max(largest, f_load(scale + t));
    const float top = f_reduce_max(largest);
    const F divisor = f_set(top > 0 ? top : 1.0f);
    for (int t = 0; t < kBlock; t += 16) {
        f_store(block.own + t, f_load(scale + t));
        f_store(block.value + t, f_load(scale + t) / divisor);
    }
    block.value_top = top, block.value_unit = top / kLevels;
}

// Relative scales in units of 1 / kFixedOne.
inline void set_fixed_scales(const BlockScales& block, FixedScales& fixed) {
    F largest = f_load(block.key);
    for (int t = 16; t < kBlock; t += 16) largest = f_max(largest, f_load(block.key + t));
    fixed.key_top = f_reduce_max(largest), fixed.value_top = block.value_top;
    const F divisor = f_set(fixed.key_top > 0 ? fixed.key_top : 1.0f), one = f_set(kFixedOne);
    for (int t = 0; t < kBlock; t += 16) {
        i_store(fixed.key + t, i_from_float(f_load(block.key + t) / divisor * one));
        i_store(fixed.value + t, i_from_float(f_load(block.value + t) * one));
    }
}

// words [16 quads of tokens][Dv] -> values [Dv][16 quads]; up to 8 more rows of values are written, and not used.
inline void values_from_words(std::int8_t* values, const std::uint8_t* words, int value_dim) {
    for (int c = 0; c < value_dim; c += 16)
        words_transposed(words + 4 * c, 4 * value_dim, reinterpret_cast<std::uint8_t*>(values) + kBlock * c, kBlock);
}

#ifdef TURBO_WIDE_KEYS
using LaneCode = std::int16_t;
#else
using LaneCode = std::int8_t;
#endif
constexpr int kLaneCodes = 4 / sizeof(LaneCode);  // channels that fill a lane of 32 bits

// Queries as INT8.
struct LaneQueries {
    alignas(64) LaneCode q[kMaxHeadDim / kLaneCodes][kQueryLanes][kLaneCodes];
    alignas(64) std::int32_t sum[kQueryLanes], shift[kQueryLanes];
    alignas(64) float unit[kQueryLanes];
};

// The state of a group of queries over all blocks.
struct Group {
    LaneQueries form[2];  // for INT8 rows, and for pages with reordered channels (queries.h)
    alignas(64) float mean[kQueryLanes];
    alignas(64) float row_max[kQueryLanes], row_sum[kQueryLanes];
    alignas(64) float out[kMaxHeadDim][kQueryLanes];
    std::int64_t position[kQueryLanes], query[kQueryLanes];
    int head[kQueryLanes];           // index within the group of query heads
    int used;                        // lanes
    std::int64_t nearest, farthest;  // smallest and largest position
};

struct GroupWork {
    // Scores, then logits, then weights share memory: two of these and the output of a group compete for the L1 cache.
    union {
        alignas(64) std::int32_t scores[kBlock][kQueryLanes];
        float x[kBlock][kQueryLanes];
    };
    alignas(64) std::uint8_t p[kBlock / 4][kQueryLanes][4];
    alignas(64) float rescale[kQueryLanes], factor[kQueryLanes];
    alignas(64) std::int32_t low[kQueryLanes], high[kQueryLanes];
    bool all, rescales;
};

// Whether every lane sees the whole block (its page, or its tail rows); if not, sets low and high. `none`: whether no
// lane sees any key.
inline bool sees_all(const AttendArgs& a, std::int64_t b, std::int64_t block, bool page, const Group& g, GroupWork& w,
                     bool& none) {
    const std::int64_t first = block * kBlock, last = first + kBlock - 1;
    none = false;
    bool all = g.used == kQueryLanes && last < a.lengths[b];
    if (a.causal) all = all && last <= g.nearest;
    if (a.stored) all = all && (page ? last < g.nearest || !in_tail(a, b, block) : !is_page(a, b, block));
    if (a.window) all = all && first > g.farthest - a.window && (a.causal || last < g.nearest + a.window);
    if (all) return true;
    none = true;
    for (int lane = 0; lane < kQueryLanes; ++lane) {
        VisibleKeys visible{0, 0};
        if (lane < g.used) visible = visible_keys(a, b, g.position[lane], block, page);
        w.low[lane] = visible.low, w.high[lane] = visible.high;
        none = none && visible.none();
    }
    return false;
}

// Writes the logits of all lanes to w.x, and their maxima over the block to `row_max`.
inline void group_logits(const Job& job, std::int64_t block, int form, const BlockScales& scales, const Group& g,
                         GroupWork& w, bool partial, F* row_max) {
    const AttendArgs& a = job.a;
    const F lowest = f_set(-std::numeric_limits<float>::infinity());
    const bool with_mean = mean_subtracted(a, block);
    F unit[kQueryVectors], mean[kQueryVectors], top[kQueryVectors];
    for (int n = 0; n < kQueryVectors; ++n) {
        unit[n] = f_load(g.form[form].unit + 16 * n), top[n] = lowest;
        mean[n] = with_mean ? f_load(g.mean + 16 * n) : f_set(0.0f);
    }
    for (int t = 0; t < kBlock; ++t)
        for (int n = 0; n < kQueryVectors; ++n) {
            const F x = f_fma(f_from_int(i_load(w.scores[t] + 16 * n)), unit[n] * f_set(scales.key[t]), mean[n]);
            f_store(w.x[t] + 16 * n, x);
            top[n] = f_max(top[n], x);
        }
    for (int n = 0; n < kQueryVectors; ++n) row_max[n] = top[n];
    if (a.softcap > 0)
        for (int t = 0; t < kBlock; ++t)
            for (int n = 0; n < kQueryVectors; ++n) {
                const F x = f_load(w.x[t] + 16 * n) / f_set(a.softcap);
                f_store(w.x[t] + 16 * n, f_set(a.softcap) * f_tanh(x));
            }
    if (a.mask_kind) {
        alignas(64) float mask[kBlock];
        for (int lane = 0; lane < g.used; ++lane) {
            mask_values(a, job.b, job.h * a.group + g.head[lane], g.query[lane], block, mask);
            for (int t = 0; t < kBlock; ++t) w.x[t][lane] += mask[t];
        }
    }
    if (!partial && !a.mask_kind && !(a.softcap > 0)) return;
    for (int n = 0; n < kQueryVectors; ++n) {
        top[n] = lowest;
        const I low = i_load(w.low + 16 * n), high = i_load(w.high + 16 * n);
        for (int t = 0; t < kBlock; ++t) {
            F x = f_load(w.x[t] + 16 * n);
            if (partial) x = f_between(low, i_set(t), high, x, lowest);
            f_store(w.x[t] + 16 * n, x);
            top[n] = f_max(top[n], x);
        }
        row_max[n] = top[n];
    }
}

// Stores the codes of four tokens.
inline void store_codes(GroupWork& w, int quad, int n, const I* code) {
    i_store(reinterpret_cast<std::int32_t*>(w.p[quad][16 * n]),
            (code[0] | i_shl<8>(code[1])) | (i_shl<16>(code[2]) | i_shl<24>(code[3])));
}

// Merges the row max and the row sum of 16 lanes over a block into the running ones; sets the rescale factor of the
// running output, and the factor of the products of the block, whose unit is `unit`. Returns whether any output has to
// be rescaled.
inline bool fold_lanes(Group& g, GroupWork& w, int n, F row_max, F row_sum, F unit) {
    const F none = f_set(-std::numeric_limits<float>::infinity());
    const F old = f_load(g.row_max + 16 * n), top = f_max(old, row_max);
    const F base = f_keep_gt(top, none, top);
    const F rescale = f_exp(old - base), each = f_exp(row_max - base);
    f_store(g.row_max + 16 * n, top);
    f_store(g.row_sum + 16 * n, f_fma(row_sum, each, f_load(g.row_sum + 16 * n) * rescale));
    f_store(w.rescale + 16 * n, rescale);
    f_store(w.factor + 16 * n, unit * each);
    return f_any_lt(rescale, f_set(1.0f));
}

// Weights of all lanes: writes INT8 codes to w.p, the rescale factor of the running output to w.rescale, and the factor
// of the products of this block to w.factor. `Own`: value scales are relative to the largest that a lane sees. Returns
// whether any output has to be rescaled.
template <bool Own, class Levels>
inline bool group_weights(const Levels& levels, const BlockScales& scales, Group& g, GroupWork& w, const F* row_max) {
    const F none = f_set(-std::numeric_limits<float>::infinity());
    bool rescales = false;
    for (int n = 0; n < kQueryVectors; ++n) {
        const F against = f_keep_gt(row_max[n], none, row_max[n]);
        F largest = f_set(0.0f), divisor = f_set(1.0f);
        if constexpr (Own) {
            for (int t = 0; t < kBlock; ++t)
                largest = f_max(largest, f_keep_gt(f_load(w.x[t] + 16 * n), none, f_set(scales.own[t])));
            divisor = largest + f_keep_ge(f_set(0.0f), largest, divisor);
        }
        I row_sum = i_set(0);
        for (int t = 0; t < kBlock; t += 4) {
            I code[4];
            for (int k = 0; k < 4; ++k) {
                const F level = levels(against - f_load(w.x[t + k] + 16 * n));
                row_sum = row_sum + i_from_float(level);
                const F value = Own ? f_set(scales.own[t + k]) / divisor : f_set(scales.value[t + k]);
                code[k] = i_from_float(level * value);
            }
            store_codes(w, t / 4, n, code);
        }
        const F unit = Own ? largest / f_set(kLevels) : f_set(scales.value_unit);
        rescales = fold_lanes(g, w, n, row_max[n], f_from_int(row_sum) / f_set(kLevels), unit) || rescales;
    }
    return rescales;
}

// The same with a scale per lane: the largest product of a weight and the scale of its value gets the code 127.
template <class Levels>
inline bool group_scaled_weights(const Levels& levels, const BlockScales& scales, Group& g, GroupWork& w,
                                 const F* row_max) {
    const F none = f_set(-std::numeric_limits<float>::infinity());
    bool rescales = false;
    for (int n = 0; n < kQueryVectors; ++n) {
        const F against = f_keep_gt(row_max[n], none, row_max[n]);
        F top = f_set(0.0f);
        I row_sum = i_set(0);
        for (int t = 0; t < kBlock; ++t) {
            const F weight = levels(against - f_load(w.x[t] + 16 * n));
            row_sum = row_sum + i_from_float(weight);
            const F product = weight * f_set(scales.own[t]);
            top = f_max(top, product);
            f_store(w.x[t] + 16 * n, product);
        }
        const F over = f_set(kRowLargest) / (top + f_keep_ge(f_set(0.0f), top, f_set(1.0f)));
        for (int t = 0; t < kBlock; t += 4) {
            I code[4];
            for (int k = 0; k < 4; ++k) code[k] = i_from_float(f_load(w.x[t + k] + 16 * n) * over);
            store_codes(w, t / 4, n, code);
        }
        const F unit = top / f_set(kRowLargest * kFineLevels);
        rescales = fold_lanes(g, w, n, row_max[n], f_from_int(row_sum) / f_set(kFineLevels), unit) || rescales;
    }
    return rescales;
}

}  // namespace turbo::TURBO_ISA
