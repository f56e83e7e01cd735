// Weights of few query rows in fixed point (fixed_softmax.h): a lane is a token.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "../vectors.h"
#include "fixed_softmax.h"
#include "lanes.h"
#include "visibility.h"

namespace turbo::TURBO_ISA {

// What a row saw in a block: its maximum, the sum of its weights, and what one unit of its products is.
struct Seen {
    float row_max, row_sum, value_unit;
};

// Vectors of a block's tokens, each of kQueryVectors vectors of 32-bit lanes.
constexpr int kWords = kBlock / kQueryLanes;

// A block's relative scales, and its largest; tokens as they lie in vectors.
struct FixedBlock {
    W key[kWords], value[kWords], token[kWords];
    float key_top, value_top;

    explicit FixedBlock(const BlockScales& scales) {
        FixedScales fixed;
        set_fixed_scales(scales, fixed);
        key_top = fixed.key_top, value_top = fixed.value_top;
        alignas(64) std::int32_t index[kBlock];
        for (int t = 0; t < kBlock; ++t) index[t] = t;
        for (int i = 0; i < kWords; ++i)
            key[i] = packed(fixed.key, i), value[i] = packed(fixed.value, i), token[i] = packed(index, i);
    }

    static W packed(const std::int32_t* lanes, int i) {
        I vectors[kQueryVectors];
        for (int n = 0; n < kQueryVectors; ++n) vectors[n] = i_load(lanes + kQueryLanes * i + 16 * n);
        return w_pack(vectors);
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
    I lanes[kQueryVectors];
    w_unpack(top, lanes);
    for (int n = 1; n < kQueryVectors; ++n) lanes[0] = i_max(lanes[0], lanes[n]);
    return static_cast<std::int32_t>(f_reduce_max(f_from_int(lanes[0])));
}

// Weights of row r of the table from its products with the block's keys: fills p and p_sum. shown: 1 where a mask shows
// a key, else 0; or null.
inline Seen fixed_row_weights(const FixedRowTable& rows, int r, const FixedBlock& block, float mean, bool row_scale,
                              VisibleKeys visible, const std::int32_t* shown, const std::int32_t* products,
                              std::uint8_t* p, std::int32_t& p_sum) {
    const W unseen = w_set(kUnseen), low = w_set(visible.low), high = w_set(visible.high);
    const bool partial = shown || !visible.all();
    const I shift = i_set(rows.shift[r]);
    W score[kWords], product[kWords];
    I lanes[kQueryVectors];
    for (int i = 0; i < kWords; ++i) {
        for (int n = 0; n < kQueryVectors; ++n) lanes[n] = i_sar(i_load(products + kQueryLanes * i + 16 * n), shift);
        score[i] = w_product_rounded(w_pack(lanes), block.key[i]);
        if (partial) score[i] = w_between(low, block.token[i], high, score[i], unseen);
        if (shown) score[i] = w_between(w_set(1), FixedBlock::packed(shown, i), w_set(2), score[i], unseen);
    }
    const std::int32_t top = largest_of(score);
    const W most = w_set(rows.most[r]), power = w_set(rows.power[r]), factor = w_set(rows.factor[r]);
    W sums = w_set(0);
    for (int i = 0; i < kWords; ++i) {
        W weight = fixed_weight(w_set(top) - score[i], most, power, factor);
        if (partial) weight = w_keep_other(score[i], unseen, weight);
        sums = sums + w_product_rounded(weight, w_set(kFixedSums));
        product[i] = w_product_rounded(weight, block.value[i]);
    }
    I sum = i_set(0), codes = i_set(0);
    w_unpack_unsigned(sums, lanes);
    for (int n = 0; n < kQueryVectors; ++n) sum = sum + lanes[n];
    const std::int32_t levels = row_scale ? fixed_levels(largest_of(product)) : static_cast<std::int32_t>(kLevels);
    for (int i = 0; i < kWords; ++i) {
        w_unpack(w_product_rounded(product[i], w_set(levels)), lanes);
        for (int n = 0; n < kQueryVectors; ++n) {
            codes = codes + lanes[n];
            i_store_u8(p + kQueryLanes * i + 16 * n, lanes[n]);
        }
    }
    p_sum = i_sum(codes);
    const float none = -std::numeric_limits<float>::infinity();
    const float row_max = top == kUnseen ? none : std::fma(static_cast<float>(top) + rows.cut[r], rows.logit[r], mean);
    return {row_max, static_cast<float>(i_sum(sum)) / static_cast<float>(kFixedSums),
            row_scale ? fixed_unit(levels, block.value_top) : block.value_top / kLevels};
}

}  // namespace turbo::TURBO_ISA
