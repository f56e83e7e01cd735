// Packs and unpacks octets of codes (flashq/packing.py) in the order of a page (kv/layout.py). An octet is 8 channels
// of a block; its line has 8 * tokens codes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../isa.h"
#include "../widths.h"

namespace turbo::TURBO_ISA {

// Codes [tokens][row] of eight channels -> K's order: quad of channels, token, channel of the quad.
inline void key_line(const std::uint8_t* codes, std::int64_t row, int tokens, std::uint8_t* line) {
    for (int quad = 0; quad < 2; ++quad) {
        for (int t = 0; t < tokens; ++t) std::memcpy(line + 4 * (quad * tokens + t), codes + t * row + 4 * quad, 4);
    }
}

inline void keys_from_line(const std::uint8_t* line, std::int64_t row, int tokens, std::uint8_t* codes) {
    for (int quad = 0; quad < 2; ++quad) {
        for (int t = 0; t < tokens; ++t) std::memcpy(codes + t * row + 4 * quad, line + 4 * (quad * tokens + t), 4);
    }
}

// Codes [tokens][row] of eight channels -> V's order: quad of tokens, channel, token of the quad.
inline void value_line(const std::uint8_t* codes, std::int64_t row, int tokens, std::uint8_t* line) {
    for (int t = 0; t < tokens; t += 4, line += 32) {
        const std::uint8_t* at = codes + t * row;
        for (int c = 0; c < 8; ++c) {
            for (int i = 0; i < 4; ++i) line[4 * c + i] = at[i * row + c];
        }
    }
}

inline void values_from_line(const std::uint8_t* line, std::int64_t row, int tokens, std::uint8_t* codes) {
    for (int t = 0; t < tokens; t += 4, line += 32) {
        std::uint8_t* at = codes + t * row;
        for (int c = 0; c < 8; ++c) {
            for (int i = 0; i < 4; ++i) at[i * row + c] = line[4 * c + i];
        }
    }
}

// Packs bits `shift` to `shift + kWidth` (exclusive) of every code: byte j of m holds codes j, j + m, j + 2m, ...
template <int kWidth>
inline std::uint8_t* pack_plane(const std::uint8_t* line, int count, int shift, std::uint8_t* bytes) {
    constexpr int kParts = 8 / kWidth, kMask = (1 << kWidth) - 1;
    const int size = count / kParts;
    for (int j = 0; j < size; ++j) {
        std::uint32_t byte = 0;
        for (int k = 0; k < kParts; ++k) byte |= (line[k * size + j] >> shift & kMask) << (k * kWidth);
        bytes[j] = static_cast<std::uint8_t>(byte);
    }
    return bytes + size;
}

template <int kWidth>
inline const std::uint8_t* unpack_plane(const std::uint8_t* bytes, int count, int shift, std::uint8_t* line) {
    constexpr int kParts = 8 / kWidth, kMask = (1 << kWidth) - 1;
    const int size = count / kParts;
    for (int k = 0; k < kParts; ++k) {
        for (int j = 0; j < size; ++j) {
            const int code = (bytes[j] >> (k * kWidth) & kMask) << shift;
            line[k * size + j] = static_cast<std::uint8_t>(shift ? line[k * size + j] | code : code);
        }
    }
    return bytes + size;
}

inline void pack_line(const std::uint8_t* line, int count, std::int64_t bits, std::uint8_t* bytes) {
    with_width<kCodeWidths>(bits, [&](auto width) {
        constexpr int kBits = decltype(width)::value, kLower = lower_plane(kBits);
        std::uint8_t* rest = pack_plane<kLower>(line, count, 0, bytes);
        if constexpr (kBits > kLower) pack_plane<1>(line, count, kLower, rest);
    });
}

inline void unpack_line(const std::uint8_t* bytes, int count, std::int64_t bits, std::uint8_t* line) {
    with_width<kCodeWidths>(bits, [&](auto width) {
        constexpr int kBits = decltype(width)::value, kLower = lower_plane(kBits);
        const std::uint8_t* rest = unpack_plane<kLower>(bytes, count, 0, line);
        if constexpr (kBits > kLower) unpack_plane<1>(rest, count, kLower, line);
    });
}

}  // namespace turbo::TURBO_ISA
