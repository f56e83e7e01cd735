#include "unsupported.h"

#include <stdexcept>
#include <string>

namespace turbo {
namespace {

std::string both(std::int64_t wide, std::int64_t narrow) { return std::to_string(wide) + "/" + std::to_string(narrow); }

}  // namespace

void unsupported_width(std::int64_t bits, const int* supported, std::size_t count) {
    std::string names;
    for (std::size_t i = 0; i < count; ++i) names += (i ? ", " : "") + std::to_string(supported[i]);
    throw std::invalid_argument("bits: expected a width of this CPU kernel (" + names + "), got " +
                                std::to_string(bits));
}

void unsupported_width(std::int64_t wide, std::int64_t narrow, const KeyWidths* supported, std::size_t count) {
    std::string names;
    for (std::size_t i = 0; i < count; ++i) names += (i ? ", " : "") + both(supported[i].wide, supported[i].narrow);
    throw std::invalid_argument("bits: expected widths of K of this CPU kernel (" + names + "), got " +
                                both(wide, narrow));
}

}  // namespace turbo
