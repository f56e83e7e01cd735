// A task: query rows of one KV head over a range of blocks; and the addresses of these blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../isa.h"
#include "arguments.h"
#include "page.h"
#include "tail_block.h"
#include "visibility.h"

namespace turbo::TURBO_ISA {

struct Task {
    std::int64_t b, h;
    std::int64_t first_query, last_query;  // exclusive; of every query head of the group
    std::int64_t first_block, last_block;
};

// Tasks of up to this many rows read pages in packed form (decode); larger ones unpack them to INT8 once (prefill).
constexpr int kMaxDecodeRows = 16;

inline PageHead page_of(const AttendArgs& a, std::int64_t b, std::int64_t h, std::int64_t block) {
    const auto* page = reinterpret_cast<const std::uint8_t*>(a.pages[b * a.page_stride + block]);
    return {page, block < a.sink_blocks ? &a.sinks : &a.compressed, h};
}

inline TailBlock tail_block(const AttendArgs& a, std::int64_t b, std::int64_t h, std::int64_t block) {
    const std::int64_t at = a.tail.row(b, h, block * kBlock);
    return {a.tail.codes[0] + at * a.head_dim, a.tail.codes[1] + at * a.value_dim, a.tail.scales[0] + at,
            a.tail.scales[1] + at, static_cast<int>(std::min<std::int64_t>(kBlock, a.lengths[b] - block * kBlock))};
}

// Whether any row of the task sees keys of the page of a block, or of its tail rows.
inline bool task_sees(const AttendArgs& a, const Task& task, std::int64_t block, bool page) {
    if (page && !(is_page(a, task.b, block) && a.pages[task.b * a.page_stride + block])) return false;  // evicted
    if (!page && !in_tail(a, task.b, block)) return false;
    const std::int64_t first = a.first_position[task.b] + task.first_query;
    const std::int64_t last = a.first_position[task.b] + task.last_query - 1;
    for (std::int64_t position = first; position <= last; ++position)
        if (!visible_keys(a, task.b, position, block, page).none()) return true;
    return false;
}

}  // namespace turbo::TURBO_ISA
