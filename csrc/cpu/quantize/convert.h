// Converts rows of float32, bfloat16 and float16 to float and back, rounding to nearest even. The conversions use
// integer operations, which give the same results with all compilers and are vectorized.
#pragma once

#include <cstdint>
#include <cstring>

#include "../attention/arguments.h"
#include "../isa.h"

namespace turbo::TURBO_ISA {

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float float_from_half(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);
    const std::uint32_t special = (magnitude << 13) | 0x7F800000u;
    // Denormals: count * 2^-24, exact.
    const std::uint32_t small = bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
    const std::uint32_t finite = magnitude < 0x400u ? small : normal;
    return float_of((magnitude >= 0x7C00u ? special : finite) | sign);
}

inline std::uint16_t half_from_float(float x) {
    const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t normal = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
    // The last bit of 0.5 is the unit of half's denormals, so the addition rounds to it.
    const std::uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
    const std::uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const std::uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return static_cast<std::uint16_t>((magnitude >= 0x477FF000u ? special : finite) | sign);
}

inline float float_from_bfloat(std::uint16_t x) { return float_of(static_cast<std::uint32_t>(x) << 16); }

inline std::uint16_t bfloat_from_float(float x) {
    const std::uint32_t bits = bits_of(x), rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

inline std::int64_t row_offset(const FloatRows& rows, std::int64_t b, std::int64_t h, std::int64_t t) {
    const std::int64_t sequence = rows.starts ? rows.starts[b] * rows.token_stride : b * rows.batch_stride;
    return sequence + h * rows.head_stride + t * rows.token_stride;
}

// Rows are aligned to their element type only.
inline void load_row(const FloatRows& rows, std::int64_t offset, int count, float* to) {
    if (rows.kind == kFloat32) {
        std::memcpy(to, static_cast<const float*>(rows.data) + offset, sizeof(float) * count);
    } else if (rows.kind == kBfloat16) {
        const auto* from = static_cast<const std::uint16_t*>(rows.data) + offset;
        for (int c = 0; c < count; ++c) to[c] = float_of(static_cast<std::uint32_t>(from[c]) << 16);
    } else {
        const auto* from = static_cast<const std::uint16_t*>(rows.data) + offset;
        for (int c = 0; c < count; ++c) to[c] = float_from_half(from[c]);
    }
}

inline void store_row(const FloatRows& rows, std::int64_t offset, int count, const float* from) {
    if (rows.kind == kFloat32) {
        std::memcpy(static_cast<float*>(rows.data) + offset, from, sizeof(float) * count);
    } else if (rows.kind == kBfloat16) {
        auto* to = static_cast<std::uint16_t*>(rows.data) + offset;
        for (int c = 0; c < count; ++c) to[c] = bfloat_from_float(from[c]);
    } else {
        auto* to = static_cast<std::uint16_t*>(rows.data) + offset;
        for (int c = 0; c < count; ++c) to[c] = half_from_float(from[c]);
    }
}

}  // namespace turbo::TURBO_ISA
