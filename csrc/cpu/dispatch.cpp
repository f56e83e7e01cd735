#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(TURBO_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace turbo {

namespace serial {
Kernels kernels();
}
#ifdef TURBO_HAVE_AVX2
namespace avx2 {
Kernels kernels();
}
#endif
#ifdef TURBO_HAVE_AVXVNNI
namespace avxvnni {
Kernels kernels();
}
#endif
#ifdef TURBO_HAVE_AMX
namespace amx {
Kernels kernels();
}
#endif
#ifdef TURBO_HAVE_AVX512VNNI
namespace avx512vnni {
Kernels kernels();
}
#endif

namespace {

#if defined(__x86_64__) && defined(__GNUC__)
[[maybe_unused]] bool has_avxvnni() {
    unsigned a, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

[[maybe_unused]] bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
#endif

#if defined(TURBO_HAVE_AMX) && defined(__linux__)
// Linux requires each process to request permission for tile registers.
bool has_amx() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    return has_avx512vnni() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<Kernels> find() {
    std::vector<Kernels> found;
#if defined(TURBO_HAVE_AMX) && defined(__linux__)
    if (has_amx()) found.push_back(amx::kernels());
#endif
#ifdef TURBO_HAVE_AVX512VNNI
    if (has_avx512vnni()) found.push_back(avx512vnni::kernels());
#endif
#ifdef TURBO_HAVE_AVXVNNI
    if (has_avxvnni()) found.push_back(avxvnni::kernels());
#endif
#ifdef TURBO_HAVE_AVX2
    if (has_avx2()) found.push_back(avx2::kernels());
#endif
    found.push_back(serial::kernels());
    return found;
}

const std::vector<Kernels>& all() {
    static const std::vector<Kernels> found = find();
    return found;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const auto& table : all()) names.emplace_back(table.isa);
    return names;
}

const Kernels& kernels_for(const std::string& isa) {
    std::string names;
    for (const auto& table : all()) {
        if (isa == table.isa) return table;
        names += (names.empty() ? "" : ", ") + std::string(table.isa);
    }
    throw std::invalid_argument("TURBOATTENTION_ISA: expected one of " + names + ", got \"" + isa + "\"");
}

const Kernels& kernels() {
    const char* name = std::getenv("TURBOATTENTION_ISA");
    return name && *name ? kernels_for(name) : all().front();
}

}  // namespace turbo
