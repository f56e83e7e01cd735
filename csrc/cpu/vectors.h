// The vector types of the instruction set: sixteen 32-bit lanes, with the names and results of vec_serial.h.
#pragma once

#include <cstdint>

#include "isa.h"

#include TURBO_VECTORS

#ifndef TURBO_SHORT_SUMS

namespace turbo::TURBO_ISA {

// Partial sums of dot_small's products. The caller adds them to 32-bit sums (acc + 2^Shift x) before they can exceed
// kPartialLimit.
using Partial = I;
constexpr std::int32_t kPartialLimit = 0x7fffffff;
inline Partial partial_zero() { return i_set(0); }
inline Partial dot_partial(Partial acc, Bytes codes, Bytes q) { return dot_small(acc, codes, q); }
template <int Shift>
inline I add_partial(I acc, Partial x) {
    return acc + i_shl<Shift>(x);
}

}  // namespace turbo::TURBO_ISA

#endif
