#include "store.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace turbo {
namespace {

// Waking threads costs as much as a few hundred rows.
constexpr std::int64_t kRowsWorthThreads = 256;

FloatRows of_sequence(FloatRows rows, std::int64_t b) {
    if (rows.starts) {
        rows.starts += b;
    } else {
        const std::int64_t bytes = rows.kind == kFloat32 ? 4 : 2;
        rows.data = static_cast<char*>(rows.data) + b * rows.batch_stride * bytes;
    }
    return rows;
}

}  // namespace

NonFinite quantize_new(const Kernels& kernels, const StoreArgs& s) {
    std::atomic<bool> finite[2] = {true, true};
    const std::int64_t heads = 2 * s.heads, parts = (s.tokens + kBlock - 1) / kBlock + 1;
    const bool alone = s.batch * heads * s.tokens < kRowsWorthThreads;
    parallel_for(s.batch * heads * parts, alone ? 1 : static_cast<int>(s.threads), [&](std::int64_t i) {
        // A part lies within one block, where rows of a ring are contiguous.
        const std::int64_t part = i % parts, side = i / parts % 2, h = i / parts / 2 % s.heads, b = i / parts / heads;
        const std::int64_t before = s.before[b], block = (before / kBlock + part) * kBlock;
        const std::int64_t from = std::max(block, before), to = std::min(block + kBlock, before + s.tokens);
        if (from >= to) return;
        const std::int64_t begin = from - before, target = s.tail.row(b, 0, from) - begin;
        TokenArgs t{};  // for this sequence
        t.batch = 1, t.heads = s.heads, t.head_dim = side ? s.value_dim : s.head_dim, t.rotate = s.rotate;
        t.x = of_sequence(side ? s.v : s.k, b);
        t.first = &before, t.target = &target;
        t.mean = side || !s.mean ? nullptr : s.mean + b * s.heads * s.head_dim, t.mean_from = s.mean_from;
        t.given_scale = s.universal[side] ? s.universal[side] + b * s.heads : nullptr;
        t.codes = s.tail.codes[side], t.scales = s.tail.scales[side], t.head_rows = s.tail.head_rows;
        if (!kernels.quantize_tokens(t, 0, h, begin, to - before)) finite[side] = false;
    });
    return finite[0] ? (finite[1] ? kAllFinite : kNonFiniteValue) : kNonFiniteKey;
}

void fill_pages(const Kernels& kernels, const StoreArgs& s) {
    if (!s.fresh) return;
    struct Filled {
        std::int64_t b, position;
        std::uint8_t* page;
        bool sink;
    };
    std::vector<Filled> filled;
    for (std::int64_t b = 0; b < s.batch; ++b)
        for (std::int64_t block = 0; block < s.fresh_blocks; ++block)
            if (auto* page = reinterpret_cast<std::uint8_t*>(s.fresh[b * s.fresh_blocks + block])) {
                const std::int64_t position = s.tail.start[b] + block * kBlock;
                filled.push_back({b, position, page, position < s.sink_blocks * kBlock});
            }
    for (const Filled& f : filled)
        std::memset(f.page, 0, static_cast<std::size_t>(f.sink ? s.sink_bytes : s.page_bytes));
    const std::int64_t each = 2 * s.heads;
    parallel_for(static_cast<std::int64_t>(filled.size()) * each, static_cast<int>(s.threads), [&](std::int64_t i) {
        const Filled& f = filled[i / each];
        const std::int64_t side = i % 2, h = i / 2 % s.heads, first = s.tail.row(f.b, 0, f.position);
        PageArgs p{};
        p.pages = 1, p.heads = s.heads, p.head_dim = s.head_dim, p.value_dim = s.value_dim;
        p.block = kBlock, p.head_rows = s.tail.head_rows;
        p.page_bytes = f.sink ? s.sink_bytes : s.page_bytes, p.layout = f.sink ? s.sinks : s.layout, p.bytes = f.page;
        p.order = f.sink ? nullptr : s.order, p.search = s.search, p.rotated = s.rotate;
        p.codes[side] = s.tail.codes[side] + first * (side ? s.value_dim : s.head_dim);
        p.scales[side] = s.tail.scales[side] + first;
        kernels.encode_head(p, 0, h, side);
    });
}

NonFinite store(const StoreArgs& s) {
    const Kernels& kernels = turbo::kernels();
    const NonFinite non_finite = quantize_new(kernels, s);
    if (non_finite == kAllFinite) fill_pages(kernels, s);
    return non_finite;
}

}  // namespace turbo
