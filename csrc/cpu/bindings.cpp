// The Python module turboattention._cpu. Everything is an address or a number; shapes, strides and
// memory are the launchers' affair (src/turboattention/kernels/cpu).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"

namespace nb = nanobind;

void bind_quantize(nb::module_&);

namespace {

// The struct that Python packs field by field (kernels/cpu/attention.py) is read as it lies: every
// member of AttendArgs is eight bytes, but for two floats that share one place each with nothing.
void attend(std::uintptr_t arguments, const std::string& isa) {
    const auto& kernels = isa.empty() ? turbo::kernels() : turbo::kernels_for(isa);
    const nb::gil_scoped_release unlocked;
    kernels.attend(*reinterpret_cast<const turbo::AttendArgs*>(arguments));
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "TurboAttention's CPU kernels.";
    m.def("isas", &turbo::usable_isas, "Instruction sets compiled in that this processor has, the best first.");
    m.def("isa", [] { return std::string(turbo::kernels().isa); }, "The one in use (TURBOATTENTION_ISA overrides).");
    m.def("threads", [] { return std::string(turbo::thread_provider()); }, "What carries the threads.");
    m.def("attend", &attend, nb::arg("arguments"), nb::arg("isa") = "", "Attention; `arguments` is an AttendArgs.");
    m.attr("attend_bytes") = sizeof(turbo::AttendArgs);
    bind_quantize(m);
}
