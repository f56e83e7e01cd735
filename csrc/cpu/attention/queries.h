// Query rows as INT8: stage 1 where they are used, or as given.
#pragma once

struct QueryRow {
    float unit, mean_logit;
    std::int32_t sum;  // of the codes
};

inline bool has_mean(const AttendArgs& a) { return a.q.data ? a.mean != nullptr : a.q_mean_logit != nullptr; }

// Query i of query head g of KV head h, its D codes to `codes`.
inline QueryRow take_query(const AttendArgs& a, std::int64_t b, std::int64_t h, std::int64_t g, std::int64_t i,
                           std::int8_t* codes) {
    const int head_dim = static_cast<int>(a.head_dim);
    const std::int64_t head = h * a.group + g;
    QueryRow row{0.0f, 0.0f, 0};
    if (a.q.data) {
        static const Signs signs;
        alignas(64) float x[kMaxHeadDim];
        load_row(a.q, row_offset(a.q, b, head, i), head_dim, x);
        if (peak_bits(x, head_dim) > bits_of(kLargest)) {
            a.unfit->store(1, std::memory_order_relaxed);
            fill(x, head_dim, 0.0f);
        }
        if (a.rotate_keys) rotate_row(x, head_dim, signs);
        if (a.order) reorder_row(x, head_dim, a.order + h * head_dim);
        const float scale = safe_scale(float_of(peak_bits(x, head_dim)) / kCodeMax);
        quantize_row(x, head_dim, scale, codes);
        row.unit = scale * static_cast<float>(a.scale);
        if (a.mean)
            row.mean_logit = static_cast<float>(a.scale * dot_row(x, a.mean + (b * a.heads + h) * head_dim, head_dim));
    } else {
        const std::int64_t at = (b * a.heads * a.group + head) * a.queries + i;
        std::memcpy(codes, a.q_codes + at * head_dim, head_dim);
        row.unit = a.q_unit[at];
        if (a.q_mean_logit) row.mean_logit = a.q_mean_logit[at];
    }
    for (int c = 0; c < head_dim; ++c) row.sum += codes[c];
    return row;
}
