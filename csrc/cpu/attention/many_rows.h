// Many query rows (prefill): groups of queries as lanes over blocks of INT8 keys and values.
#pragma once

struct ManyScratch {
    Operand block;
    GroupWork work;
    BlockScales scales;
};

// Queries row .. row + kQueryLanes of the task, with nothing seen yet.
inline void start_group(const AttendArgs& a, const Task& task, int row, int rows, Group& g) {
    const int queries = static_cast<int>(task.last_query - task.first_query);
    const int head_dim = static_cast<int>(a.head_dim);
    g.used = std::min(kQueryLanes, rows - row);
    g.nearest = std::numeric_limits<std::int64_t>::max(), g.farthest = std::numeric_limits<std::int64_t>::min();
    for (int lane = 0; lane < kQueryLanes; ++lane) {
        // Lanes past the last row repeat it; they see nothing and are dropped.
        const int at = row + std::min(lane, g.used - 1);
        g.head[lane] = at / queries, g.query[lane] = task.first_query + at % queries;
        g.position[lane] = a.first_position[task.b] + g.query[lane];
        g.nearest = std::min(g.nearest, g.position[lane]), g.farthest = std::max(g.farthest, g.position[lane]);
        const std::int64_t place = ((task.b * a.heads + task.h) * a.group + g.head[lane]) * a.queries + g.query[lane];
        g.unit[lane] = a.q_unit[place], g.mean[lane] = a.mean_logit ? a.mean_logit[place] : 0.0f;
        const std::int8_t* q = a.q + place * head_dim;
        std::int32_t sum = 0;
        for (int c = 0; c < head_dim; ++c) sum += q[c];
        g.q_sum[lane] = sum;
        for (int quad = 0; quad < head_dim / 4; ++quad) std::memcpy(g.q[quad][lane], q + 4 * quad, 4);
        g.peak[lane] = -std::numeric_limits<float>::infinity(), g.total[lane] = 0.0f;
    }
    fill(g.out[0], static_cast<std::int64_t>(head_dim) * kQueryLanes, 0.0f);
}

template <class Level>
inline void group_over_block(const Job& job, const Level& level, std::int64_t block, Group& g, ManyScratch& s) {
    bool none;
    const bool all = sees_all(job.a, job.b, block, g, s.work, none);
    if (none) return;
    const int head_dim = static_cast<int>(job.a.head_dim);
    lane_scores(s.block, g, head_dim, s.work);
    F peak[kQueryVectors];
    group_logits(job, block, s.scales, g, s.work, !all, peak);
    const bool shrinks = group_weights(level, s.scales, g, s.work, peak);
    lane_outputs(s.block, g, head_dim, s.work, shrinks);
}

template <class Level>
inline void run_many_rows(const AttendArgs& a, const Task& task, const Level& level, ManyScratch& scratch,
                          Running& state) {
    static thread_local Buffer<Group> groups;
    const Job job{a, task.b, task.h};
    const int head_dim = static_cast<int>(a.head_dim);
    const int rows = static_cast<int>((task.last_query - task.first_query) * a.group);
    const int count = (rows + kQueryLanes - 1) / kQueryLanes;
    groups.hold(count);
    for (int n = 0; n < count; ++n) start_group(a, task, n * kQueryLanes, rows, groups[n]);
    const Tiles tiles(head_dim);
    for (std::int64_t block = task.first_block; block < task.last_block; ++block) {
        if (!task_sees(a, task, block)) continue;
        if (is_page(a, task.b, block)) {
            const PageHead page = page_of(a, task.b, task.h, block);
            read_scales(scratch.scales, page);
            lane_operand(scratch.block, page, head_dim);
        } else {
            const OpenBlock open = open_block(a, task.b, task.h, block);
            read_scales(scratch.scales, open);
            lane_operand(scratch.block, open, head_dim);
        }
        for (int n = 0; n < count; ++n) group_over_block(job, level, block, groups[n], scratch);
    }
    for (int row = 0; row < rows; ++row) {
        const Group& g = groups[row / kQueryLanes];
        const int lane = row % kQueryLanes;
        state.peak[row] = g.peak[lane], state.total[row] = g.total[lane];
        float* out = state.out + static_cast<std::size_t>(row) * state.wide;
        for (int c = 0; c < head_dim; ++c) out[c] = g.out[c][lane];
    }
}
