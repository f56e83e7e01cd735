// Errors for widths that no kernel was compiled for (widths.h). They are defined once, outside the code of an
// instruction set, since they use the standard library (CMakeLists.txt).
#pragma once

#include <cstddef>
#include <cstdint>

namespace turbo {

// Widths of the two halves of a head's keys.
struct KeyWidths {
    int wide, narrow;
};

// Throw std::invalid_argument, which names the width and the `count` supported ones. In a parallel loop, the caller of
// the loop receives it (threads.h); Python receives ValueError.
[[noreturn]] void unsupported_width(std::int64_t bits, const int* supported, std::size_t count);
[[noreturn]] void unsupported_width(std::int64_t wide, std::int64_t narrow, const KeyWidths* supported,
                                    std::size_t count);

}  // namespace turbo
