// The signed block Hadamard rotation of flashq/rotation.py as a fast transform in double. Sums of float32 values are
// exact in double, so the result does not depend on their order.
#pragma once

#include <cstdint>

#include "../attention/arguments.h"
#include "../isa.h"
#include "../memory.h"
#include "../vectors.h"

namespace turbo::TURBO_ISA {

constexpr std::uint64_t kSignBits = 0x9E3779B97F4A7C15u;

// The sign of each channel.
struct Signs {
    alignas(64) double of[kMaxHeadDim];
    Signs() {
        for (int c = 0; c < kMaxHeadDim; ++c) of[c] = kSignBits >> (c % 64) & 1 ? -1.0 : 1.0;
    }
};

inline int block_of(int head_dim) { return head_dim & -head_dim; }

constexpr int kInRegisters = 128;  // the largest transform, in doubles, that stays in registers

// Sums and differences of vectors whose indices differ in one bit, from Distance on. Recursive, so that all indices are
// constants and the vectors stay in registers.
template <int N, int Distance = 1>
TURBO_ALWAYS_INLINE void butterflies(D* x) {
    if constexpr (Distance < N) {
        for (int i = 0; i < N / 2; ++i) {
            const int low = i / Distance * 2 * Distance + i % Distance;
            const D a = x[low], b = x[low + Distance];
            x[low] = a + b, x[low + Distance] = a - b;
        }
        butterflies<N, 2 * Distance>(x);
    }
}

// Unnormalized transform of N doubles, eight at a time: take(i) gives and put(i, x) receives the vector of elements
// 8i to 8i + 7. All are taken before the first is put.
template <int N, class Take, class Put>
TURBO_ALWAYS_INLINE void hadamard(const Take& take, const Put& put) {
    if constexpr (N <= kInRegisters) {
        D x[N / 8];
        for (int i = 0; i < N / 8; ++i) x[i] = d_butterfly<4>(d_butterfly<2>(d_butterfly<1>(take(i))));
        butterflies<N / 8>(x);
        for (int i = 0; i < N / 8; ++i) put(i, x[i]);
    } else {
        constexpr int kHalf = N / 16;
        alignas(64) double kept[N];
        for (int half = 0; half < 2; ++half)
            hadamard<N / 2>([&](int i) { return take(half * kHalf + i); },
                            [&](int i, D x) { d_store(kept + 8 * (half * kHalf + i), x); });
        for (int i = 0; i < kHalf; ++i) {
            const D a = d_load(kept + 8 * i), b = d_load(kept + 8 * (kHalf + i));
            put(i, a + b), put(kHalf + i, a - b);
        }
    }
}

// Normalization of the transform, `block ** -0.5` as computed by Python.
inline double norm_of(int block) {
    switch (block) {
        case 8: return 0.35355339059327379;
        case 16: return 0.25;
        case 32: return 0.17677669529663689;
        case 64: return 0.125;
        case 128: return 0.088388347648318447;
        case 256: return 0.0625;
        default: return 0.044194173824159220;
    }
}

// Rotates N channels, or rotates them back.
template <int N, bool Back>
TURBO_NEVER_INLINE void rotate_block(float* x, const double* signs) {
    const D norm = d_set(norm_of(N));
    const auto signed_at = [&](int i, D value) { return value * d_load(signs + 8 * i); };
    hadamard<N>(
        [&](int i) {
            const D value = d_from_floats(x + 8 * i);
            return Back ? value : signed_at(i, value);
        },
        [&](int i, D value) { d_store_floats(x + 8 * i, (Back ? signed_at(i, value) : value) * norm); });
}

template <bool Back>
inline void rotate_blocks(float* x, int head_dim, const Signs& signs) {
    const int block = block_of(head_dim);
    for (int at = 0; at < head_dim; at += block) {
        switch (block) {
            case 8: rotate_block<8, Back>(x + at, signs.of + at); break;
            case 16: rotate_block<16, Back>(x + at, signs.of + at); break;
            case 32: rotate_block<32, Back>(x + at, signs.of + at); break;
            case 64: rotate_block<64, Back>(x + at, signs.of + at); break;
            case 128: rotate_block<128, Back>(x + at, signs.of + at); break;
            case 256: rotate_block<256, Back>(x + at, signs.of + at); break;
            default: rotate_block<512, Back>(x + at, signs.of + at); break;
        }
    }
}

inline void rotate_row(float* x, int head_dim, const Signs& signs) { rotate_blocks<false>(x, head_dim, signs); }
inline void unrotate_row(float* x, int head_dim, const Signs& signs) { rotate_blocks<true>(x, head_dim, signs); }

}  // namespace turbo::TURBO_ISA
