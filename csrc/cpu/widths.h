// Widths of codes: their planes (flashq/packing.py), the runs of channels of one width (kv/layout.py), and code that is
// compiled once for each.
#pragma once

template <int Bits>
using Width = std::integral_constant<int, Bits>;

// Bits of a code's lower plane; 5 and 3 bits have a plane of one bit above it.
constexpr int lower_plane(int bits) { return bits == 5 || bits == 3 ? bits - 1 : bits; }

// body(Width<bits>), where `bits` is one of those that the call names.
template <int First, int... Rest, class Body>
inline void with_width(std::int64_t bits, const Body& body) {
    if constexpr (sizeof...(Rest) > 0) {
        if (bits != First) return with_width<Rest...>(bits, body);
    }
    body(Width<First>{});
}

// body(wide, narrow): the widths of the two halves of a head's K, which are the same or 2 bits apart.
template <class Body>
inline void with_key_widths(const HeadPlace& place, const Body& body) {
    with_width<8, 5, 4, 3, 2>(place.bits[0], [&](auto wide) {
        constexpr int kWide = decltype(wide)::value;
        if constexpr (kWide == 5) {
            body(wide, Width<3>{});
        } else if constexpr (kWide == 4 || kWide == 3) {
            if (place.bits[1] == kWide) return body(wide, wide);
            body(wide, Width<kWide - 2>{});
        } else {
            body(wide, wide);
        }
    });
}

// Octets `first` to `last` (exclusive) of a head, all of one width; their codes begin `offset` bytes behind the head's.
struct Run {
    std::int64_t bits;
    int first, last;
    std::int64_t offset;
};

template <class Body>
inline void over_runs(const HeadPlace& place, int octets, int tokens, const Body& body) {
    if (place.bits[0] == place.bits[1]) return body(Run{place.bits[0], 0, octets, 0});
    const int half = octets / 2;
    body(Run{place.bits[0], 0, half, 0});
    body(Run{place.bits[1], half, octets, place.bits[0] * half * tokens});
}
