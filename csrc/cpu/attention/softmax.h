// Exponentials of the weights on sixteen lanes: SAS, its base-2 form, and e^x (softmax.py).
#pragma once

#include "../memory.h"
#include "../vectors.h"

namespace turbo::TURBO_ISA {

// e^x to about one unit in the last place for x <= 0; 0 below -87 (and for -inf).
inline F f_exp(F x) {
    const F clamped = f_max(x, f_set(-87.0f));
    const F n = f_round(clamped * f_set(1.44269504f));
    // ln 2 in two parts, so that the remainder is exact.
    F r = f_fma(n, f_set(-0.693359375f), clamped);
    r = f_fma(n, f_set(2.12194440e-4f), r);
    F p = f_set(1.9875691500e-4f);
    p = f_fma(p, r, f_set(1.3981999507e-3f));
    p = f_fma(p, r, f_set(8.3334519073e-3f));
    p = f_fma(p, r, f_set(4.1665795894e-2f));
    p = f_fma(p, r, f_set(1.6666665459e-1f));
    p = f_fma(p, r, f_set(5.0000001201e-1f));
    p = f_fma(p, r * r, r + f_set(1.0f));
    const F power = f_from_bits(i_shl<23>(i_from_float(n) + i_set(127)));
    return f_keep_ge(x, f_set(-87.0f), p * power);
}

// tanh through e^-2|x|; near 0, where that cancels, by its series: the first omitted term is x^11 / 113.
inline F f_tanh(F x) {
    const F zero = f_set(0.0f), small = f_set(0.25f);
    const F negative = f_min(x, zero - x), magnitude = zero - negative;
    const F e = f_exp(negative + negative);
    const F far = (f_set(1.0f) - e) / (f_set(1.0f) + e);
    const F square = f_min(x * x, f_set(1.0f));
    F series = f_fma(f_set(62.0f / 2835.0f), square, f_set(-17.0f / 315.0f));
    series = f_fma(series, square, f_set(2.0f / 15.0f));
    series = f_fma(series, square, f_set(-1.0f / 3.0f));
    const F near = f_fma(series * square, magnitude, magnitude);
    const F result = f_keep_gt(small, magnitude, near) + f_keep_ge(magnitude, small, far);
    return f_keep_ge(x, zero, result) - f_keep_ge(zero - x, zero, result);
}

enum class Softmax { sas, sas2, exp, sas16 };

// The largest INT8 weight. Weights are computed in units of 1 / 127, or finer if they take a scale per row, and are
// summed as integers in that unit. With a scale per tile they are summed as floats.
constexpr float kLevels = 127.0f, kFineLevels = 127.0f * 256.0f;
// With a scale per row, its largest product is scaled to this, which rounds to the code 127. With 127 itself, products
// whose value scale is half the largest, which are common, would be rounding ties.
constexpr float kRowLargest = 126.96875f;

struct Exponential {
    float full;       // the weight 1
    float table[16];  // full e^-n
    float limit;      // weights at larger distances are zero

    Exponential(float threshold, float full) : full(full), limit(-threshold) {
        double power = full;
        for (float& entry : table) {
            entry = static_cast<float>(power);
            power *= 0.36787944117144233;
        }
    }
    // If not, 127 e^-y rounds to zero beyond the limit anyway, within the errors of the approximations.
    bool cuts() const { return full != kLevels || limit < 5.7f; }
};

// full e^-y for y >= 0 (for infinity 0, or a value that rounds to 0). kFixed: weights are computed from the integer
// products in fixed point, if the logits themselves are not needed.
template <Softmax Form, bool Cut>
struct Levels {
    const Exponential& e;
    static constexpr bool kFixed = false;

    TURBO_ALWAYS_INLINE F operator()(F y) const {
        F level;
        if constexpr (Form == Softmax::exp) {
            return f_set(e.full) * f_exp(f_set(0.0f) - y);
        } else if constexpr (Form == Softmax::sas) {
            const F near = f_min(y, f_set(15.0f));
            const F f = f_fraction(near);
            F p = f_fma(f_set(-0.1025f), f, f_set(0.4626f));
            p = f_fma(p, f, f_set(-0.9922f));
            p = f_fma(p, f, f_set(0.9996f));
            level = f_lookup(e.table, i_truncate(near)) * p;
        } else {
            const F near = f_min(y * f_set(1.44269504f), f_set(126.0f));
            const F f = f_fraction(near);
            F p = f_fma(f_set(-0.0391340f), f, f_set(0.2305558f));
            p = f_fma(p, f, f_set(-0.6914218f));
            p = f_fma(p, f, f_set(1.0f));
            level = f_set(e.full) * p * f_from_bits(i_shl<23>(i_set(127) - i_truncate(near)));
        }
        if constexpr (Cut) level = f_keep_ge(f_set(e.limit), y, level);
        return level;
    }
};

}  // namespace turbo::TURBO_ISA
