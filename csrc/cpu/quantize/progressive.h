// Stage 2 of one head's tile: INT8 to 5, 4, 3, 2 or 1 bits (flashq/progressive.py). Each vector lane processes one of
// sixteen channels, so there are no sums across lanes. Values are small integers in float32, and all sums and products
// below are exact.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../vectors.h"
#include "../widths.h"

namespace turbo::TURBO_ISA {

constexpr int kLanes = 16;
constexpr int kMaxBlock = 256;
constexpr std::int32_t kLargestStep = 127;  // steps are int8; only steps of 1-bit codes reach it

// Sixteen channels of a tile, token by token.
struct ChannelTile {
    float at[kMaxBlock][kLanes];
    int tokens;
};

// Step and zero of sixteen channels.
struct Range {
    std::int32_t step[kLanes], zero[kLanes];
};

// The size is a compile-time constant unless the last channels of head_dim do not fill the lanes.
inline void copy_channels(void* to, const void* from, int channels) {
    if (channels == kLanes) {
        std::memcpy(to, from, kLanes);
    } else {
        std::memcpy(to, from, channels);
    }
}

inline void load_channels(const std::int8_t* codes, std::int64_t row, int tokens, int channels, ChannelTile& tile) {
    tile.tokens = tokens;
    for (int t = 0; t < tokens; ++t) {
        std::int8_t lanes[kLanes] = {};
        copy_channels(lanes, codes + t * row, channels);
        f_store(tile.at[t], f_from_int(i_from_s8(lanes)));
    }
}

// Squared distance of every channel to the nearest of `zero + k step`, 0 <= k < 2^kBits, summed over the tokens, for
// three zeros and one step. Each absolute value folds the levels at their middle and halves their number. Sums are at
// most 255^2 * 256 < 2^24, so float32 is exact.
template <int kBits>
inline void squared_errors(const ChannelTile& tile, const std::int32_t* steps, const std::int32_t (*zeros)[kLanes],
                           float (*errors)[kLanes]) {
    static_assert(kBits <= 5, "a wider code has further levels to fold");
    const F step = f_from_int(i_load(steps));
    const F half = step * f_set(0.5f), middle = step * f_set(((1 << kBits) - 1) * 0.5f);
    [[maybe_unused]] const F twice = step + step, fourfold = twice + twice, eightfold = fourfold + fourfold;
    const F center0 = f_from_int(i_load(zeros[0])) + middle, center1 = f_from_int(i_load(zeros[1])) + middle,
            center2 = f_from_int(i_load(zeros[2])) + middle;
    F error0 = f_set(0.0f), error1 = error0, error2 = error0;
    const auto fold = [&](F x) {
        x = f_abs(x);
        if (kBits > 4) x = f_abs(x - eightfold);
        if (kBits > 3) x = f_abs(x - fourfold);
        if (kBits > 2) x = f_abs(x - twice);
        if (kBits > 1) x = f_abs(x - step);
        return x - half;
    };
    for (int t = 0; t < tile.tokens; ++t) {
        const F value = f_load(tile.at[t]);
        const F miss0 = fold(value - center0), miss1 = fold(value - center1), miss2 = fold(value - center2);
        error0 = f_add_square(error0, miss0);
        error1 = f_add_square(error1, miss1);
        error2 = f_add_square(error2, miss2);
    }
    f_store(errors[0], error0);
    f_store(errors[1], error1);
    f_store(errors[2], error2);
}

inline Range min_max(const ChannelTile& tile, int levels, std::int32_t* middle) {
    F low = f_load(tile.at[0]), high = low;
    for (int t = 1; t < tile.tokens; ++t) {
        const F value = f_load(tile.at[t]);
        low = f_min(low, value);
        high = f_max(high, value);
    }
    Range range;
    const std::int32_t widest = std::min(kLargestStep, 255 / levels);
    std::int32_t top[kLanes];
    i_store(range.zero, i_from_float(low));
    i_store(top, i_from_float(high));
    for (int c = 0; c < kLanes; ++c) {
        const std::int32_t step = (top[c] - range.zero[c] + levels - 1) / levels;
        range.step[c] = step < 1 ? 1 : (step < widest ? step : widest);
        middle[c] = range.zero[c] + top[c];
        // Rows that a crop decoded from a page may exceed 119; the range then ends at 127.
        const std::int32_t highest = 127 - range.step[c] * levels;
        if (top[c] > 119 && range.zero[c] > highest) range.zero[c] = highest;
    }
    return range;
}

// The candidate steps of the range search. Below 4 bits, 16ths of the min-max step, rounded up; the optimal two levels
// lie much further inside the range than the optimal four. At 4 and 5 bits, the min-max step and the next smaller
// integer.
template <int kBits>
constexpr int kTried = kBits < 4 ? 9 : 2;

template <int kBits>
inline std::int32_t tried_step(std::int32_t widest, int which) {
    constexpr int kFirst = kBits == 1 ? 12 : 16;
    return kBits < 4 ? (widest * (kFirst - which) + 15) / 16 : std::max(widest - which, 1);
}

// The range with the least squared error among shrunken, centred and shifted ones; ties keep the earlier one.
template <int kBits>
inline Range search(const ChannelTile& tile, const Range& widest, const std::int32_t* middle) {
    constexpr int kLevels = (1 << kBits) - 1;
    constexpr int kQuarters[3] = {0, -1, 1};
    Range best = widest;
    std::int32_t zeros[3][kLanes], steps[kLanes];
    float errors[3][kLanes], least[kLanes];
    for (auto& row : zeros) std::memcpy(row, widest.zero, sizeof row);
    squared_errors<kBits>(tile, widest.step, zeros, errors);
    std::memcpy(least, errors[0], sizeof least);
    for (int which = 0; which < kTried<kBits>; ++which) {
        for (int c = 0; c < kLanes; ++c) {
            const std::int32_t step = tried_step<kBits>(widest.step[c], which);
            const std::int32_t top = 127 - step * kLevels;
            steps[c] = step;
            for (int i = 0; i < 3; ++i) {
                // An arithmetic shift divides by 4 and rounds down.
                std::int32_t zero = (2 * middle[c] - 2 * step * kLevels + kQuarters[i] * step) >> 2;
                zero = zero < top ? zero : top;
                zeros[i][c] = zero < -128 ? -128 : zero;
            }
        }
        squared_errors<kBits>(tile, steps, zeros, errors);
        for (int i = 0; i < 3; ++i) {
            for (int c = 0; c < kLanes; ++c) {
                const bool better = errors[i][c] < least[c];
                least[c] = better ? errors[i][c] : least[c];
                best.step[c] = better ? steps[c] : best.step[c];
                best.zero[c] = better ? zeros[i][c] : best.zero[c];
            }
        }
    }
    return best;
}

// `clip(round_half_even((value - zero) / step), 0, levels)` as bytes, for `channels` channels of each token.
inline void encode_channels(const ChannelTile& tile, const Range& range, int levels, int channels, std::uint8_t* codes,
                            std::int64_t row) {
    const F step = f_from_int(i_load(range.step)), zero = f_from_int(i_load(range.zero));
    const F top = f_set(static_cast<float>(levels)), bottom = f_set(0.0f), inverse = f_set(1.0f) / step;
    for (int t = 0; t < tile.tokens; ++t) {
        const F quotient = f_round(f_quotient(f_load(tile.at[t]) - zero, step, inverse));
        std::uint8_t lanes[kLanes];
        i_store_u8(lanes, i_from_float(f_max(f_min(quotient, top), bottom)));
        copy_channels(codes + t * row, lanes, channels);
    }
}

// Channels of one head: int8 [tokens][row] -> codes below 2^bits, in the same layout, and step and zero per channel.
inline void progressive_quantize(const std::int8_t* values, int tokens, std::int64_t row, int channels,
                                 std::int64_t bits, bool searching, std::uint8_t* codes, std::uint8_t* step,
                                 std::uint8_t* zero) {
    ChannelTile tile;
    const int levels = (1 << bits) - 1;
    for (int at = 0; at < channels; at += kLanes) {
        const int lanes = std::min(channels - at, kLanes);
        std::int32_t middle[kLanes];
        load_channels(values + at, row, tokens, lanes, tile);
        Range range = min_max(tile, levels, middle);
        if (searching)
            with_width<kCodeWidths>(bits, [&](auto width) {
                constexpr int kBits = decltype(width)::value;
                if constexpr (kBits < 8) range = search<kBits>(tile, range, middle);
            });
        encode_channels(tile, range, levels, lanes, codes + at, row);
        for (int c = 0; c < lanes; ++c) {
            step[at + c] = static_cast<std::uint8_t>(range.step[c]);
            zero[at + c] = static_cast<std::uint8_t>(range.zero[c]);
        }
    }
}

}  // namespace turbo::TURBO_ISA
