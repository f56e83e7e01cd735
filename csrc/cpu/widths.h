// The widths of codes and their dispatch, and the runs of channels with one width (kv/layout.py). Every kernel that is
// compiled per width takes it from these tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>

#include "attention/arguments.h"
#include "isa.h"
#include "unsupported.h"

namespace turbo::TURBO_ISA {

// Bits of a code, and how many of them its lower plane holds; an upper plane holds the highest bit of codes of 5 and 3
// bits (flashq/packing.py: PLANES).
constexpr int kCodeWidths[] = {8, 5, 4, 3, 2, 1};
constexpr int kLowerPlanes[] = {8, 4, 4, 2, 2, 1};
// Widths of values.
constexpr int kValueWidths[] = {8, 4, 3, 2};
// Widths of the two halves of a head's keys, which are equal or differ by 2 bits (kv/layout.py: K_HALVES).
constexpr KeyWidths kKeyWidths[] = {{8, 8}, {5, 3}, {4, 4}, {4, 2}, {3, 3}, {3, 1}, {2, 2}};

static_assert(std::size(kCodeWidths) == std::size(kLowerPlanes));

// A pair of planes is a lower one and, at most, one bit (quantize/packing.h, attention/page.h).
constexpr bool planes_are_supported() {
    for (std::size_t i = 0; i < std::size(kCodeWidths); ++i)
        if (kCodeWidths[i] - kLowerPlanes[i] != 0 && kCodeWidths[i] - kLowerPlanes[i] != 1) return false;
    return true;
}
static_assert(planes_are_supported());

constexpr int lower_plane(int bits) {
    for (std::size_t i = 0; i < std::size(kCodeWidths); ++i)
        if (kCodeWidths[i] == bits) return kLowerPlanes[i];
    return bits;
}

template <int Bits>
using Width = std::integral_constant<int, Bits>;

// Calls body(Width<bits>), compiled for every entry of `Widths`. Throws std::invalid_argument for other `bits`.
template <const auto& Widths, std::size_t Entry = 0, class Body>
inline void with_width(std::int64_t bits, const Body& body) {
    if constexpr (Entry == std::size(Widths))
        unsupported_width(bits, Widths, std::size(Widths));
    else if (bits == Widths[Entry])
        body(Width<Widths[Entry]>{});
    else
        with_width<Widths, Entry + 1>(bits, body);
}

// Calls body(Width<wide>, Width<narrow>) likewise for the entries of kKeyWidths.
template <std::size_t Entry = 0, class Body>
inline void with_key_widths(const HeadOffsets& offsets, const Body& body) {
    if constexpr (Entry == std::size(kKeyWidths)) {
        unsupported_width(offsets.bits[0], offsets.bits[1], kKeyWidths, std::size(kKeyWidths));
    } else {
        constexpr KeyWidths kEntry = kKeyWidths[Entry];
        if (offsets.bits[0] == kEntry.wide && offsets.bits[1] == kEntry.narrow)
            body(Width<kEntry.wide>{}, Width<kEntry.narrow>{});
        else
            with_key_widths<Entry + 1>(offsets, body);
    }
}

// Octets `first` to `last` (exclusive) of a head, of equal width; their codes begin `offset` bytes after the head's.
struct Run {
    std::int64_t bits;
    int first, last;
    std::int64_t offset;
};

// Calls body(run) for the one or two runs of a head.
template <class Body>
inline void over_runs(const HeadOffsets& offsets, int octets, int tokens, const Body& body) {
    if (offsets.bits[0] == offsets.bits[1]) return body(Run{offsets.bits[0], 0, octets, 0});
    const int half = octets / 2;
    body(Run{offsets.bits[0], 0, half, 0});
    body(Run{offsets.bits[1], half, octets, offsets.bits[0] * half * tokens});
}

}  // namespace turbo::TURBO_ISA
