// Weights of decode in fixed point (fixed_softmax.h): a lane is a token.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../vectors.h"
#include "fixed_softmax.h"
#include "lanes.h"
#include "visibility.h"

namespace turbo::TURBO_ISA {

// A row over a block: its maximum, the sum of its weights, and the unit of its products.
struct BlockStats {
    float row_max, row_sum, value_unit;
};

// Vectors of a block's tokens, each of kQueryVectors vectors of 32-bit lanes.
constexpr int kWords = kBlock / kQueryLanes;

// 64 numbers of 16 bits, in the order of tokens in vectors.
struct TokenWords {
    W words[kWords];

    explicit TokenWords(const std::int32_t* lanes) {
        for (int i = 0; i < kWords; ++i) {
            I vectors[kQueryVectors];
            for (int n = 0; n < kQueryVectors; ++n) vectors[n] = i_load(lanes + kQueryLanes * i + 16 * n);
            words[i] = w_pack(vectors);
        }
    }
};

// A block's relative scales, and the largest.
struct FixedBlock {
    TokenWords key, value;
    float key_top, value_top;

    explicit FixedBlock(const FixedScales& scales)
        : key(scales.key), value(scales.value), key_top(scales.key_top), value_top(scales.value_top) {}
};

struct TokenNumbers {
    alignas(64) std::int32_t number[kBlock];

    constexpr TokenNumbers() : number() {
        for (int t = 0; t < kBlock; ++t) number[t] = t;
    }
};

// `FixedRows` of up to sixteen rows over a block, row by row.
struct FixedRowTable {
    alignas(64) std::int32_t shift[16], most[16], power[16], factor[16];
    alignas(64) float logit[16], cut[16];

    FixedRowTable(const float* unit, const std::int32_t* shifts, float key_top) {
        const FixedRows rows(f_load(unit), i_load(shifts), key_top);
        i_store(shift, rows.shift), i_store(most, rows.most), i_store(power, rows.power);
        i_store(factor, rows.factor), f_store(logit, rows.logit), f_store(cut, rows.cut());
    }
};

inline std::int32_t largest_of(const W* words) {
    W top = words[0];
    for (int i = 1; i < kWords; ++i) top = w_max(top, words[i]);
    return w_largest(top);
}

// Weights of row r of the table from its products with the keys of the block: writes p and p_sum. shown: 1 if a mask
// shows a key, else 0; or null.
inline BlockStats fixed_row_weights(const FixedRowTable& rows, int r, const FixedBlock& block, float mean,
                                    bool row_scale, VisibleKeys visible, const std::int32_t* shown,
                                    const std::int32_t* products, std::uint8_t* p, std::int32_t& p_sum) {
    const W unseen = w_set(kUnseen), low = w_set(visible.low), high = w_set(visible.high);
    const bool partial = shown || !visible.all();
    const I shift = i_set(rows.shift[r]);
    W score[kWords], product[kWords];
    I lanes[kQueryVectors];
    for (int i = 0; i < kWords; ++i) {
        for (int n = 0; n < kQueryVectors; ++n) lanes[n] = i_sar(i_load(products + kQueryLanes * i + 16 * n), shift);
        score[i] = w_product_rounded(w_pack(lanes), block.key.words[i]);
    }
    if (partial) {
        static constexpr TokenNumbers tokens;
        const TokenWords at(tokens.number), show(shown ? shown : tokens.number);
        for (int i = 0; i < kWords; ++i) {
            score[i] = w_between(low, at.words[i], high, score[i], unseen);
            if (shown) score[i] = w_between(w_set(1), show.words[i], w_set(2), score[i], unseen);
        }
    }
    const std::int32_t top = largest_of(score);
    const W most = w_set(rows.most[r]), power = w_set(rows.power[r]), factor = w_set(rows.factor[r]);
    W sums = w_set(0);
    for (int i = 0; i < kWords; ++i) {
        W weight = fixed_weight(w_set(top) - score[i], most, power, factor);
        if (partial) weight = w_keep_other(score[i], unseen, weight);
        sums = sums + w_product_rounded(weight, w_set(kFixedSums));
        product[i] = w_product_rounded(weight, block.value.words[i]);
    }
    const std::int32_t levels = row_scale ? fixed_levels(largest_of(product)) : static_cast<std::int32_t>(kLevels);
    W codes = w_set(0);
    for (int i = 0; i < kWords; ++i) {
        const W code = w_product_rounded(product[i], w_set(levels));
        codes = codes + code;
        w_unpack(code, lanes);
        for (int n = 0; n < kQueryVectors; ++n) i_store_u8(p + kQueryLanes * i + 16 * n, lanes[n]);
    }
    p_sum = w_sum(codes);
    const float none = -std::numeric_limits<float>::infinity();
    const float row_max = top == kUnseen ? none : std::fma(static_cast<float>(top) + rows.cut[r], rows.logit[r], mean);
    return {row_max, static_cast<float>(w_sum(sums)) / static_cast<float>(kFixedSums),
            row_scale ? fixed_unit(levels, block.value_top) : block.value_top / kLevels};
}

}  // namespace turbo::TURBO_ISA
