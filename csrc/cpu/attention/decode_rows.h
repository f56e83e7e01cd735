// Decode: a few query rows over pages in packed form and over tail rows; a lane is a token, then a channel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../widths.h"
#include "packed.h"
#include "page.h"
#include "products.h"
#include "queries.h"
#include "rows.h"
#include "tail_block.h"
#include "task.h"

namespace turbo::TURBO_ISA {

struct DecodeScratch {
    UnpackedRows tail;
    Weights weights;
    BlockScales scales;
    FixedScales fixed;
    // For INT8 rows, and for pages with reordered channels (queries.h).
    alignas(64) std::int8_t q[2][kMaxDecodeRows][kMaxHeadDim];
    Row rows[2][kMaxDecodeRows];
    alignas(64) float spare[kMaxHeadDim];  // output of the rows that fill up a pass
};

template <class Level, int R>
struct Pass {  // R rows over one block; those from `used` on repeat the last one and contribute nothing
    const Job& job;
    const Level& level;
    DecodeScratch& scratch;
    Running& state;
    const std::int8_t* q[R];
    std::int32_t q_sum[R];
    Row row[R];
    int index[R];
    float* out[R];
    int used;

    VisibleKeys visible(int r, std::int64_t block, bool page) const {
        return visible_keys(job.a, job.b, job.a.first_position[job.b] + row[r].query, block, page);
    }

    void weigh_fixed(std::int64_t block, bool page, BlockStats* seen) {
        Weights& w = scratch.weights;
        set_fixed_scales(scratch.scales, scratch.fixed);
        const FixedBlock fixed(scratch.fixed);
        alignas(64) float unit[16] = {};
        alignas(64) std::int32_t shift[16] = {};
        for (int r = 0; r < used; ++r) unit[r] = row[r].taken.unit, shift[r] = row[r].taken.shift;
        const FixedRowTable rows(unit, shift, fixed.key_top);
        for (int r = 0; r < used; ++r) {
            alignas(64) std::int32_t shown[kBlock];
            const std::int64_t head = job.h * job.a.group + row[r].group;
            if (job.a.mask_kind) mask_shows(job.a, job.b, head, row[r].query, block, shown);
            seen[r] = fixed_row_weights(rows, r, fixed, mean_logit_of(job.a, row[r].taken, block), job.a.row_scale,
                                        visible(r, block, page), job.a.mask_kind ? shown : nullptr, w.scores[r], w.p[r],
                                        w.p_sum[r]);
        }
    }

    void weigh(std::int64_t block, bool page) {
        Weights& w = scratch.weights;
        BlockStats seen[R];
        if (Level::kFixed && fixed_point(job.a))
            weigh_fixed(block, page, seen);
        else
            for (int r = 0; r < used; ++r)
                seen[r] = row_weights(job, level, row[r], block, visible(r, block, page), scratch.scales,
                                      state.row_max[index[r]], w.scores[r], w.p[r], w.p_sum[r]);
        for (int r = std::max(used, 1); r < R; ++r) {
            w.p_sum[r] = w.p_sum[r - 1];
            std::memcpy(w.p[r], w.p[r - 1], kBlock);
        }
        if (job.a.by_tile)
            fold_tiles(job.a, level, w, state, used, index, seen);
        else
            fold(w, state, used, index, seen);
        for (int r = used; r < R; ++r) w.rescale[r] = w.unit[r] = 0.0f;
    }

    void over_tail(std::int64_t block) {
        Weights& w = scratch.weights;
        key_products<R>(q, q_sum, scratch.tail.keys, static_cast<int>(job.a.head_dim / 4), w.scores);
        weigh(block, false);
        value_products<R>(w.p, w.p_sum, scratch.tail.values, state.padded_dim, out, w.rescale, w.unit);
    }

    void over_page(const PageHead& page, std::int64_t block) {
        Weights& w = scratch.weights;
        const int d = static_cast<int>(job.a.head_dim);
        with_key_widths(page.offsets(0), [&](auto wide, auto narrow) {
            constexpr int kWide = decltype(wide)::value, kNarrow = decltype(narrow)::value;
            if constexpr (kWide == 8)
                key_products<R>(q, q_sum, page.codes(0), d / 4, w.scores);
            else
                packed_key_products<kWide, kNarrow, R>(q, q_sum, page, d, w.scores);
        });
        weigh(block, true);
        with_width<kValueWidths>(page.offsets(1).bits[0], [&](auto bits) {
            packed_value_products<decltype(bits)::value, R>(w.p, w.p_sum, page, static_cast<int>(job.a.value_dim), out,
                                                            w.rescale, w.unit);
        });
    }
};

// Runs a task; `state` has its rows by query head, then by query.
template <class Level>
inline void run_decode_rows(const AttendArgs& a, const Task& task, const Level& level, DecodeScratch& scratch,
                            Running& state) {
    const Job job{a, task.b, task.h};
    const int queries = static_cast<int>(task.last_query - task.first_query);
    const int rows = queries * static_cast<int>(a.group);
    for (int row = 0; row < rows; ++row) {
        const int g = row / queries;
        const std::int64_t i = task.first_query + row % queries;
        Row &plain = scratch.rows[0][row], &ordered = scratch.rows[1][row];
        plain.group = ordered.group = g, plain.query = ordered.query = i;
        take_query(a, task.b, task.h, g, i, scratch.q[0][row], plain.taken, scratch.q[1][row], ordered.taken);
    }
    // A pass over up to R rows, from `row` on, that see the block; returns the row after them.
    const auto pass_from = [&](auto rows_per_pass, int row, std::int64_t block, bool page, auto&& run) {
        constexpr int R = decltype(rows_per_pass)::value;
        const int form = form_of(a, task.h, block, page);
        Pass<Level, R> pass{job, level, scratch, state, {}, {}, {}, {}, {}, 0};
        for (; pass.used < R && row < rows; ++row) {
            const Row& at = scratch.rows[form][row];
            if (visible_keys(a, task.b, a.first_position[task.b] + at.query, block, page).none()) continue;
            const int r = pass.used++;
            pass.row[r] = at, pass.index[r] = row, pass.q[r] = scratch.q[form][row], pass.q_sum[r] = at.taken.sum;
            pass.out[r] = state.out + static_cast<std::size_t>(row) * state.padded_dim;
        }
        if (!pass.used) return row;
        for (int r = pass.used; r < R; ++r) {
            pass.q[r] = pass.q[r - 1], pass.q_sum[r] = pass.q_sum[r - 1], pass.out[r] = scratch.spare;
        }
        run(pass);
        return row;
    };
    const auto pass_over = [&](std::int64_t block, bool page, auto&& run) {
        for (int row = 0; row < rows;)
            if (rows - row > kRowsPerPass)
                row = pass_from(std::integral_constant<int, kMaxRowsPerPass>{}, row, block, page, run);
            else
                row = pass_from(std::integral_constant<int, kRowsPerPass>{}, row, block, page, run);
    };
    std::memset(scratch.spare, 0, sizeof scratch.spare);
    for (std::int64_t block = task.first_block; block < task.last_block; ++block) {
        if (task_sees(a, task, block, true)) {
            const PageHead page = page_of(a, task.b, task.h, block);
            read_scales(scratch.scales, page);
            pass_over(block, true, [&](auto& pass) { pass.over_page(page, block); });
        }
        if (task_sees(a, task, block, false)) {
            const TailBlock tail = tail_block(a, task.b, task.h, block);
            read_scales(scratch.scales, tail);
            unpack_rows(scratch.tail, tail, static_cast<int>(a.head_dim), static_cast<int>(a.value_dim));
            pass_over(block, false, [&](auto& pass) { pass.over_tail(block); });
        }
    }
}

}  // namespace turbo::TURBO_ISA
