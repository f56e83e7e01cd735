// Prefill: groups of queries, one per lane, over blocks of INT8 keys and values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../memory.h"
#include "fixed_lanes.h"
#include "lane_products.h"
#include "lane_products_amx.h"
#include "lanes.h"
#include "page.h"
#include "queries.h"
#include "rows.h"
#include "tail_block.h"
#include "task.h"
#include "tile_lanes.h"

namespace turbo::TURBO_ISA {

struct PrefillScratch {
    UnpackedKV block;
    GroupWork work[2];
    BlockScales scales;
    FixedScales fixed;
};

// Initializes a group with queries row .. row + kQueryLanes of the task.
inline void start_group(const AttendArgs& a, const Task& task, int row, int rows, Group& g) {
    const int queries = static_cast<int>(task.last_query - task.first_query);
    const int head_dim = static_cast<int>(a.head_dim);
    const int forms = order_of(a, task.h) ? 2 : 1;
    g.used = std::min(kQueryLanes, rows - row);
    g.nearest = std::numeric_limits<std::int64_t>::max(), g.farthest = std::numeric_limits<std::int64_t>::min();
    for (int lane = 0; lane < kQueryLanes; ++lane) {
        // Lanes after the last row repeat its position; they see nothing and are dropped.
        const int at = row + std::min(lane, g.used - 1);
        g.head[lane] = at / queries, g.query[lane] = task.first_query + at % queries;
        g.position[lane] = a.first_position[task.b] + g.query[lane];
        g.nearest = std::min(g.nearest, g.position[lane]), g.farthest = std::max(g.farthest, g.position[lane]);
        alignas(64) std::int8_t codes[2][kMaxHeadDim];
        QueryRow taken[2] = {};
        if (lane < g.used)
            take_query(a, task.b, task.h, g.head[lane], g.query[lane], codes[0], taken[0], codes[1], taken[1]);
        else
            std::memset(codes, 0, sizeof codes);
        g.mean[lane] = taken[0].mean_logit;
        for (int form = 0; form < forms; ++form) {
            LaneQueries& to = g.form[form];
            to.unit[lane] = taken[form].unit, to.sum[lane] = taken[form].sum;
            to.shift[lane] = taken[form].shift;
            for (int i = 0; i < head_dim / kLaneCodes; ++i)
                std::copy_n(codes[form] + kLaneCodes * i, kLaneCodes, to.q[i][lane]);
        }
        g.row_max[lane] = -std::numeric_limits<float>::infinity(), g.row_sum[lane] = 0.0f;
    }
    fill(g.out[0], a.value_dim * kQueryLanes, 0.0f);
}

// All groups over one block, as a pipeline: while the weights of one group are computed, the products for the scores of
// the next and for the outputs of the previous one are in flight, and nothing waits for its stores.
template <class Level>
inline void groups_over_block(const Job& job, const Level& level, std::int64_t block, bool page, Buffer<Group>& groups,
                              int count, PrefillScratch& s) {
    const int head_dim = static_cast<int>(job.a.head_dim), value_dim = static_cast<int>(job.a.value_dim);
    const int form = form_of(job.a, job.h, block, page);
    finish_keys(s.block, head_dim);
    const bool fixed = Level::kFixed && fixed_point(job.a);
    if (fixed) set_fixed_scales(s.scales, s.fixed);
    const auto next_seen = [&](int n, GroupWork& w) {
        for (bool none; n < count; ++n) {
            w.all = sees_all(job.a, job.b, block, page, groups[n], w, none);
            if (w.all || !none) break;
        }
        if (n < count) lane_scores(s.block, groups[n].form[form], head_dim, w);
        return n;
    };
    int last = -1, now = next_seen(0, s.work[0]);
    for (int at = 0; now < count; at ^= 1) {
        GroupWork &w = s.work[at], &other = s.work[at ^ 1];
        Group* previous = last < 0 ? nullptr : &groups[last];
        // The weights of the other work are still needed: only its scores and visible ranges are written.
        const bool rescales = other.rescales;
        const int next = next_seen(now + 1, other);
        F row_max[kQueryVectors];
        if (!fixed) group_logits(job, block, form, s.scales, groups[now], w, !w.all, row_max);
        if (fixed)
            w.rescales = group_fixed(job, block, s.fixed, groups[now].form[form], groups[now], w);
        else if (job.a.row_scale)
            w.rescales = group_scaled_weights(level, s.scales, groups[now], w, row_max);
        else if (job.a.stored && (!w.all || job.a.mask_kind))
            w.rescales = group_weights<true>(level, s.scales, groups[now], w, row_max);
        else
            w.rescales = group_weights<false>(level, s.scales, groups[now], w, row_max);
        if (previous) lane_outputs(s.block, *previous, value_dim, other, rescales);
        last = now, now = next;
        if (now >= count) lane_outputs(s.block, groups[last], value_dim, w, w.rescales);
    }
}

// Copies rows row .. row + kQueryLanes of the task to its result, of which channels beyond Dv are not read.
inline void finish_group(const Group& g, int row, int rows, int value_dim, Running& state) {
    const int used = std::min(kQueryLanes, rows - row);
    std::copy_n(g.row_max, used, state.row_max + row), std::copy_n(g.row_sum, used, state.row_sum + row);
    alignas(64) float some[16][16];
    for (int first = 0; first < used; first += 16)
        for (int c = 0; c < value_dim; c += 16) {
            const auto* from = reinterpret_cast<const std::uint8_t*>(g.out[c] + first);
            words_transposed(from, sizeof g.out[c], reinterpret_cast<std::uint8_t*>(some), sizeof some[0]);
            for (int lane = 0; lane < std::min(16, used - first); ++lane)
                std::memcpy(state.out + static_cast<std::size_t>(row + first + lane) * state.padded_dim + c, some[lane],
                            sizeof some[lane]);
        }
}

template <class Level>
inline void run_prefill_rows(const AttendArgs& a, const Task& task, const Level& level, PrefillScratch& scratch,
                             Running& state) {
    static thread_local Buffer<Group> groups;
    const Job job{a, task.b, task.h};
    const int head_dim = static_cast<int>(a.head_dim), value_dim = static_cast<int>(a.value_dim);
    const int rows = static_cast<int>((task.last_query - task.first_query) * a.group);
    const int count = (rows + kQueryLanes - 1) / kQueryLanes;
    groups.hold(count);
    for (int n = 0; n < count; ++n) start_group(a, task, n * kQueryLanes, rows, groups[n]);
    const Tiles tiles(head_dim);
    const auto over_block = [&](std::int64_t block, bool page) {
        if (a.by_tile)
            tiles_over_block(job, level, task, block, page, scratch.block, scratch.scales, groups, count);
        else
            groups_over_block(job, level, block, page, groups, count, scratch);
    };
    for (std::int64_t block = task.first_block; block < task.last_block; ++block) {
        if (task_sees(a, task, block, true)) {
            const PageHead page = page_of(a, task.b, task.h, block);
            read_scales(scratch.scales, page);
            unpack_kv(scratch.block, page, head_dim, value_dim);
            over_block(block, true);
        }
        if (task_sees(a, task, block, false)) {
            const TailBlock tail = tail_block(a, task.b, task.h, block);
            read_scales(scratch.scales, tail);
            unpack_kv(scratch.block, tail, head_dim, value_dim);
            over_block(block, false);
        }
    }
    for (int n = 0; n < count; ++n) finish_group(groups[n], n * kQueryLanes, rows, value_dim, state);
}

}  // namespace turbo::TURBO_ISA
