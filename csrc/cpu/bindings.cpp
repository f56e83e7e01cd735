// The Python module turboattention._cpu. Arguments are addresses and numbers; the launchers
// (src/turboattention/kernels/cpu) check shapes and strides, and allocate memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "dispatch.h"
#include "step.h"
#include "store.h"

namespace nb = nanobind;

void bind_quantize(nb::module_&);

namespace {

// Structs that Python fills field by field (kernels/cpu/*.py) are read without conversion.
bool attend(std::uintptr_t arguments, const std::string& isa) {
    const auto& kernels = isa.empty() ? turbo::kernels() : turbo::kernels_for(isa);
    const nb::gil_scoped_release unlocked;
    auto a = *reinterpret_cast<const turbo::AttendArgs*>(arguments);
    std::atomic<std::int32_t> non_finite{0};
    a.non_finite = &non_finite;
    kernels.attend(a);
    return !non_finite;
}

int step(std::uintptr_t arguments) {
    const nb::gil_scoped_release unlocked;
    return turbo::run_step(*reinterpret_cast<const turbo::StepArgs*>(arguments));
}

int store(std::uintptr_t arguments) {
    const nb::gil_scoped_release unlocked;
    return turbo::store(*reinterpret_cast<const turbo::StoreArgs*>(arguments));
}

// The peak INT8 throughput of `threads` threads on registers, in 10^9 operations per second.
double peak_gops(const std::string& isa, int threads) {
    const auto& kernels = turbo::kernels_for(isa);
    const nb::gil_scoped_release unlocked;
    double best = 0.0;
    for (int repeat = 0; repeat < 5; ++repeat) {
        std::atomic<std::int64_t> operations{0};
        const std::int64_t rounds = isa == "serial" ? 100'000 : 1'000'000;
        const auto start = std::chrono::steady_clock::now();
        turbo::parallel_for(threads, threads, [&](std::int64_t) { operations += kernels.peak_round(rounds) * rounds; });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        best = std::max(best, static_cast<double>(operations) / seconds.count() * 1e-9);
    }
    return best;
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "TurboAttention's CPU kernels.";
    m.def("isas", &turbo::usable_isas, "Instruction sets compiled in that this processor supports, the best first.");
    m.def(
        "isa", [] { return std::string(turbo::kernels().isa); }, "The one in use, which TURBOATTENTION_ISA overrides.");
    m.def("threads", [] { return std::string(turbo::thread_provider()); }, "The source of threads.");
    m.def("take_most_workers", &turbo::take_most_workers,
          "The largest number of threads that worked on one call since this was last asked.");
    m.def("attend", &attend, nb::arg("arguments"), nb::arg("isa") = "",
          "Attention; `arguments` is the address of an AttendArgs. Whether all queries were finite.");
    m.def("peak_gops", &peak_gops, nb::arg("isa"), nb::arg("threads") = 1,
          "The peak INT8 throughput of an instruction set on registers, in 10^9 operations per second.");
    m.def("step", &step, nb::arg("arguments"), "A decode step; 1, 2 or 3 if q, k or v is not finite, else 0.");
    m.def("store", &store, nb::arg("arguments"),
          "Stores new tokens in tail rows and pages; 2 or 3 if k or v is not finite, else 0.");
    m.attr("format") = turbo::kFormat;
    m.attr("store_bytes") = sizeof(turbo::StoreArgs);
    m.attr("step_bytes") = sizeof(turbo::StepArgs);
    m.attr("attend_bytes") = sizeof(turbo::AttendArgs);
    bind_quantize(m);
}
