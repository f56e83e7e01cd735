// Attention as tasks: tiles of query rows and, if there is one tile, splits of the blocks, whose results are merged.
// The partition depends only on shapes and lengths, so that results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../memory.h"
#include "../quantize/rotate.h"
#include "../threads.h"
#include "decode_rows.h"
#include "prefill_rows.h"
#include "rows.h"
#include "softmax.h"
#include "task.h"

namespace turbo::TURBO_ISA {

constexpr int kRowsPerTask = 256;  // their output stays in the L2 cache
constexpr int kBlocksPerSplit = 16;
// Each split has its own partial result, so their number must not grow with the keys: at most 64 in decode and 8
// in prefill, which take less than 1.1 MB per KV head.
constexpr int kDecodeSplits = 64, kPrefillSplits = 8;

struct Plan {
    std::int64_t tile, tiles, splits, most_splits;

    // The number of splits of one sequence, which depends only on its length.
    std::int64_t blocks_per_split(std::int64_t blocks) const {
        if (tiles > 1) return blocks;
        return std::max<std::int64_t>(kBlocksPerSplit, (blocks + most_splits - 1) / most_splits);
    }
};

inline Plan plan_of(const AttendArgs& a) {
    std::int64_t tile = kRowsPerTask / a.group;
    if (a.by_tile) tile = std::max<std::int64_t>(1, tile / kBlock) * kBlock;  // tiles of weights are not divided
    tile = std::max<std::int64_t>(1, std::min(a.queries, tile));
    Plan plan{tile, (a.queries + tile - 1) / tile, 1,
              a.queries * a.group <= kMaxDecodeRows ? kDecodeSplits : kPrefillSplits};
    if (a.by_tile) plan.most_splits = 1;  // the running maximum passes through all blocks
    for (std::int64_t b = 0; b < a.batch && plan.tiles == 1; ++b) {
        const std::int64_t blocks = (a.lengths[b] + kBlock - 1) / kBlock, each = plan.blocks_per_split(blocks);
        plan.splits = std::max(plan.splits, (blocks + each - 1) / each);
    }
    return plan;
}

// Writes query i of a query head: normalized, rotated back, with its log-sum-exp; 0 and -inf if it saw no key.
inline void finish_row(const AttendArgs& a, std::int64_t b, std::int64_t head, std::int64_t i, float row_max,
                       float row_sum, const float* out) {
    static const Signs signs;
    const int value_dim = static_cast<int>(a.value_dim);
    const bool seen = row_sum > 0;
    alignas(64) float x[kMaxHeadDim];
    if (!seen) {
        fill(x, value_dim, 0.0f);
    } else {
        const float over = 1.0f / row_sum;
        for (int c = 0; c < value_dim; ++c) x[c] = out[c] * over;
        if (a.rotate) unrotate_row(x, value_dim, signs);
    }
    store_row(a.out, row_offset(a.out, b, head, i), value_dim, x);
    if (!a.lse) return;
    a.lse[(b * a.heads * a.group + head) * a.queries + i] =
        seen ? row_max + std::log(row_sum) : -std::numeric_limits<float>::infinity();
}

// Merges the partial results of a row, in the order of the splits.
inline void merge_row(const Running* parts, std::int64_t count, int row, int padded_dim, float& row_max, float& row_sum,
                      float* out) {
    row_max = -std::numeric_limits<float>::infinity(), row_sum = 0.0f;
    for (std::int64_t s = 0; s < count; ++s) row_max = std::max(row_max, parts[s].row_max[row]);
    fill(out, padded_dim, 0.0f);
    if (row_max == -std::numeric_limits<float>::infinity()) return;
    for (std::int64_t s = 0; s < count; ++s) {
        const Running& part = parts[s];
        alignas(64) float factor[16];
        f_store(factor, f_exp(f_set(part.row_max[row] - row_max)));
        if (factor[0] == 0.0f) continue;
        row_sum += part.row_sum[row] * factor[0];
        const float* from = part.out + static_cast<std::size_t>(row) * padded_dim;
        for (int c = 0; c < padded_dim; c += 16)
            f_store(out + c, f_fma(f_load(from + c), f_set(factor[0]), f_load(out + c)));
    }
}

struct Scratch {
    DecodeScratch decode;
    PrefillScratch prefill;
};

template <class Level>
inline void run_task(const AttendArgs& a, const Task& task, const Level& level, Scratch& scratch, Running& state) {
    const std::int64_t rows = (task.last_query - task.first_query) * a.group;
    fill(state.row_max, rows, -std::numeric_limits<float>::infinity());
    fill(state.row_sum, rows, 0.0f);
    fill(state.out, rows * state.padded_dim, 0.0f);
    if (!rows) return;
    // The full size of tasks decides, so that a ragged batch takes one path. Decode has no scales for tiles of several
    // rows.
    if (std::min<std::int64_t>(a.queries, kRowsPerTask) * a.group <= kMaxDecodeRows && !(a.by_tile && a.queries > 1))
        run_decode_rows(a, task, level, scratch.decode, state);
    else
        run_prefill_rows(a, task, level, scratch.prefill, state);
}

template <class Level>
inline void attend_with(const AttendArgs& a, const Level& level) {
    const Plan plan = plan_of(a);
    const int padded_dim = padded(a.value_dim), rows_per_task = static_cast<int>(plan.tile * a.group);
    const std::int64_t tasks = a.batch * a.heads * plan.tiles * plan.splits;
    const std::size_t floats = (static_cast<std::size_t>(rows_per_task) * (padded_dim + 2) + 15) / 16 * 16;
    // One result per task if splits are merged, else one per thread.
    Buffer<float> kept(plan.splits > 1 ? floats * tasks : 0);
    Buffer<Running> parts(plan.splits > 1 ? tasks : 0);
    const auto place = [&](float* at) {
        const std::int64_t out = static_cast<std::int64_t>(rows_per_task) * padded_dim;
        return Running{at + out, at + out + rows_per_task, at, padded_dim};
    };
    const auto for_rows = [&](const Task& task, auto&& body) {
        const std::int64_t queries = task.last_query - task.first_query;
        for (int row = 0; row < queries * a.group; ++row) {
            const std::int64_t i = task.first_query + row % queries, g = row / queries;
            body(row, task.h * a.group + g, i);
        }
    };
    const auto task_of = [&](std::int64_t index) {
        const std::int64_t split = index % plan.splits, rest = index / plan.splits;
        // The last tiles see most keys under a causal mask: they run first.
        const std::int64_t tile = plan.tiles - 1 - rest / (a.batch * a.heads);
        const std::int64_t bh = rest % (a.batch * a.heads);
        const std::int64_t b = bh / a.heads, own = (a.lengths[b] + kBlock - 1) / kBlock;
        const std::int64_t each = plan.blocks_per_split(own);
        Task task{b, bh % a.heads, tile * plan.tile, 0, split * each, 0};
        task.last_query = std::min({(tile + 1) * plan.tile, a.queries, a.valid_rows[task.b]});
        task.last_query = std::max(task.last_query, task.first_query);
        task.last_block = std::min(own, task.first_block + each);
        return task;
    };
    parallel_for(tasks, static_cast<int>(a.threads), [&](std::int64_t index) {
        static thread_local Buffer<float> own;
        static thread_local Buffer<Scratch> scratch(1);
        const Task task = task_of(index);
        if (plan.splits > 1) {
            parts[index] = place(&kept[floats * index]);
            run_task(a, task, level, scratch[0], parts[index]);
            return;
        }
        own.hold(floats);
        Running state = place(&own[0]);
        run_task(a, task, level, scratch[0], state);
        for_rows(task, [&](int row, std::int64_t head, std::int64_t i) {
            finish_row(a, task.b, head, i, state.row_max[row], state.row_sum[row],
                       state.out + static_cast<std::size_t>(row) * padded_dim);
        });
    });
    if (plan.splits > 1)
        parallel_for(a.batch * a.heads, static_cast<int>(a.threads), [&](std::int64_t bh) {
            alignas(64) float out[kMaxHeadDim];
            for_rows(task_of(bh * plan.splits), [&](int row, std::int64_t head, std::int64_t i) {
                float row_max, row_sum;
                merge_row(&parts[bh * plan.splits], plan.splits, row, padded_dim, row_max, row_sum, out);
                finish_row(a, bh / a.heads, head, i, row_max, row_sum, out);
            });
        });
    // Padding rows are zero and saw no key. Concatenated sequences have none.
    if (a.out.starts) return;
    for (std::int64_t b = 0; b < a.batch; ++b)
        for (std::int64_t head = 0; head < a.heads * a.group; ++head)
            for (std::int64_t i = a.valid_rows[b]; i < a.queries; ++i) finish_row(a, b, head, i, 0.0f, 0.0f, nullptr);
}

// The weight 1 (softmax.h).
inline float full_weight(const AttendArgs& a) { return a.by_tile ? 1.0f : a.row_scale ? kFineLevels : kLevels; }

template <Softmax Form>
inline void attend_as(const AttendArgs& a) {
    const Exponential exponential(a.threshold, full_weight(a));
    if (exponential.cuts())
        attend_with(a, Levels<Form, true>{exponential});
    else
        attend_with(a, Levels<Form, false>{exponential});
}

inline void attend(const AttendArgs& a) {
    switch (a.softmax) {
        case 0: attend_as<Softmax::sas>(a); break;
        case 1: attend_as<Softmax::sas2>(a); break;
        case 3: attend_with(a, Levels<Softmax::sas16, false>{Exponential(a.threshold, full_weight(a))}); break;
        default: attend_with(a, Levels<Softmax::exp, false>{Exponential(a.threshold, full_weight(a))});
    }
}

}  // namespace turbo::TURBO_ISA
