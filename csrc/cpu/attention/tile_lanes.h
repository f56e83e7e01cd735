// The weights of the paper (p_scale "tile") in prefill: a lane is a query. The 64 query rows of a tile of a head share
// a scale, so that all groups of a task compute their weights over a block before these are quantized.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../memory.h"
#include "../vectors.h"
#include "lane_products.h"
#include "lane_products_amx.h"
#include "lanes.h"
#include "task.h"
#include "tile_rows.h"

namespace turbo::TURBO_ISA {

// A group over one block.
struct TileWork {
    GroupWork work;
    alignas(64) float largest[kQueryLanes];  // product of a weight and a relative value scale
    bool sees;
};

// Writes products of weights and relative value scales to w.x, the largest of each lane to tile.largest, and the
// rescale factor of results to w.rescale; merges maxima, and sums of weights before these are quantized, into the
// running ones.
template <class Level>
inline void weigh_lanes(const AttendArgs& a, const Level& level, const BlockScales& scales, const F* row_max, Group& g,
                        TileWork& tile) {
    const F none = f_set(-std::numeric_limits<float>::infinity());
    GroupWork& w = tile.work;
    w.rescales = false;
    for (int n = 0; n < kQueryVectors; ++n) {
        const F old = f_load(g.row_max + 16 * n), top = f_max(old, row_max[n]);
        const F against = f_keep_gt(top, none, top);
        F row_sum = f_set(0.0f), largest = f_set(0.0f);
        for (int t = 0; t < kBlock; ++t) {
            const F weight = level(against - f_load(w.x[t] + 16 * n));
            row_sum = row_sum + weight;
            const F product = weight * f_set(scales.value[t]);
            largest = f_max(largest, product);
            f_store(w.x[t] + 16 * n, product);
        }
        // A row that sees nothing is not rescaled: SAS at 0 is not 1.
        const F rescale = f_keep_gt(row_max[n], none, tile_rescale(a, level, against - old)) +
                          f_keep_ge(none, row_max[n], f_set(1.0f));
        f_store(g.row_max + 16 * n, top);
        f_store(g.row_sum + 16 * n, f_fma(f_load(g.row_sum + 16 * n), rescale, row_sum));
        f_store(w.rescale + 16 * n, rescale);
        f_store(tile.largest + 16 * n, largest);
        w.rescales = f_any_lt(rescale, f_set(1.0f)) || w.rescales;
    }
}

// Quantizes the products in w.x and sets the factor of the products of the block; `scale` of the tile of each lane.
inline void encode_lanes(const BlockScales& scales, const float* scale, GroupWork& w) {
    for (int n = 0; n < kQueryVectors; ++n) {
        const F unit = f_load(scale + 16 * n);
        for (int t = 0; t < kBlock; t += 4) {
            I code[4];
            for (int k = 0; k < 4; ++k) code[k] = i_from_float(f_load(w.x[t + k] + 16 * n) / unit);
            store_codes(w, t / 4, n, code);
        }
        f_store(w.factor + 16 * n, f_set(scales.value_top) * unit);
    }
}

// All groups of a task, which begins with the first row of a tile, over one block.
template <class Level>
inline void tiles_over_block(const Job& job, const Level& level, const Task& task, std::int64_t block, bool page,
                             UnpackedKV& unpacked, const BlockScales& scales, Buffer<Group>& groups, int count) {
    static thread_local Buffer<TileWork> works;
    static thread_local Buffer<float> largest;  // of each query head's tiles
    const AttendArgs& a = job.a;
    const int form = form_of(a, job.h, block, page);
    const std::int64_t tiles = (task.last_query - task.first_query + kBlock - 1) / kBlock;
    const auto tile_of = [&](const Group& g, int lane) {
        return g.head[lane] * tiles + (g.query[lane] - task.first_query) / kBlock;
    };
    works.hold(count), largest.hold(a.group * tiles);
    fill(&largest[0], a.group * tiles, 0.0f);
    finish_keys(unpacked, static_cast<int>(a.head_dim));
    for (int n = 0; n < count; ++n) {
        Group& g = groups[n];
        TileWork& tile = works[n];
        GroupWork& w = tile.work;
        bool none;
        w.all = sees_all(a, job.b, block, page, g, w, none);
        tile.sees = w.all || !none;
        if (!tile.sees) continue;
        F row_max[kQueryVectors];
        lane_scores(unpacked, g.form[form], static_cast<int>(a.head_dim), w);
        group_logits(job, block, form, scales, g, w, !w.all, row_max);
        weigh_lanes(a, level, scales, row_max, g, tile);
        for (int lane = 0; lane < g.used; ++lane) {
            float& top = largest[tile_of(g, lane)];
            top = std::max(top, tile.largest[lane]);
        }
    }
    for (int n = 0; n < count; ++n) {
        if (!works[n].sees) continue;
        GroupWork& w = works[n].work;
        alignas(64) float scale[kQueryLanes];
        for (int lane = 0; lane < kQueryLanes; ++lane) scale[lane] = tile_scale(largest[tile_of(groups[n], lane)]);
        encode_lanes(scales, scale, w);
        lane_outputs(unpacked, groups[n], static_cast<int>(a.value_dim), w, w.rescales);
    }
}

}  // namespace turbo::TURBO_ISA
