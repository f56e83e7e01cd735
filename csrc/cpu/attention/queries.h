// Query rows as INT8: quantized by stage 1 when a task reads them, or as given.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../isa.h"
#include "../memory.h"
#include "../quantize/rows.h"
#include "arguments.h"
#include "fixed_softmax.h"

namespace turbo::TURBO_ISA {

struct QueryRow {
    float unit, mean_logit;  // of logits, see AttendArgs
    std::int32_t sum;        // of the codes
    std::int32_t shift;      // of products (fixed_softmax.h)
};

inline bool has_mean(const AttendArgs& a) { return a.q.data ? a.mean != nullptr : a.q_mean_logit != nullptr; }

// Whether the mean is subtracted from the keys of a block, and the logit of a query to add back if it is.
inline bool mean_subtracted(const AttendArgs& a, std::int64_t block) {
    return has_mean(a) && block >= a.mean_from_block;
}
inline float mean_logit_of(const AttendArgs& a, const QueryRow& row, std::int64_t block) {
    return mean_subtracted(a, block) ? row.mean_logit : 0.0f;
}

// The order of the channels of K in the compressed pages of a head; null if it is that of INT8 rows.
inline const std::int32_t* order_of(const AttendArgs& a, std::int64_t h) {
    const std::int32_t* order = a.order ? a.order + h * a.head_dim : nullptr;
    return order && *order >= 0 ? order : nullptr;
}

// Which of the two forms of a query a block takes: 0 for INT8 rows, 1 for compressed pages with reordered channels.
inline int form_of(const AttendArgs& a, std::int64_t h, std::int64_t block, bool page) {
    return page && block >= a.sink_blocks && order_of(a, h) ? 1 : 0;
}

inline void quantize_query(const AttendArgs& a, const float* x, std::int8_t* codes, QueryRow& row) {
    const int head_dim = static_cast<int>(a.head_dim);
    const float scale = safe_scale(float_of(max_magnitude_bits(x, head_dim)) / kCodeMax);
    I sum = i_set(0), magnitudes = i_set(0);
    quantize_row(x, head_dim, scale, codes,
                 [&](I code) { sum = sum + code, magnitudes = magnitudes + i_max(code, i_set(0) - code); });
    row.unit = scale * static_cast<float>(a.scale);
    row.sum = i_sum(sum), row.shift = fixed_shift(i_sum(magnitudes));
}

// Query i of query head g of KV head h in the form for INT8 rows and, if the pages of the head have another order, in
// theirs. The mean logit is the same for both: a rotation does not change q . mu.
inline void take_query(const AttendArgs& a, std::int64_t b, std::int64_t h, std::int64_t g, std::int64_t i,
                       std::int8_t* codes, QueryRow& row, std::int8_t* ordered_codes, QueryRow& ordered) {
    const int head_dim = static_cast<int>(a.head_dim);
    const std::int64_t head = h * a.group + g;
    row = ordered = QueryRow{0.0f, 0.0f, 0, 0};
    if (a.q.data) {
        static const Signs signs;
        alignas(64) float x[kMaxHeadDim];
        load_row(a.q, row_offset(a.q, b, head, i), head_dim, x);
        if (max_magnitude_bits(x, head_dim) > bits_of(kLargest)) {
            a.non_finite->store(1, std::memory_order_relaxed);
            fill(x, head_dim, 0.0f);
        }
        if (const std::int32_t* order = order_of(a, h)) {
            alignas(64) float y[kMaxHeadDim];
            for (int c = 0; c < head_dim; ++c) y[c] = x[order[c]];
            quantize_query(a, y, ordered_codes, ordered);
        }
        if (a.rotate) rotate_row(x, head_dim, signs);
        quantize_query(a, x, codes, row);
        if (a.mean) {
            const std::uint16_t* mean = a.mean + (b * a.heads + h) * head_dim;
            alignas(64) float mu[kMaxHeadDim];
            for (int c = 0; c < head_dim; ++c) mu[c] = float_from_bfloat(mean[c]);
            row.mean_logit = static_cast<float>(a.scale * dot_row(x, mu, head_dim));
        }
    } else {
        const std::int64_t at = (b * a.heads * a.group + head) * a.queries + i;
        std::memcpy(codes, a.q_codes + at * head_dim, head_dim);
        row.unit = a.q_unit[at];
        std::int32_t magnitudes = 0;
        for (int c = 0; c < head_dim; ++c) row.sum += codes[c], magnitudes += std::abs(codes[c]);
        row.shift = fixed_shift(magnitudes);
        if (a.q_mean_logit) row.mean_logit = a.q_mean_logit[at];
    }
    ordered.mean_logit = row.mean_logit;
}

}  // namespace turbo::TURBO_ISA
