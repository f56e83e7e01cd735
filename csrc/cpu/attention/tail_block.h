// Reads a block of INT8 rows that are not in pages: of the buffer, or the tokens of the call itself.
#pragma once

#include <cstdint>
#include <cstring>

#include "../isa.h"
#include "lanes.h"

namespace turbo::TURBO_ISA {

// In decode a lane is a token or a channel, and codes are X8 + 128:
//   keys    [D / 4 quads of channels][64 tokens][4 channels]
//   values  [16 quads of tokens][Dp channels][4 tokens], Dp: Dv rounded up to a multiple of 16
struct UnpackedRows {
    alignas(64) std::uint8_t keys[kMaxHeadDim * kBlock];
    alignas(64) std::uint8_t values[kMaxHeadDim * kBlock];
    alignas(64) std::uint8_t work[kMaxHeadDim * kBlock];
};

inline int padded(std::int64_t head_dim) { return static_cast<int>((head_dim + 15) / 16 * 16); }

struct TailBlock {  // `rows` rows of D or Dv codes, and their scales
    const std::int8_t* k;
    const std::int8_t* v;
    const float* k_scale;
    const float* v_scale;
    int rows;
};

// Missing rows have the scale 0.
inline void read_scales(BlockScales& out, const TailBlock& in) {
    alignas(64) float scale[kBlock] = {};
    std::memcpy(scale, in.v_scale, in.rows * sizeof(float));
    set_value_scales(out, scale);
    std::memset(out.key, 0, sizeof out.key);
    std::memcpy(out.key, in.k_scale, in.rows * sizeof(float));
}

// Copies rows, pads them to 64 with zeros, and XORs every byte with `flip`.
inline void copy_rows(std::uint8_t* out, const std::int8_t* in, int rows, int head_dim, std::uint8_t flip) {
    const int bytes = rows * head_dim;
    for (int i = 0; i < bytes; ++i) out[i] = static_cast<std::uint8_t>(in[i]) ^ flip;
    std::memset(out + bytes, flip, static_cast<std::size_t>(kBlock * head_dim - bytes));
}

// rows [64][D] -> words of four tokens [16][padded_dim], channels beyond D are not written.
inline void words_from_rows(std::uint8_t* out, const std::uint8_t* rows, int head_dim, int padded_dim) {
    for (int quad = 0; quad < kBlock / 4; ++quad) {
        const std::uint8_t* in = rows + 4 * quad * head_dim;
        std::uint8_t* at = out + 4 * quad * padded_dim;
        for (int c = 0; c < head_dim; ++c) {
            const std::uint32_t word = static_cast<std::uint32_t>(in[c]) |
                                       static_cast<std::uint32_t>(in[c + head_dim]) << 8 |
                                       static_cast<std::uint32_t>(in[c + 2 * head_dim]) << 16 |
                                       static_cast<std::uint32_t>(in[c + 3 * head_dim]) << 24;
            std::memcpy(at + 4 * c, &word, 4);
        }
    }
}

inline void unpack_rows(UnpackedRows& out, const TailBlock& in, int head_dim, int value_dim) {
    copy_rows(out.work, in.k, in.rows, head_dim, 0x80);
    for (int quad = 0; quad < head_dim / 4; ++quad)
        for (int t = 0; t < kBlock; ++t)
            std::memcpy(out.keys + 4 * (quad * kBlock + t), out.work + t * head_dim + 4 * quad, 4);
    const int padded_dim = padded(value_dim);
    copy_rows(out.work, in.v, in.rows, value_dim, 0x80);
    words_from_rows(out.values, out.work, value_dim, padded_dim);
    for (int quad = 0; quad < kBlock / 4; ++quad)
        std::memset(out.values + 4 * (quad * padded_dim + value_dim), 0x80,
                    4 * static_cast<std::size_t>(padded_dim - value_dim));
}

inline void unpack_kv(UnpackedKV& out, const TailBlock& in, int head_dim, int value_dim) {
    const bool whole = in.rows == kBlock;
    out.keys = out.own_keys;
    if (whole && !kFlip)
        out.keys = reinterpret_cast<const std::uint8_t*>(in.k);
    else
        copy_rows(out.own_keys, in.k, in.rows, head_dim, kFlip);
    alignas(64) static thread_local std::uint8_t padded_rows[kBlock * kMaxHeadDim];
    if (!whole) copy_rows(padded_rows, in.v, in.rows, value_dim, 0);
    words_from_rows(out.work, whole ? reinterpret_cast<const std::uint8_t*>(in.v) : padded_rows, value_dim, value_dim);
    values_from_words(out.values, out.work, value_dim);
}

}  // namespace turbo::TURBO_ISA
