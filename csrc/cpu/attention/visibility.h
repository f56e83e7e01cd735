// Which keys of a block a query sees: lengths, causality, window; and masks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../isa.h"
#include "../quantize/convert.h"
#include "arguments.h"

namespace turbo::TURBO_ISA {

struct VisibleKeys {  // the keys of a block that a row sees: low <= t < high
    int low, high;
    bool all() const { return low == 0 && high == kBlock; }
    bool none() const { return low >= high; }
};

inline bool is_page(const AttendArgs& a, std::int64_t b, std::int64_t block) { return block < a.page_counts[b]; }

inline bool in_tail(const AttendArgs& a, std::int64_t b, std::int64_t block) {
    return block >= a.page_counts[b] || (a.stored && a.tail.codes[0] && block * kBlock >= a.tail.start[b]);
}

// The keys of the page of a block, or of its tail rows, that a query at `position` sees.
inline VisibleKeys visible_keys(const AttendArgs& a, std::int64_t b, std::int64_t position, std::int64_t block,
                                bool page) {
    const std::int64_t first = block * kBlock;
    const bool later = position >= first + kBlock;
    if (page != later && is_page(a, b, block) && in_tail(a, b, block)) return {0, 0};
    std::int64_t low = 0, high = std::min<std::int64_t>(kBlock, a.lengths[b] - first);
    if (a.causal) high = std::min(high, position + 1 - first);
    if (a.window) {
        low = std::max<std::int64_t>(0, position - a.window + 1 - first);
        if (!a.causal) high = std::min(high, position + a.window - first);
    }
    return {static_cast<int>(std::min<std::int64_t>(low, kBlock)), static_cast<int>(std::max<std::int64_t>(high, 0))};
}

// The 64 mask values of a query row for a block, as numbers to add to logits.
inline void mask_values(const AttendArgs& a, std::int64_t b, std::int64_t head, std::int64_t query, std::int64_t block,
                        float* out) {
    const std::int64_t at = b * a.mask_stride[0] + head * a.mask_stride[1] + query * a.mask_stride[2];
    const float unseen = -std::numeric_limits<float>::infinity();
    for (int t = 0; t < kBlock; ++t) {
        // Keys beyond the mask are beyond every length, too.
        const std::int64_t key = at + std::min(block * kBlock + t, a.mask_keys - 1) * a.mask_stride[3];
        switch (a.mask_kind) {
            case 1: out[t] = static_cast<const std::uint8_t*>(a.mask)[key] ? 0.0f : unseen; break;
            case 2: out[t] = static_cast<const float*>(a.mask)[key]; break;
            case 3:
                out[t] = float_of(static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(a.mask)[key]) << 16);
                break;
            default: out[t] = float_from_half(static_cast<const std::uint16_t*>(a.mask)[key]);
        }
    }
}

// The same for a boolean mask: 1 if it shows a key, else 0.
inline void mask_shows(const AttendArgs& a, std::int64_t b, std::int64_t head, std::int64_t query, std::int64_t block,
                       std::int32_t* out) {
    alignas(64) float mask[kBlock];
    mask_values(a, b, head, query, block, mask);
    for (int t = 0; t < kBlock; ++t) out[t] = mask[t] == 0.0f;
}

// Whether the softmax may stay in fixed point from integer products to weights. With `stored`, results must not depend
// on tokens that a query does not see, but the largest scale of a block does.
inline bool fixed_point(const AttendArgs& a) {
    return a.scale > 0 && !(a.softcap > 0) && a.mask_kind <= 1 && !a.stored && !a.by_tile;
}

struct Job {  // KV head h of sequence b
    const AttendArgs& a;
    std::int64_t b, h;
};

}  // namespace turbo::TURBO_ISA
