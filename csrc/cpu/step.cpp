#include "step.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "dispatch.h"

namespace turbo {
namespace {

constexpr std::size_t kKeptBytes = 1 << 20;

// Temporary memory of a step, kept per thread to avoid allocations.
struct Workspace {
    std::vector<std::int64_t> after, first, valid, held;  // [B]; held: tokens in the buffer
    std::vector<std::int8_t> codes[2];
    std::vector<float> scales[2];
};

// Frees the memory of a long prompt.
struct Release {
    Workspace& w;
    ~Release() {
        if (w.codes[0].size() > kKeptBytes) w = {};
    }
};

template <class T>
T* room(std::vector<T>& memory, std::int64_t count) {
    if (memory.size() < static_cast<std::size_t>(count)) memory.resize(count);
    return memory.data();
}

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

// Scales of the buffer, `count` from `at` on: bfloat16, or float32 if they are universal.
void read_scales(const StepArgs& step, int side, std::int64_t at, std::int64_t count, float* to) {
    if (step.store.universal[side]) {
        std::memcpy(to, static_cast<const float*>(step.scales[side]) + at, sizeof(float) * count);
        return;
    }
    const auto* narrow = static_cast<const std::uint16_t*>(step.scales[side]) + at;
    for (std::int64_t t = 0; t < count; ++t) to[t] = widened(narrow[t]);
}

void write_scales(const StepArgs& step, int side, std::int64_t at, std::int64_t count, const float* from) {
    if (step.store.universal[side]) {
        std::memcpy(static_cast<float*>(step.scales[side]) + at, from, sizeof(float) * count);
        return;
    }
    auto* narrow = static_cast<std::uint16_t*>(step.scales[side]) + at;
    for (std::int64_t t = 0; t < count; ++t) narrow[t] = narrowed(from[t]);
}

void clear_scales(const StepArgs& step, int side, std::int64_t at, std::int64_t count) {
    const std::int64_t size = step.store.universal[side] ? sizeof(float) : sizeof(std::uint16_t);
    std::memset(static_cast<char*>(step.scales[side]) + at * size, 0, static_cast<std::size_t>(count * size));
}

// Channels of a row of keys or values.
std::int64_t channels(const StoreArgs& s, int side) { return side ? s.value_dim : s.head_dim; }

// The buffer as rows with float32 scales. If blocks fill, a copy with room for all new tokens.
Int8Rows tail_rows(const StepArgs& step, Workspace& w) {
    const StoreArgs& s = step.store;
    Int8Rows rows = s.tail;
    rows.head_rows = s.fresh ? step.capacity + s.tokens : step.capacity, rows.batch_rows = s.heads * rows.head_rows;
    const std::int64_t tiles = s.batch * s.heads;
    for (int side = 0; side < 2; ++side) {
        const std::int64_t width = channels(s, side);
        float* scales = rows.scales[side] = room(w.scales[side], tiles * rows.head_rows);
        rows.codes[side] = s.fresh ? room(w.codes[side], tiles * rows.head_rows * width) : step.codes[side];
        for (std::int64_t i = 0; i < tiles; ++i) {
            const std::int64_t held = w.held[i / s.heads], from = i * step.capacity, to = i * rows.head_rows;
            if (s.fresh)
                std::memcpy(rows.codes[side] + to * width, step.codes[side] + from * width,
                            static_cast<std::size_t>(held * width));
            read_scales(step, side, from, held, scales + to);
        }
    }
    return rows;
}

// Keeps the rows after the blocks that filled in the buffer, with their scales; clears the rest.
void keep_rows(const StepArgs& step, const Workspace& w, const Int8Rows& rows) {
    const StoreArgs& s = step.store;
    for (int side = 0; side < 2; ++side) {
        const std::int64_t width = channels(s, side);
        for (std::int64_t i = 0; i < s.batch * s.heads; ++i) {
            const std::int64_t held = w.held[i / s.heads];
            const std::int64_t filled = s.fresh ? (held + s.tokens) / kBlock * kBlock : 0;
            const std::int64_t left = held + s.tokens - filled, from = i * rows.head_rows + filled;
            std::int8_t* codes = step.codes[side] + i * step.capacity * width;
            if (s.fresh) std::memcpy(codes, rows.codes[side] + from * width, static_cast<std::size_t>(left * width));
            write_scales(step, side, i * step.capacity, left, rows.scales[side] + from);
            if (left >= held) continue;
            std::memset(codes + left * width, 0, static_cast<std::size_t>((held - left) * width));
            clear_scales(step, side, i * step.capacity + left, held - left);
        }
    }
}

// Clears what `quantize_new` wrote to the buffer itself.
void clear_new_rows(const StepArgs& step, const Workspace& w) {
    const StoreArgs& s = step.store;
    if (s.fresh) return;
    for (int side = 0; side < 2; ++side)
        for (std::int64_t i = 0; i < s.batch * s.heads; ++i) {
            const std::int64_t row = i * step.capacity + w.held[i / s.heads], width = channels(s, side);
            std::memset(step.codes[side] + row * width, 0, static_cast<std::size_t>(s.tokens * width));
        }
}

// Positions of the step's rows.
void set_positions(const StoreArgs& s, AttendArgs& a, Workspace& w) {
    w.after.resize(s.batch), w.first.resize(s.batch), w.held.resize(s.batch), w.valid.assign(s.batch, a.queries);
    for (std::int64_t b = 0; b < s.batch; ++b) {
        w.after[b] = s.before[b] + s.tokens;
        w.first[b] = w.after[b] - a.queries;
        w.held[b] = s.before[b] - s.tail.start[b];
    }
    a.lengths = w.after.data(), a.first_position = w.first.data(), a.valid_rows = w.valid.data();
}

}  // namespace

NonFinite run_step(const StepArgs& step) {
    static thread_local Workspace w;
    const Release release{w};
    const Kernels& kernels = turbo::kernels();
    AttendArgs a = step.attend;
    StoreArgs s = step.store;
    set_positions(s, a, w);
    a.tail = s.tail = tail_rows(step, w);
    NonFinite non_finite = s.tokens ? quantize_new(kernels, s) : kAllFinite;
    if (non_finite == kAllFinite && a.queries) {
        std::atomic<std::int32_t> queries{0};
        a.non_finite = &queries;
        kernels.attend(a);
        if (queries) non_finite = kNonFiniteQuery;
    }
    if (non_finite != kAllFinite) {
        clear_new_rows(step, w);
        return non_finite;
    }
    if (s.tokens) {  // otherwise other threads may be reading the same buffer
        fill_pages(kernels, s);
        keep_rows(step, w, s.tail);
    }
    return kAllFinite;
}

}  // namespace turbo
