// The peak INT8 throughput of the processor: dot products of registers with themselves.
#pragma once

#include <atomic>
#include <cstdint>

#include "../vectors.h"
#include "lane_products.h"
#include "lane_products_amx.h"

namespace turbo::TURBO_ISA {

// Runs `rounds` rounds; returns the number of multiplications and additions in one.
inline std::int64_t peak_round(std::int64_t rounds) {
#ifdef TURBO_AMX
    alignas(64) static const std::int8_t kSome[64 * 16] = {1, 2, 3};
    const Tiles tiles(64);
    _tile_loadd(4, kSome, 64);
    _tile_loadd(6, kSome, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t i = 0; i < rounds; ++i) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 6);
        _tile_dpbssd(2, 4, 6);
        _tile_dpbssd(3, 4, 6);
    }
    return 4 * 2 * 16 * 16 * 64;
#else
    constexpr int kSums = kQueryVectors == 2 ? 12 : 6;
    alignas(64) std::uint8_t some[64 + kSums];
    for (int i = 0; i < 64 + kSums; ++i) some[i] = static_cast<std::uint8_t>(i % 16);
    I sums[kSums];
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) sums[k] = i_set(0);
    for (std::int64_t i = 0; i < rounds; ++i) {
        // Other bytes each time: if a product takes several instructions, all but the sum would be computed once for
        // all.
        const Bytes a = b_load(some);
#pragma GCC unroll 12
        for (int k = 0; k < kSums; ++k) sums[k] = dot_small(sums[k], a, b_load(kOffset ? some : some + k));
#if defined(__GNUC__) && !defined(TURBO_SERIAL)
        __asm__ volatile("" : : "r"(some) : "memory");
#endif
    }
    // Unused results might not be computed.
    I total = i_set(0);
#pragma GCC unroll 12
    for (int k = 0; k < kSums; ++k) total = total + sums[k];
    static std::atomic<std::int32_t> sink;
    sink.store(i_sum(total), std::memory_order_relaxed);
    return kSums * 2 * 64;
#endif
}

}  // namespace turbo::TURBO_ISA
