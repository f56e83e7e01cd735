// Runs the portable kernels on seeded inputs and prints a checksum of each result: `make test-arm` compares those of an
// aarch64 build under QEMU with those of this machine. Quantization, pages of every width, attention over them (decode
// and prefill; windows, softcap, without a causal mask), and prompts and steps over a cache.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "step.h"

namespace turbo::serial {
Kernels kernels();
}

namespace {

using std::int64_t;
using turbo::kBlock;

constexpr int64_t kHeads = 2, kGroup = 2, kPages = 2, kTokens = 3 * kBlock - 7;  // the last block is incomplete

// FNV-1a, of the bytes: both machines are little-endian.
template <class T>
std::uint64_t checksum(const std::vector<T>& values) {
    std::uint64_t hash = 14695981039346656037u;
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
    return hash;
}

template <class T>
void print(const char* what, int64_t a, int64_t b, const std::vector<T>& values) {
    std::printf("%-10s %3lld %3lld %016llx\n", what, static_cast<long long>(a), static_cast<long long>(b),
                static_cast<unsigned long long>(checksum(values)));
}

// About normal: sums of four uniform values, exact in float32. Every eighth channel has an offset, as keys of models
// do.
std::vector<float> values(std::uint64_t seed, int64_t rows, int64_t channels) {
    std::vector<float> x(rows * channels);
    for (std::size_t i = 0; i < x.size(); ++i) {
        std::int32_t sum = 0;
        for (int k = 0; k < 4; ++k) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            sum += static_cast<std::int32_t>(seed >> 48) - 32768;
        }
        x[i] = static_cast<float>(sum) / 37837.0f + (i % channels % 8 ? 0.0f : 4.0f);
    }
    return x;
}

// 16-bit floats with the bits of `x`, cut: of bfloat16 these are its upper half, of float16 any finite pattern will do.
std::vector<std::uint16_t> halves(const std::vector<float>& x, int64_t kind) {
    std::vector<std::uint16_t> cut(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, &x[i], 4);
        cut[i] = static_cast<std::uint16_t>(kind == turbo::kBfloat16 ? bits >> 16 : (bits >> 16 & 0xbfffu));
    }
    return cut;
}

turbo::FloatRows rows_of(void* data, int64_t kind, int64_t rows, int64_t channels) {
    return {data, kind, 0, rows * channels, channels, nullptr};
}

struct Rows {
    std::vector<std::int8_t> codes;
    std::vector<float> scales;
};

Rows quantized(void* x, int64_t kind, int64_t channels, bool rotate) {
    static const int64_t begin = 0, end = kTokens, first = 0, target = 0;
    Rows rows{std::vector<std::int8_t>(kHeads * kTokens * channels), std::vector<float>(kHeads * kTokens)};
    turbo::TokenArgs args{};
    args.batch = 1, args.heads = kHeads, args.head_dim = channels, args.rotate = rotate, args.threads = 1;
    args.x = rows_of(x, kind, kTokens, channels);
    args.begin = &begin, args.end = &end, args.first = &first, args.target = &target;
    args.codes = rows.codes.data(), args.scales = rows.scales.data();
    args.batch_rows = kHeads * kTokens, args.head_rows = kTokens;
    bool finite = true;
    for (int64_t h = 0; h < kHeads; ++h) finite &= turbo::serial::kernels().quantize_tokens(args, 0, h, 0, kTokens);
    if (!finite) std::puts("not finite");
    return rows;
}

// Widths of the two halves of a head's keys, and of its values.
struct Bits {
    int64_t wide, narrow, v;

    int64_t code() const { return 100 * wide + 10 * narrow + v; }  // for a line of the output
    int64_t halves(int side) const { return side ? 2 * v : wide + narrow; }
};

// Pages of one format, with their sections one after another.
struct Pages {
    turbo::HeadOffsets offsets[kHeads][2];
    turbo::PageSections layout;
    int64_t bytes_per_page;
    std::vector<std::uint8_t> bytes;

    Pages(const Bits& bits, int64_t channels) : bytes_per_page(0) {
        const auto section = [&](int64_t size) { return bytes_per_page += size, bytes_per_page - size; };
        for (auto& head : offsets)
            for (int side = 0; side < 2; ++side) {
                const int64_t codes = section(kBlock * channels * bits.halves(side) / 16);
                head[side] = {{side ? bits.v : bits.wide, side ? bits.v : bits.narrow}, codes, -1, -1};
            }
        for (auto& head : offsets)
            for (auto& side : head)
                if (side.bits[0] < 8) side.step = section(channels), side.zero = section(channels);
        layout.offsets = &offsets[0][0];
        for (int side = 0; side < 2; ++side) layout.token_scales[side] = section(kHeads * kBlock);
        for (int side = 0; side < 2; ++side) layout.scales[side] = section(kHeads * 4);
        bytes_per_page = (bytes_per_page + 15) / 16 * 16;
        bytes.assign(kPages * bytes_per_page, 0);
    }
    Pages(const Pages&) = delete;
};

// The first tokens of K and V as pages, and back: tiles [page, head, block].
void encode(const Rows (&kv)[2], const Bits& bits, int64_t channels, Pages& pages) {
    Rows tiles[2];
    turbo::PageArgs args{};
    args.pages = kPages, args.heads = kHeads, args.head_dim = args.value_dim = channels, args.block = kBlock;
    args.head_rows = kBlock, args.page_bytes = pages.bytes_per_page, args.search = 1, args.layout = pages.layout;
    args.bytes = pages.bytes.data(), args.threads = 1;
    for (int side = 0; side < 2; ++side) {
        for (int64_t tile = 0; tile < kPages * kHeads; ++tile) {
            const int64_t row = tile % kHeads * kTokens + tile / kHeads * kBlock;
            const auto codes = kv[side].codes.begin() + row * channels;
            const auto scales = kv[side].scales.begin() + row;
            tiles[side].codes.insert(tiles[side].codes.end(), codes, codes + kBlock * channels);
            tiles[side].scales.insert(tiles[side].scales.end(), scales, scales + kBlock);
        }
        args.codes[side] = tiles[side].codes.data(), args.scales[side] = tiles[side].scales.data();
    }
    const auto kernels = turbo::serial::kernels();
    const auto each = [&](auto kernel) {
        for (int64_t i = 0; i < kPages * kHeads * 2; ++i) kernel(args, i / 2 / kHeads, i / 2 % kHeads, i % 2);
    };
    each(kernels.encode_head);
    print("page", bits.code(), channels, pages.bytes);
    each(kernels.decode_head);
    for (const auto& side : tiles) print("decoded", bits.code(), channels, side.codes);
}

void attend(Rows (&kv)[2], Pages& pages, const Bits& bits, int64_t channels, int64_t queries) {
    const int64_t first = kTokens - queries, valid = queries, length = kTokens, count = kPages, start = kPages * kBlock;
    std::uint64_t addresses[kPages];
    for (int64_t p = 0; p < kPages; ++p)
        addresses[p] = reinterpret_cast<std::uint64_t>(pages.bytes.data() + p * pages.bytes_per_page);
    auto q = values(3, kHeads * kGroup * queries, channels);
    std::vector<float> out(q.size()), lse(kHeads * kGroup * queries);
    std::atomic<std::int32_t> non_finite{0};
    turbo::AttendArgs args{};
    args.batch = 1, args.heads = kHeads, args.group = kGroup, args.queries = queries;
    args.head_dim = args.value_dim = channels, args.rotate = 1, args.scale = 0.125, args.non_finite = &non_finite;
    args.q = rows_of(q.data(), turbo::kFloat32, queries, channels);
    args.out = rows_of(out.data(), turbo::kFloat32, queries, channels);
    args.lse = lse.data();
    args.first_position = &first, args.valid_rows = &valid, args.lengths = &length, args.mean_from_block = kPages + 1;
    args.pages = addresses, args.page_counts = &count, args.page_stride = kPages, args.sinks = pages.layout;
    args.compressed = pages.layout;
    for (int side = 0; side < 2; ++side) {
        args.tail.codes[side] = kv[side].codes.data() + start * channels;
        args.tail.scales[side] = kv[side].scales.data() + start;
    }
    args.tail.start = &start, args.tail.batch_rows = kHeads * kTokens, args.tail.head_rows = kTokens;
    args.threshold = -9.0f, args.row_scale = 1, args.causal = 1, args.threads = 1;
    const auto both_windows = [&](const char* what) {
        for (const int64_t window : {int64_t{0}, int64_t{100}}) {
            args.window = window;
            turbo::serial::kernels().attend(args);
            print(what, bits.code(), queries, out);  // lse takes the C library's logarithm, whose last bit differs
        }
    };
    for (args.softmax = 0; args.softmax <= 3; ++args.softmax) both_windows("attend");
    args.softmax = 3, args.softcap = 30.0f;
    both_windows("softcap");
    args.softcap = 0.0f, args.causal = 0;
    both_windows("all keys");
    args.causal = 1;
    args.softmax = 0, args.row_scale = 0, args.by_tile = args.approximate_rescale = 1;  // the paper's
    both_windows("by tile");
    if (non_finite) std::puts("not finite");
}

// A prompt that fills two blocks, another piece that fills the third, and a step, as a cache runs them: the results of
// each, then the pages and the buffer.
void prompts(const Bits& bits, int64_t channels) {
    Pages pages(bits, channels);
    pages.bytes.assign((kPages + 1) * pages.bytes_per_page, 0);
    std::vector<std::int8_t> codes[2];
    std::vector<std::uint16_t> scales[2];
    turbo::StepArgs step{};
    step.capacity = kBlock;
    for (int side = 0; side < 2; ++side) {
        codes[side].assign(kHeads * kBlock * channels, 0), scales[side].assign(kHeads * kBlock, 0);
        step.codes[side] = codes[side].data(), step.scales[side] = scales[side].data();
    }
    std::uint64_t addresses[kPages + 1];
    for (int64_t p = 0; p <= kPages; ++p)
        addresses[p] = reinterpret_cast<std::uint64_t>(pages.bytes.data() + p * pages.bytes_per_page);
    int64_t before = 0, start = 0, count = 0;
    turbo::AttendArgs& a = step.attend;
    a.batch = 1, a.heads = kHeads, a.group = kGroup, a.head_dim = a.value_dim = channels, a.rotate = 1;
    a.scale = 0.125, a.mean_from_block = kPages + 2, a.pages = addresses, a.page_counts = &count;
    a.page_stride = kPages + 1, a.sinks = a.compressed = pages.layout, a.tail.start = &start;
    a.softmax = 3, a.threshold = -9.0f, a.row_scale = 1, a.causal = 1, a.threads = 1;
    turbo::StoreArgs& s = step.store;
    s.batch = 1, s.heads = kHeads, s.head_dim = s.value_dim = channels, s.rotate = 1, s.mean_from = kTokens;
    s.before = &before, s.tail.start = &start, s.page_bytes = s.sink_bytes = pages.bytes_per_page, s.search = 1;
    s.layout = s.sinks = pages.layout, s.threads = 1;
    for (const int64_t tokens : {150, 50, 1}) {
        auto q = values(4 + tokens, kHeads * kGroup * tokens, channels),
             k = values(5 + tokens, kHeads * tokens, channels);
        auto v = values(6 + tokens, kHeads * tokens, channels);
        std::vector<float> out(q.size());
        const int64_t filled = (before - start + tokens) / kBlock;
        a.queries = s.tokens = tokens;
        a.q = rows_of(q.data(), turbo::kFloat32, tokens, channels);
        a.out = rows_of(out.data(), turbo::kFloat32, tokens, channels);
        s.k = rows_of(k.data(), turbo::kFloat32, tokens, channels);
        s.v = rows_of(v.data(), turbo::kFloat32, tokens, channels);
        s.fresh = filled ? addresses + count : nullptr, s.fresh_blocks = filled;
        if (turbo::run_step(step) != turbo::kAllFinite) std::puts("not finite");
        before += tokens, count += filled, start += filled * kBlock;
        print("prompt", bits.code(), tokens, out);
    }
    print("pages", bits.code(), channels, pages.bytes);
    for (int side = 0; side < 2; ++side) {
        print("buffer", bits.code(), channels, codes[side]);
        print("scales", bits.code(), channels, scales[side]);
    }
}

}  // namespace

int main() {
    for (const int64_t channels : {16, 64, 128}) {
        auto k = values(1, kHeads * kTokens, channels), v = values(2, kHeads * kTokens, channels);
        for (const int64_t kind : {turbo::kBfloat16, turbo::kFloat16}) {
            auto cut = halves(k, kind);
            const Rows rows = quantized(cut.data(), kind, channels, true);
            print("codes", kind, channels, rows.codes);
            print("scales", kind, channels, rows.scales);
        }
        Rows kv[2] = {quantized(k.data(), turbo::kFloat32, channels, true),
                      quantized(v.data(), turbo::kFloat32, channels, true)};
        for (const auto& side : kv) print("codes", 0, channels, side.codes), print("scales", 0, channels, side.scales);
        print("unrotated", 0, channels, quantized(k.data(), turbo::kFloat32, channels, false).codes);
        for (const Bits& bits : {Bits{8, 8, 8}, {4, 4, 4}, {3, 3, 3}, {2, 2, 2}, {5, 3, 4}, {4, 2, 3}, {3, 1, 2}}) {
            Pages pages(bits, channels);
            encode(kv, bits, channels, pages);
            for (const int64_t queries : {1, 7, 40}) attend(kv, pages, bits, channels, queries);
            prompts(bits, channels);
        }
    }
}
