// Reads a page (kv/layout.py): codes of every width, steps and zeros, scales.
#pragma once

#include <cstdint>
#include <cstring>

#include "../memory.h"
#include "../vectors.h"
#include "../widths.h"
#include "arguments.h"
#include "lanes.h"

namespace turbo::TURBO_ISA {

// low | (plane >> n & mask) for every byte, with a left shift if n is negative. Inlined, since n is a constant in
// unrolled loops.
TURBO_ALWAYS_INLINE Bytes with_bits(Bytes low, Bytes plane, int n, int mask) {
    switch (n) {
        case -4: return b_shl_or<4>(plane, mask, low);
        case -3: return b_shl_or<3>(plane, mask, low);
        case -2: return b_shl_or<2>(plane, mask, low);
        case -1: return b_shl_or<1>(plane, mask, low);
        case 0: return b_shr_or<0>(plane, mask, low);
        case 1: return b_shr_or<1>(plane, mask, low);
        case 2: return b_shr_or<2>(plane, mask, low);
        case 3: return b_shr_or<3>(plane, mask, low);
        case 4: return b_shr_or<4>(plane, mask, low);
        case 5: return b_shr_or<5>(plane, mask, low);
        case 6: return b_shr_or<6>(plane, mask, low);
        default: return b_shr_or<7>(plane, mask, low);
    }
}

// Vector `i` (0 .. 7) of the eight of an octet, 64 codes each, ORed with `base`. An octet is 512 codes in bit planes; a
// plane of w bits takes w vectors of bytes.
template <int Bits>
TURBO_ALWAYS_INLINE Bytes unpack(const std::uint8_t* octet, int i, Bytes base) {
    constexpr int kLower = lower_plane(Bits);
    const Bytes low = with_bits(base, b_load(octet + 64 * (i % kLower)), i / kLower * kLower, (1 << kLower) - 1);
    if constexpr (Bits == kLower) return low;
    return with_bits(low, b_load(octet + 64 * kLower), i - kLower, 1 << kLower);
}

template <int Bits>
TURBO_ALWAYS_INLINE Bytes unpack(const std::uint8_t* octet, int i) {
    if constexpr (Bits == 8) return b_load(octet + 64 * i);
    return unpack<Bits>(octet, i, b_zero());
}

inline int octet_bytes(std::int64_t bits) { return static_cast<int>(kBlock * bits); }

struct PageHead {
    const std::uint8_t* page;
    const PageSections* layout;
    std::int64_t head;

    const HeadOffsets& offsets(int side) const { return layout->offsets[2 * head + side]; }
    const std::uint8_t* codes(int side) const { return page + offsets(side).codes; }
    const std::int8_t* steps(int side) const { return reinterpret_cast<const std::int8_t*>(page + offsets(side).step); }
    const std::int8_t* zeros(int side) const { return reinterpret_cast<const std::int8_t*>(page + offsets(side).zero); }

    // The scales of the 64 tokens: bits(S) - (e << 19), or S itself without token scales.
    void scales(int side, float* out) const {
        std::int32_t bits;
        std::memcpy(&bits, page + layout->scales[side] + 4 * head, 4);
        if (layout->token_scales[side] < 0) {
            for (int t = 0; t < kBlock; t += 16) f_store(out + t, f_from_bits(i_set(bits)));
            return;
        }
        const std::uint8_t* steps = page + layout->token_scales[side] + kBlock * head;
        for (int t = 0; t < kBlock; t += 16)
            f_store(out + t, f_from_bits(i_set(bits) - i_shl<19>(i_from_u8(steps + t))));
    }
};

inline void read_scales(BlockScales& out, const PageHead& source) {
    alignas(64) float scale[kBlock];
    source.scales(1, scale);
    set_value_scales(out, scale);
    source.scales(0, out.key);
}

// Steps and zeros of the 64 codes of a vector.
struct CodeRanges {
    alignas(64) std::uint8_t step[64], zero[64];

    // K's vectors: four channels from `channel` on, token by token.
    void of_keys(const PageHead& source, int channel) {
        for (int k = 0; k < 64; k += 4) {
            std::memcpy(step + k, source.steps(0) + channel, 4);
            std::memcpy(zero + k, source.zeros(0) + channel, 4);
        }
    }
    // V's vectors: eight channels from `channel` on, four tokens each.
    void of_values(const PageHead& source, int channel) {
        for (int k = 0; k < 64; ++k) {
            step[k] = static_cast<std::uint8_t>(source.steps(1)[channel + k / 4 % 8]);
            zero[k] = static_cast<std::uint8_t>(source.zeros(1)[channel + k / 4 % 8]);
        }
    }
};

// The INT8 values of vector `i` of an octet, XORed with `flip`. The product wraps, but `code step + zero` fits a byte.
template <int Bits>
inline void restore(std::uint8_t* out, const std::uint8_t* octet, int i, const CodeRanges& ranges, std::uint8_t flip) {
    b_store(out, unpack<Bits>(octet, i));
    if constexpr (Bits == 8) {
        for (int k = 0; k < 64; ++k) out[k] ^= 0x80 ^ flip;
    } else {
        for (int k = 0; k < 64; ++k)
            out[k] = static_cast<std::uint8_t>(out[k] * ranges.step[k] + ranges.zero[k]) ^ flip;
    }
}

template <int Bits>
inline void unpack_keys(UnpackedKV& out, const PageHead& source, int head_dim, const Run& run) {
    alignas(64) std::uint8_t code[64];
    CodeRanges ranges;
    const std::uint8_t* at = source.codes(0) + run.offset;
    for (int octet = run.first; octet < run.last; ++octet, at += octet_bytes(Bits))
        for (int i = 0; i < 8; ++i) {
            const int channel = 8 * octet + 4 * (i / 4);
            if (Bits < 8 && i % 4 == 0) ranges.of_keys(source, channel);
            restore<Bits>(code, at, i, ranges, kFlip);
            std::uint8_t* keys = out.own_keys + 16 * (i % 4) * head_dim + channel;
            for (int t = 0; t < 16; ++t) std::memcpy(keys + t * head_dim, code + 4 * t, 4);
        }
}

template <int Bits>
inline void unpack_values(UnpackedKV& out, const PageHead& source, int value_dim) {
    alignas(64) std::uint8_t code[64];
    CodeRanges ranges;
    for (int octet = 0; octet < value_dim / 8; ++octet) {
        if (Bits < 8) ranges.of_values(source, 8 * octet);
        for (int i = 0; i < 8; ++i) {
            restore<Bits>(code, source.codes(1) + octet * octet_bytes(Bits), i, ranges, 0);
            std::int8_t* at = out.values + kBlock * 8 * octet + 8 * i;
            for (int lane = 0; lane < 16; ++lane)
                std::memcpy(at + kBlock * (lane % 8) + 4 * (lane / 8), code + 4 * lane, 4);
        }
    }
}

// Unpacks the page to INT8, for prefill.
inline void unpack_kv(UnpackedKV& out, const PageHead& source, int head_dim, int value_dim) {
    out.keys = out.own_keys;
    over_runs(source.offsets(0), head_dim / 8, kBlock, [&](const Run& run) {
        with_width<kCodeWidths>(run.bits,
                                [&](auto bits) { unpack_keys<decltype(bits)::value>(out, source, head_dim, run); });
    });
    with_width<kValueWidths>(source.offsets(1).bits[0],
                             [&](auto bits) { unpack_values<decltype(bits)::value>(out, source, value_dim); });
}

}  // namespace turbo::TURBO_ISA
