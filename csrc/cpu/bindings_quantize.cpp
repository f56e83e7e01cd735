// Stage 1 and the page codec for Python: each call takes one struct of quantize/interface.h, and is divided into parts
// for the threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>

#include "dispatch.h"

namespace nb = nanobind;

namespace {

constexpr std::int64_t kRowsPerPart = 64;
// Waking threads costs as much as a few hundred rows.
constexpr std::int64_t kRowsWorthThreads = 512;

const turbo::Kernels& chosen(const std::string& isa) {
    return isa.empty() ? turbo::kernels() : turbo::kernels_for(isa);
}

std::int64_t parts_of(std::int64_t rows) { return (rows + kRowsPerPart - 1) / kRowsPerPart; }

int threads_for(std::int64_t threads, std::int64_t rows) {
    return rows < kRowsWorthThreads ? 1 : static_cast<int>(threads);
}

// body(b, h, begin, end) over all heads and tokens `from` to `to` (exclusive) of every sequence, in parts.
template <class F>
void over_rows(std::int64_t batch, std::int64_t heads, std::int64_t from, std::int64_t to, std::int64_t threads,
               const F& body) {
    if (to <= from) return;
    const std::int64_t parts = parts_of(to - from), count = batch * heads * parts;
    turbo::parallel_for(count, threads_for(threads, batch * heads * (to - from)), [&](std::int64_t i) {
        const std::int64_t begin = from + i % parts * kRowsPerPart, head = i / parts;
        body(head / heads, head % heads, begin, std::min(begin + kRowsPerPart, to));
    });
}

bool quantize_tokens(std::uintptr_t address, const std::string& isa) {
    const auto& kernels = chosen(isa);
    const auto& a = *reinterpret_cast<const turbo::TokenArgs*>(address);
    const nb::gil_scoped_release unlocked;
    if (!a.batch) return true;
    const std::int64_t from = *std::min_element(a.begin, a.begin + a.batch);
    const std::int64_t to = *std::max_element(a.end, a.end + a.batch);
    std::atomic<bool> finite{true};
    over_rows(a.batch, a.heads, from, to, a.threads, [&](auto b, auto h, auto begin, auto end) {
        if (!kernels.quantize_tokens(a, b, h, std::max(begin, a.begin[b]), std::min(end, a.end[b]))) finite = false;
    });
    return finite;
}

void first_block_mean(std::uintptr_t address, const std::string& isa) {
    const auto& kernels = chosen(isa);
    const auto& a = *reinterpret_cast<const turbo::MeanArgs*>(address);
    const nb::gil_scoped_release unlocked;
    for (std::int64_t i = 0; i < a.batch * a.heads; ++i) kernels.first_block_mean(a, i / a.heads, i % a.heads);
}

template <class Kernel>
void over_heads(const turbo::PageArgs& a, Kernel kernel) {
    const std::int64_t count = a.pages * a.heads * 2;
    turbo::parallel_for(count, static_cast<int>(std::min(a.threads, count)),
                        [&](std::int64_t i) { kernel(a, i / 2 / a.heads, i / 2 % a.heads, i % 2); });
}

void encode_pages(std::uintptr_t address, const std::string& isa) {
    const auto& kernels = chosen(isa);
    const auto& a = *reinterpret_cast<const turbo::PageArgs*>(address);
    const nb::gil_scoped_release unlocked;
    over_heads(a, kernels.encode_head);
}

void decode_pages(std::uintptr_t address, const std::string& isa) {
    const auto& kernels = chosen(isa);
    const auto& a = *reinterpret_cast<const turbo::PageArgs*>(address);
    const nb::gil_scoped_release unlocked;
    over_heads(a, kernels.decode_head);
}

}  // namespace

void bind_quantize(nb::module_& m) {
    const auto arguments = nb::arg("arguments");
    const auto isa = nb::arg("isa") = "";
    m.def("quantize_tokens", &quantize_tokens, arguments, isa, "Stage 1 of tokens; whether all values were finite.");
    m.def("first_block_mean", &first_block_mean, arguments, isa, "The mean that smoothing subtracts from keys.");
    m.def("encode_pages", &encode_pages, arguments, isa, "INT8 tiles to pages.");
    m.def("decode_pages", &decode_pages, arguments, isa, "Pages to INT8 tiles.");
    m.attr("quantize_bytes") =
        nb::make_tuple(sizeof(turbo::TokenArgs), sizeof(turbo::MeanArgs), sizeof(turbo::PageArgs));
}
