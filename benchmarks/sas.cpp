// Times forms of e^-y on the kernels' own vector types. Built and called by sas.py.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define TURBO_ISA bench
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define TURBO_VECTORS "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#define TURBO_VECTORS "vec_avx2.h"
#else
#define TURBO_VECTORS "vec_serial.h"
#endif
#include "attention/softmax.h"

using namespace turbo::bench;

namespace {

template <int Degree>
F polynomial(const float* c, F f) {
    F p = f_set(c[0]);
    for (int i = 1; i <= Degree; ++i) p = f_fma(p, f, f_set(c[i]));
    return p;
}

// e^-n from a table of sixteen, in a register or two.
template <int Degree>
F by_table(const float* c, const float* table, F y) {
    const F near = f_min(y, f_set(15.0f));
    return f_lookup(table, i_truncate(near)) * polynomial<Degree>(c, f_fraction(near));
}

// 2^-n from exponent bits.
template <int Degree>
F by_exponent(const float* c, const float*, F y) {
    const F near = f_min(y * f_set(1.44269504f), f_set(126.0f));
    const F power = f_from_bits(i_shl<23>(i_set(127) - i_truncate(near)));
    return power * polynomial<Degree>(c, f_fraction(near));
}

F exact(const float*, const float*, F y) { return f_exp(f_set(0.0f) - y); }

template <F Form(const float*, const float*, F)>
double best(const float* c, const float* table, const float* y, float* out, int n, int repeats) {
    double least = 1e30;
    for (int r = 0; r < repeats; ++r) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < n; i += 16) f_store(out + i, Form(c, table, f_load(y + i)));
        const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
        least = std::min(least, took.count());
    }
    return least;
}

template <int Degree>
double of_degree(int form, const float* c, const float* table, const float* y, float* out, int n, int repeats) {
    return form == 0 ? best<by_table<Degree>>(c, table, y, out, n, repeats)
                     : best<by_exponent<Degree>>(c, table, y, out, n, repeats);
}

}  // namespace

// Nanoseconds for n values (a multiple of 16), the least of `repeats`. form: 0 table, 1 exponent bits, 2 exact.
extern "C" double time_form(int form, int degree, const float* coefficients, const float* table, const float* y,
                            float* out, int n, int repeats) {
    if (form == 2) return best<exact>(coefficients, table, y, out, n, repeats);
    switch (degree) {
        case 1: return of_degree<1>(form, coefficients, table, y, out, n, repeats);
        case 2: return of_degree<2>(form, coefficients, table, y, out, n, repeats);
        case 3: return of_degree<3>(form, coefficients, table, y, out, n, repeats);
        case 4: return of_degree<4>(form, coefficients, table, y, out, n, repeats);
        default: return of_degree<5>(form, coefficients, table, y, out, n, repeats);
    }
}
