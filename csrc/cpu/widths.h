// Dispatch over the widths of codes, their planes (flashq/packing.py), and the runs of channels of one width
// (kv/layout.py).
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/arguments.h"
#include "isa.h"

namespace turbo::TURBO_ISA {

template <int Bits>
using Width = std::integral_constant<int, Bits>;

// Bits of the lower plane of a code; 5 and 3 bits have a second plane for the highest bit.
constexpr int lower_plane(int bits) { return bits == 5 || bits == 3 ? bits - 1 : bits; }

// Calls body(Width<bits>); `bits` must be one of the template arguments.
template <int First, int... Rest, class Body>
inline void with_width(std::int64_t bits, const Body& body) {
    if constexpr (sizeof...(Rest) > 0) {
        if (bits != First) return with_width<Rest...>(bits, body);
    }
    body(Width<First>{});
}

// Calls body(wide, narrow): the widths of the two halves of a head's K, which are equal or differ by 2 bits.
template <class Body>
inline void with_key_widths(const HeadOffsets& offsets, const Body& body) {
    with_width<8, 5, 4, 3, 2>(offsets.bits[0], [&](auto wide) {
        constexpr int kWide = decltype(wide)::value;
        if constexpr (kWide == 5) {
            body(wide, Width<3>{});
        } else if constexpr (kWide == 4 || kWide == 3) {
            if (offsets.bits[1] == kWide) return body(wide, wide);
            body(wide, Width<kWide - 2>{});
        } else {
            body(wide, wide);
        }
    });
}

// Octets `first` to `last` (exclusive) of a head, of equal width; their codes start `offset` bytes after the head's.
struct Run {
    std::int64_t bits;
    int first, last;
    std::int64_t offset;
};

template <class Body>
inline void over_runs(const HeadOffsets& offsets, int octets, int tokens, const Body& body) {
    if (offsets.bits[0] == offsets.bits[1]) return body(Run{offsets.bits[0], 0, octets, 0});
    const int half = octets / 2;
    body(Run{offsets.bits[0], 0, half, 0});
    body(Run{offsets.bits[1], half, octets, offsets.bits[0] * half * tokens});
}

}  // namespace turbo::TURBO_ISA
