// The signed block Hadamard rotation of flashq/rotation.py as a fast transform in double. Sums of float32 values are
// exact in double, so the result does not depend on their order.
#pragma once

#include <cstdint>
#include <cstring>

#include "../attention/arguments.h"
#include "../isa.h"

namespace turbo::TURBO_ISA {

constexpr std::uint64_t kSignBits = 0x9E3779B97F4A7C15u;

// The sign of each channel.
struct Signs {
    double of[kMaxHeadDim];
    Signs() {
        for (int c = 0; c < kMaxHeadDim; ++c) of[c] = kSignBits >> (c % 64) & 1 ? -1.0 : 1.0;
    }
};

inline int block_of(int head_dim) { return head_dim & -head_dim; }

// Unnormalized transform of N doubles. Every pass writes sums of neighbours to the first half and differences to the
// second. This rotates the bits of the index by one, so after log2 N passes the order is restored.
template <int N>
inline void hadamard(double* x) {
    double other[N];
    double *from = x, *to = other;
    for (int size = 1; size < N; size *= 2) {
        for (int i = 0; i < N / 2; ++i) {
            const double a = from[2 * i], b = from[2 * i + 1];
            to[i] = a + b;
            to[i + N / 2] = a - b;
        }
        double* const swap = from;
        from = to, to = swap;
    }
    if (from != x) std::memcpy(x, from, sizeof other);
}

// Not inlined: the smaller ones, which nearly all models have, are slower beside it.
#if defined(__GNUC__)
__attribute__((noinline))
#endif
inline void hadamard_512(double* x) {
    hadamard<512>(x);
}

inline void hadamard_blocks(double* x, int head_dim) {
    const int block = block_of(head_dim);
    for (int at = 0; at < head_dim; at += block) {
        switch (block) {
            case 8: hadamard<8>(x + at); break;
            case 16: hadamard<16>(x + at); break;
            case 32: hadamard<32>(x + at); break;
            case 64: hadamard<64>(x + at); break;
            case 128: hadamard<128>(x + at); break;
            case 256: hadamard<256>(x + at); break;
            default: hadamard_512(x + at); break;
        }
    }
}

// Normalization of the transform, `block ** -0.5` as computed by Python.
inline double norm_of(int head_dim) {
    switch (block_of(head_dim)) {
        case 8: return 0.35355339059327379;
        case 16: return 0.25;
        case 32: return 0.17677669529663689;
        case 64: return 0.125;
        case 128: return 0.088388347648318447;
        case 256: return 0.0625;
        default: return 0.044194173824159220;
    }
}

inline void rotate_row(float* x, int head_dim, const Signs& signs) {
    double wide[kMaxHeadDim];
    for (int c = 0; c < head_dim; ++c) wide[c] = static_cast<double>(x[c]) * signs.of[c];
    hadamard_blocks(wide, head_dim);
    const double norm = norm_of(head_dim);
    for (int c = 0; c < head_dim; ++c) x[c] = static_cast<float>(wide[c] * norm);
}

inline void unrotate_row(float* x, int head_dim, const Signs& signs) {
    double wide[kMaxHeadDim];
    for (int c = 0; c < head_dim; ++c) wide[c] = x[c];
    hadamard_blocks(wide, head_dim);
    const double norm = norm_of(head_dim);
    for (int c = 0; c < head_dim; ++c) x[c] = static_cast<float>(wide[c] * signs.of[c] * norm);
}

}  // namespace turbo::TURBO_ISA
