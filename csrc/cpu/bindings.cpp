// The Python module turboattention._cpu. Everything is an address or a number; shapes, strides and
// memory are the launchers' affair (src/turboattention/kernels/cpu).
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

// Structs that Python packs field by field (kernels/cpu/*.py) are read as they lie.
bool attend(std::uintptr_t arguments, const std::string& isa) {
    const auto& kernels = isa.empty() ? turbo::kernels() : turbo::kernels_for(isa);
    const nb::gil_scoped_release unlocked;
    auto a = *reinterpret_cast<const turbo::AttendArgs*>(arguments);
    std::atomic<std::int32_t> unfit{0};
    a.unfit = &unfit;
    kernels.attend(a);
    return !unfit;
}

int step(std::uintptr_t arguments) {
    const nb::gil_scoped_release unlocked;
    return turbo::run_step(*reinterpret_cast<const turbo::StepArgs*>(arguments));
}

int store(std::uintptr_t arguments) {
    const nb::gil_scoped_release unlocked;
    return turbo::store(*reinterpret_cast<const turbo::StoreArgs*>(arguments));
}

// INT8 operations a second, in billions, that `threads` threads reach in registers.
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
    m.def("isas", &turbo::usable_isas, "Instruction sets compiled in that this processor has, the best first.");
    m.def("isa", [] { return std::string(turbo::kernels().isa); }, "The one in use (TURBOATTENTION_ISA overrides).");
    m.def("threads", [] { return std::string(turbo::thread_provider()); }, "What carries the threads.");
    m.def("take_most_workers", &turbo::take_most_workers,
          "The most threads that shared the work of one call since this was last asked.");
    m.def("attend", &attend, nb::arg("arguments"), nb::arg("isa") = "",
          "Attention; `arguments` is an AttendArgs. Whether all queries were finite.");
    m.def("peak_gops", &peak_gops, nb::arg("isa"), nb::arg("threads") = 1,
          "INT8 operations a second, in billions, that an instruction set reaches in registers.");
    m.def("step", &step, nb::arg("arguments"), "A decode step; 1, 2, 3 where q, k, v are not finite.");
    m.def("store", &store, nb::arg("arguments"),
          "New tokens into tail blocks and pages; 1, 2 where k, v are not finite.");
    m.attr("format") = turbo::kFormat;
    m.attr("store_bytes") = sizeof(turbo::StoreArgs);
    m.attr("step_bytes") = sizeof(turbo::StepArgs);
    m.attr("attend_bytes") = sizeof(turbo::AttendArgs);
    bind_quantize(m);
}
