#include "step.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace turbo {
namespace {

constexpr std::int64_t kBlock = 64;
// Waking threads costs as much as a few hundred rows.
constexpr std::int64_t kRowsWorthThreads = 256;

// Temporary memory of a step, kept per thread to avoid allocations.
struct Workspace {
    std::vector<std::int64_t> none, ends, after, first, valid, open;
    std::vector<std::int8_t> codes[2];
    std::vector<float> scales[2], open_scales[2];
};

template <class T>
T* room(std::vector<T>& memory, std::int64_t count) {
    if (memory.size() < static_cast<std::size_t>(count)) memory.resize(count);
    return memory.data();
}

// Channels of a row of keys or values.
std::int64_t channels(const AttendArgs& a, std::int64_t side) { return side ? a.value_dim : a.head_dim; }

float widened(std::uint16_t scale) {
    const std::uint32_t bits = static_cast<std::uint32_t>(scale) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

std::uint16_t narrowed(float scale) {  // 4 mantissa bits: exact
    std::uint32_t bits;
    std::memcpy(&bits, &scale, 4);
    return static_cast<std::uint16_t>(bits >> 16);
}

// Quantizes the new tokens to rows `target[b] + t` of tiles with `head_rows` rows per head. Returns 0, or 2 or 3 if k
// or v is not finite.
int quantize(const Kernels& kernels, const StepArgs& s, Workspace& w, const std::int64_t* target,
             std::int64_t head_rows) {
    const AttendArgs& a = s.attend;
    const std::int64_t tiles = a.batch * a.heads;
    TokenArgs sides[2] = {};
    for (int side = 0; side < 2; ++side) {
        TokenArgs& t = sides[side];
        t.batch = a.batch, t.heads = a.heads, t.head_dim = channels(a, side);
        t.rotate = a.rotate;
        t.x = side ? s.v : s.k;
        t.begin = w.none.data(), t.end = w.ends.data(), t.first = s.before, t.target = target;
        t.mean = side ? nullptr : a.mean, t.mean_from = s.mean_from;
        t.codes = room(w.codes[side], tiles * head_rows * channels(a, side));
        t.scales = room(w.scales[side], tiles * head_rows);
        t.batch_rows = a.heads * head_rows, t.head_rows = head_rows;
    }
    std::atomic<bool> fine[2] = {true, true};
    const bool alone = 2 * tiles * s.tokens < kRowsWorthThreads;
    parallel_for(2 * tiles, alone ? 1 : static_cast<int>(a.threads), [&](std::int64_t i) {
        const std::int64_t side = i / tiles, tile = i % tiles;
        if (!kernels.quantize_tokens(sides[side], tile / a.heads, tile % a.heads, 0, s.tokens)) fine[side] = false;
    });
    return fine[0] ? (fine[1] ? 0 : 3) : 2;
}

// Appends the new rows to the buffer, and converts the scales of the buffer to float32.
void fill_buffer(const StepArgs& s, Workspace& w, AttendArgs& a) {
    for (int side = 0; side < 2; ++side) {
        float* wide = room(w.open_scales[side], a.batch * a.heads * s.capacity);
        const std::int64_t width = channels(a, side);
        for (std::int64_t i = 0; i < a.batch * a.heads; ++i) {
            const std::int64_t open = w.open[i / a.heads], row = i * s.capacity + open;
            if (s.tokens)
                std::memcpy(s.codes[side] + row * width, w.codes[side].data() + i * s.tokens * width,
                            static_cast<std::size_t>(s.tokens * width));
            for (std::int64_t t = 0; t < s.tokens; ++t)
                s.scales[side][row + t] = narrowed(w.scales[side][i * s.tokens + t]);
            for (std::int64_t t = 0; t < open + s.tokens; ++t)
                wide[i * s.capacity + t] = widened(s.scales[side][i * s.capacity + t]);
        }
        a.open[side] = s.codes[side], a.open_scale[side] = wide;
    }
    a.open_stride_head = s.capacity, a.open_stride_batch = a.heads * s.capacity;
}

// Undoes fill_buffer: rows past a sequence's length are zero.
void clear_new_rows(const StepArgs& s, const Workspace& w) {
    const AttendArgs& a = s.attend;
    for (int side = 0; side < 2; ++side)
        for (std::int64_t i = 0; i < a.batch * a.heads; ++i) {
            const std::int64_t row = i * s.capacity + w.open[i / a.heads], width = channels(a, side);
            std::memset(s.codes[side] + row * width, 0, static_cast<std::size_t>(s.tokens * width));
            std::memset(s.scales[side] + row, 0, 2 * static_cast<std::size_t>(s.tokens));
        }
}

// Copies the buffered rows into the tiles of `head_rows` rows, before the new ones, which are already there.
void open_tiles(const StepArgs& s, Workspace& w, AttendArgs& a, std::int64_t head_rows) {
    for (int side = 0; side < 2; ++side) {
        for (std::int64_t i = 0; i < a.batch * a.heads; ++i) {
            const std::int64_t open = w.open[i / a.heads], from = i * s.capacity, to = i * head_rows;
            const std::int64_t width = channels(a, side);
            std::memcpy(w.codes[side].data() + to * width, s.codes[side] + from * width,
                        static_cast<std::size_t>(open * width));
            for (std::int64_t t = 0; t < open; ++t) w.scales[side][to + t] = widened(s.scales[side][from + t]);
        }
        a.open[side] = w.codes[side].data(), a.open_scale[side] = w.scales[side].data();
    }
    a.open_stride_head = head_rows, a.open_stride_batch = a.heads * head_rows;
}

// Compresses the first block of each tile into its page, if it is full, and copies the other rows to the buffer.
void store_tiles(const Kernels& kernels, const StepArgs& s, Workspace& w, std::int64_t head_rows) {
    const AttendArgs& a = s.attend;
    const std::int64_t tiles = a.batch * a.heads;
    for (std::int64_t b = 0; b < a.batch; ++b)
        if (s.fresh[b]) std::memset(reinterpret_cast<void*>(s.fresh[b]), 0, static_cast<std::size_t>(s.page_bytes));
    parallel_for(2 * tiles, static_cast<int>(a.threads), [&](std::int64_t i) {
        const std::int64_t side = i / tiles, tile = i % tiles, b = tile / a.heads, first = tile * head_rows;
        const std::int64_t width = channels(a, side);
        const bool fills = s.fresh[b] != 0;
        if (fills) {
            PageArgs p{};
            p.pages = 1, p.heads = a.heads, p.head_dim = a.head_dim, p.value_dim = a.value_dim;
            p.block = kBlock, p.head_rows = head_rows;
            p.page_bytes = s.page_bytes, p.search = s.search, p.plan = a.compressed;
            p.order = a.order, p.rotated = a.rotate;
            p.bytes = reinterpret_cast<std::uint8_t*>(s.fresh[b]);
            p.codes[side] = w.codes[side].data() + b * a.heads * head_rows * width;
            p.scales[side] = w.scales[side].data() + b * a.heads * head_rows;
            kernels.encode_head(p, 0, tile % a.heads, side);
        }
        const std::int64_t skipped = fills ? kBlock : 0, held = w.open[b], left = held + s.tokens - skipped;
        std::int8_t* codes = s.codes[side] + tile * s.capacity * width;
        std::uint16_t* scales = s.scales[side] + tile * s.capacity;
        std::memcpy(codes, w.codes[side].data() + (first + skipped) * width, static_cast<std::size_t>(left * width));
        for (std::int64_t t = 0; t < left; ++t) scales[t] = narrowed(w.scales[side][first + skipped + t]);
        for (std::int64_t t = left; t < held; ++t) {
            std::memset(codes + t * width, 0, static_cast<std::size_t>(width));
            scales[t] = 0;
        }
    });
}

}  // namespace

int run_step(const StepArgs& s) {
    static thread_local Workspace w;
    const Kernels& kernels = turbo::kernels();
    AttendArgs a = s.attend;
    w.none.assign(a.batch, 0), w.ends.assign(a.batch, s.tokens), w.valid.assign(a.batch, a.queries);
    w.after.resize(a.batch), w.first.resize(a.batch), w.open.resize(a.batch);
    for (std::int64_t b = 0; b < a.batch; ++b) {
        w.after[b] = s.before[b] + s.tokens;
        w.first[b] = w.after[b] - a.queries;
        w.open[b] = s.before[b] - a.start[b];
    }
    a.lengths = w.after.data(), a.first_position = w.first.data(), a.valid_rows = w.valid.data();
    std::atomic<std::int32_t> unfit{0};
    a.unfit = &unfit;
    const std::int64_t head_rows = s.fresh ? s.capacity + s.tokens : s.tokens;
    if (s.tokens) {
        const int bad = quantize(kernels, s, w, s.fresh ? w.open.data() : w.none.data(), head_rows);
        if (bad) return bad;
    }
    if (s.fresh) {
        open_tiles(s, w, a, head_rows);
    } else {
        fill_buffer(s, w, a);
    }
    if (a.queries) kernels.attend(a);
    if (unfit && !s.fresh) clear_new_rows(s, w);
    if (unfit) return 1;
    if (s.fresh) store_tiles(kernels, s, w, head_rows);
    return 0;
}

}  // namespace turbo
