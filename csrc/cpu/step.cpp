#include "step.h"

#include <cstring>
#include <vector>

#include "dispatch.h"

namespace turbo {
namespace {

// What a step works on; kept by each thread, so that no step asks for memory.
struct Workspace {
    std::vector<std::int64_t> none, ends, after, first, valid;
    std::vector<std::int8_t> codes[2];
    std::vector<float> scales[2], open_scales[2];
};

template <class T>
T* room(std::vector<T>& memory, std::int64_t count) {
    if (memory.size() < static_cast<std::size_t>(count)) memory.resize(count);
    return memory.data();
}

bool quantize_side(const Kernels& kernels, const StepArgs& s, Workspace& w, int side) {
    const AttendArgs& a = s.attend;
    const std::int64_t rows = a.batch * a.heads * s.tokens;
    TokenArgs t{};
    t.batch = a.batch, t.heads = a.heads, t.head_dim = a.head_dim, t.rotate = a.rotate;
    t.x = side ? s.v : s.k;
    t.begin = t.target = w.none.data(), t.end = w.ends.data(), t.first = s.before;
    t.mean = side ? nullptr : a.mean, t.mean_from = s.mean_from;
    t.codes = room(w.codes[side], rows * a.head_dim), t.scales = room(w.scales[side], rows);
    t.batch_rows = a.heads * s.tokens, t.head_rows = s.tokens;
    bool fine = true;
    for (std::int64_t i = 0; i < a.batch * a.heads; ++i)
        fine &= kernels.quantize_tokens(t, i / a.heads, i % a.heads, 0, s.tokens);
    return fine;
}

// The new rows behind the buffered ones, and every scale of the buffer as float32.
void fill_buffer(const StepArgs& s, Workspace& w, AttendArgs& a) {
    for (int side = 0; side < 2; ++side) {
        float* wide = room(w.open_scales[side], a.batch * a.heads * s.capacity);
        for (std::int64_t b = 0; b < a.batch; ++b) {
            const std::int64_t open = s.before[b] - a.start[b];
            for (std::int64_t h = 0; h < a.heads; ++h) {
                const std::int64_t i = b * a.heads + h, row = i * s.capacity + open;
                if (s.tokens)
                    std::memcpy(s.codes[side] + row * a.head_dim, w.codes[side].data() + i * s.tokens * a.head_dim,
                                static_cast<std::size_t>(s.tokens * a.head_dim));
                for (std::int64_t t = 0; t < s.tokens; ++t) {
                    std::uint32_t bits;
                    std::memcpy(&bits, &w.scales[side][i * s.tokens + t], 4);
                    s.scales[side][row + t] = static_cast<std::uint16_t>(bits >> 16);  // 4 mantissa bits: exact
                }
                for (std::int64_t t = 0; t < open + s.tokens; ++t) {
                    const std::uint32_t bits = static_cast<std::uint32_t>(s.scales[side][i * s.capacity + t]) << 16;
                    std::memcpy(wide + i * s.capacity + t, &bits, 4);
                }
            }
        }
        a.open[side] = s.codes[side], a.open_scale[side] = wide;
    }
    a.open_stride_head = s.capacity, a.open_stride_batch = a.heads * s.capacity;
}

// The buffer as it was: rows past a sequence's length are zero.
void clear_new_rows(const StepArgs& s) {
    const AttendArgs& a = s.attend;
    for (int side = 0; side < 2; ++side)
        for (std::int64_t i = 0; i < a.batch * a.heads; ++i) {
            const std::int64_t row = i * s.capacity + s.before[i / a.heads] - a.start[i / a.heads];
            std::memset(s.codes[side] + row * a.head_dim, 0, static_cast<std::size_t>(s.tokens * a.head_dim));
            std::memset(s.scales[side] + row, 0, 2 * static_cast<std::size_t>(s.tokens));
        }
}

}  // namespace

int run_step(const StepArgs& s) {
    static thread_local Workspace w;
    const Kernels& kernels = turbo::kernels();
    AttendArgs a = s.attend;
    w.none.assign(a.batch, 0), w.ends.assign(a.batch, s.tokens), w.valid.assign(a.batch, a.queries);
    w.after.resize(a.batch), w.first.resize(a.batch);
    for (std::int64_t b = 0; b < a.batch; ++b) {
        w.after[b] = s.before[b] + s.tokens;
        w.first[b] = w.after[b] - a.queries;
    }
    a.lengths = w.after.data(), a.first_position = w.first.data(), a.valid_rows = w.valid.data();
    std::atomic<std::int32_t> unfit{0};
    a.unfit = &unfit;
    if (s.tokens && !quantize_side(kernels, s, w, 0)) return 2;
    if (s.tokens && !quantize_side(kernels, s, w, 1)) return 3;
    fill_buffer(s, w, a);
    kernels.attend(a);
    if (unfit) {
        clear_new_rows(s);
        return 1;
    }
    return 0;
}

}  // namespace turbo
