// Encodes and decodes one head's keys or values of a page (kv/pages.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "../isa.h"
#include "../memory.h"
#include "../widths.h"
#include "convert.h"
#include "interface.h"
#include "packing.h"
#include "progressive.h"
#include "rows.h"

namespace turbo::TURBO_ISA {

constexpr int kTokenScaleShift = 19;

struct HeadScales {
    float head;
    float kept[kMaxBlock];  // the scale of each token, as stored in the page
    std::uint8_t exponents[kMaxBlock];
    bool changed;  // some rows must be requantized to the scale kept
};

// The head's scale and the byte of each token's scale. `used`: scales of rows, 0 for rows of zeros.
inline HeadScales common_scale(const float* used, int tokens, bool by_token) {
    HeadScales s;
    float largest = 0.0f;
    for (int t = 0; t < tokens; ++t) largest = used[t] > largest ? used[t] : largest;
    if (largest == 0.0f) largest = 1.0f;
    const std::uint32_t power = (bits_of(largest) + ((1u << 23) - 1)) >> 23 << 23;
    s.head = by_token ? float_of(power) : largest;
    s.changed = false;
    for (int t = 0; t < tokens; ++t) {
        // The power of two is not below any scale, so the difference is not negative.
        const std::uint32_t steps = by_token ? (power - bits_of(used[t])) >> kTokenScaleShift : 0;
        const std::uint32_t exponent = steps > 255 ? 255 : steps;
        s.exponents[t] = static_cast<std::uint8_t>(exponent);
        s.kept[t] = by_token ? float_of(power - (exponent << kTokenScaleShift)) : largest;
        s.changed |= used[t] > 0.0f && used[t] != s.kept[t];
    }
    return s;
}

// The scale of each row, 0 for rows of zeros.
inline void used_scales(const std::int8_t* codes, const float* scales, int tokens, int head_dim, float* used) {
    for (int t = 0; t < tokens; ++t) {
        std::uint64_t any = 0;
        for (int c = 0; c < head_dim; c += 8) {
            std::uint64_t eight;
            std::memcpy(&eight, codes + static_cast<std::int64_t>(t) * head_dim + c, 8);
            any |= eight;
        }
        used[t] = any ? scales[t] : 0.0f;
    }
}

inline void encode_head(const PageArgs& a, std::int64_t page, std::int64_t head, std::int64_t side) {
    const int tokens = static_cast<int>(a.block), head_dim = static_cast<int>(side == 0 ? a.head_dim : a.value_dim);
    const std::int64_t first_row = (page * a.heads + head) * a.head_rows;
    const std::int8_t* values = a.codes[side] + first_row * head_dim;
    std::uint8_t* bytes = a.bytes + page * a.page_bytes;
    const float* row_scales = a.scales[side] + first_row;
    Buffer<std::int8_t> ordered;
    float ordered_scales[kMaxBlock];
    if (side == 0 && a.order && a.order[head * head_dim] >= 0) {
        ordered.hold(static_cast<std::size_t>(tokens) * head_dim);
        ordered_rows(values, row_scales, tokens, head_dim, a.order + head * head_dim, a.rotated != 0, &ordered[0],
                     ordered_scales);
        values = &ordered[0], row_scales = ordered_scales;
    }
    float used[kMaxBlock];
    used_scales(values, row_scales, tokens, head_dim, used);
    const HeadScales scales = common_scale(used, tokens, a.layout.token_scales[side] >= 0);
    std::memcpy(bytes + a.layout.scales[side] + 4 * head, &scales.head, 4);
    if (a.layout.token_scales[side] >= 0) {
        std::memcpy(bytes + a.layout.token_scales[side] + head * tokens, scales.exponents, tokens);
    }

    Buffer<std::int8_t> moved;
    if (scales.changed) {
        moved.hold(static_cast<std::size_t>(tokens) * head_dim);
        constexpr float kRound = 12582912.0f;  // as in quantize_row
        for (int t = 0; t < tokens; ++t) {
            const bool move = used[t] > 0.0f && used[t] != scales.kept[t];
            const float ratio = move ? used[t] / scales.kept[t] : 1.0f;
            const std::int8_t* from = values + static_cast<std::int64_t>(t) * head_dim;
            std::int8_t* to = &moved[static_cast<std::size_t>(t) * head_dim];
            for (int c = 0; c < head_dim; ++c) to[c] = static_cast<std::int8_t>(bits_of(from[c] * ratio + kRound));
        }
        values = &moved[0];
    }

    const HeadOffsets& offsets = a.layout.offsets[2 * head + side];
    const int count = tokens * head_dim;
    Buffer<std::uint8_t> codes(count);
    over_runs(offsets, head_dim / 8, tokens, [&](const Run& run) {
        const int channel = 8 * run.first, channels = 8 * (run.last - run.first);
        if (run.bits == 8) {
            for (int i = 0; i < count; ++i) codes[i] = static_cast<std::uint8_t>(values[i] + 128);
        } else {
            progressive_quantize(values + channel, tokens, head_dim, channels, run.bits, a.search != 0, &codes[channel],
                                 bytes + offsets.step + channel, bytes + offsets.zero + channel);
        }
        std::uint8_t line[8 * kMaxBlock];
        std::uint8_t* at = bytes + offsets.codes + run.offset;
        for (int octet = run.first; octet < run.last; ++octet, at += tokens * run.bits) {
            (side == 0 ? key_line : value_line)(&codes[8 * octet], head_dim, tokens, line);
            pack_line(line, 8 * tokens, run.bits, at);
        }
    });
}

inline void decode_head(const PageArgs& a, std::int64_t page, std::int64_t head, std::int64_t side) {
    const int tokens = static_cast<int>(a.block), head_dim = static_cast<int>(side == 0 ? a.head_dim : a.value_dim);
    const std::int64_t first_row = (page * a.heads + head) * a.head_rows;
    auto* values = reinterpret_cast<std::uint8_t*>(a.codes[side] + first_row * head_dim);
    const std::uint8_t* bytes = a.bytes + page * a.page_bytes;
    std::uint32_t head_scale;
    std::memcpy(&head_scale, bytes + a.layout.scales[side] + 4 * head, 4);
    const bool by_token = a.layout.token_scales[side] >= 0;
    for (int t = 0; t < tokens; ++t) {
        const std::uint32_t exponent = by_token ? bytes[a.layout.token_scales[side] + head * tokens + t] : 0;
        a.scales[side][first_row + t] = float_of(head_scale - (exponent << kTokenScaleShift));
    }

    const HeadOffsets& offsets = a.layout.offsets[2 * head + side];
    over_runs(offsets, head_dim / 8, tokens, [&](const Run& run) {
        std::uint8_t line[8 * kMaxBlock];
        const std::uint8_t* at = bytes + offsets.codes + run.offset;
        for (int octet = run.first; octet < run.last; ++octet, at += tokens * run.bits) {
            unpack_line(at, 8 * tokens, run.bits, line);
            (side == 0 ? keys_from_line : values_from_line)(line, head_dim, tokens, values + 8 * octet);
        }
    });
    // Modulo 256: code * step + zero fits in int8, but the product may not.
    for (int t = 0; t < tokens; ++t) {
        std::uint8_t* row = values + static_cast<std::int64_t>(t) * head_dim;
        if (offsets.bits[0] == 8) {
            for (int c = 0; c < head_dim; ++c) row[c] = static_cast<std::uint8_t>(row[c] - 128);
        } else {
            const std::uint8_t *step = bytes + offsets.step, *zero = bytes + offsets.zero;
            for (int c = 0; c < head_dim; ++c) row[c] = static_cast<std::uint8_t>(row[c] * step[c] + zero[c]);
        }
    }
}

}  // namespace turbo::TURBO_ISA
