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

std::int64_t blocks_before(std::int64_t tokens) { return tokens / kBlock; }

// Row of `position` in a sequence's open rows.
std::int64_t row_of(const StoreArgs& s, std::int64_t b, std::int64_t position) {
    return s.ring ? position % s.ring : position - blocks_before(s.before[b]) * kBlock;
}

// Quantizes the new tokens of every sequence. Returns 0, or 1 or 2 if k or v is not finite.
int quantize(const Kernels& kernels, const StoreArgs& s) {
    std::atomic<bool> fine[2] = {true, true};
    const std::int64_t heads = 2 * s.heads, parts = (s.tokens + kBlock - 1) / kBlock + 1;
    const bool alone = s.batch * heads * s.tokens < kRowsWorthThreads;
    parallel_for(s.batch * heads * parts, alone ? 1 : static_cast<int>(s.threads), [&](std::int64_t i) {
        // A part lies within one block, where rows of a ring are contiguous.
        const std::int64_t part = i % parts, side = i / parts % 2, h = i / parts / 2 % s.heads, b = i / parts / heads;
        const std::int64_t block = (blocks_before(s.before[b]) + part) * kBlock;
        const std::int64_t from = std::max(block, s.before[b]);
        const std::int64_t to = std::min(block + kBlock, s.before[b] + s.tokens);
        if (from >= to) return;
        const std::int64_t begin = from - s.before[b], target = s.open_rows[b] + row_of(s, b, from) - begin;
        TokenArgs t{};
        t.batch = 1, t.heads = s.heads, t.head_dim = s.head_dim, t.rotate = s.rotate;
        t.x = side ? s.v : s.k;
        t.x.starts += b;  // the kernel is called for a batch of one sequence
        t.first = &s.before[b], t.target = &target;
        t.mean = side ? nullptr : s.mean, t.mean_from = 0;
        t.codes = s.codes[side], t.scales = s.scales[side], t.batch_rows = 0, t.head_rows = s.head_rows;
        if (!kernels.quantize_tokens(t, 0, h, begin, to - s.before[b])) fine[side] = false;
    });
    return fine[0] ? (fine[1] ? 0 : 2) : 1;
}

// Compresses every block that is now full into its page.
void fill_pages(const Kernels& kernels, const StoreArgs& s) {
    struct Filled {
        std::int64_t b, block;
    };
    std::vector<Filled> filled;
    for (std::int64_t b = 0; b < s.batch; ++b)
        for (std::int64_t block = blocks_before(s.before[b]); block < blocks_before(s.before[b] + s.tokens); ++block)
            filled.push_back({b, block});
    const auto page_of = [&](const Filled& f) {
        return reinterpret_cast<std::uint8_t*>(s.pages[f.b * s.page_stride + f.block]);
    };
    for (const Filled& f : filled) std::memset(page_of(f), 0, static_cast<std::size_t>(s.page_bytes));
    const std::int64_t each = 2 * s.heads;
    parallel_for(static_cast<std::int64_t>(filled.size()) * each, static_cast<int>(s.threads), [&](std::int64_t i) {
        const Filled& f = filled[i / each];
        const std::int64_t side = i % 2, h = i / 2 % s.heads;
        const std::int64_t first = s.open_rows[f.b] + row_of(s, f.b, f.block * kBlock);
        PageArgs p{};
        p.pages = 1, p.heads = s.heads, p.head_dim = p.value_dim = s.head_dim, p.block = kBlock,
        p.head_rows = s.head_rows;
        p.page_bytes = s.page_bytes, p.search = s.search, p.plan = s.plan, p.bytes = page_of(f);
        p.codes[side] = s.codes[side] + first * s.head_dim;
        p.scales[side] = s.scales[side] + first;
        kernels.encode_head(p, 0, h, side);
    });
}

}  // namespace

int store(const StoreArgs& s) {
    const Kernels& kernels = turbo::kernels();
    const int bad = quantize(kernels, s);
    if (!bad) fill_pages(kernels, s);
    return bad;
}

}  // namespace turbo
