// What attention is given: plain pointers and sizes. B sequences, H KV heads, G query heads a KV head,
// Lq query rows, D channels of queries and keys, Dv of values; blocks are 64 tokens.
#pragma once

#include <atomic>
#include <cstdint>

namespace turbo {

// FORMAT_VERSION of kv/layout.py. Python refuses an extension built for another one.
constexpr int kFormat = 4;

constexpr int kBlock = 64;
constexpr int kMaxHeadDim = 512;

enum FloatKind : std::int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Float rows [B, H, T] of D channels. With `starts` the sequences stand behind each other: token t of sequence b
// is token starts[b] + t, and there is no batch_stride.
struct FloatRows {
    void* data;
    std::int64_t kind;  // FloatKind
    std::int64_t batch_stride, head_stride, token_stride;
    const std::int64_t* starts;
};

// One head's half (K or V) of a page: widths of the codes of its first D / 2 channels and of the others, and byte
// offsets; step and zero are -1 at 8 bits.
struct HeadOffsets {
    std::int64_t bits[2], codes, step, zero;
};

// A page's layout: offsets [H][2] (K, V), sections of scales. token_scales is -1 without them.
struct PageSections {
    const HeadOffsets* offsets;
    std::int64_t token_scales[2];
    std::int64_t scales[2];
};

// INT8 rows of D or Dv behind the pages, with a scale each: those of sequence b from position start[b], a multiple of
// 64, on. They begin at row first[b], or b batch_rows where that is null, with head_rows rows for each head. With a
// ring, a multiple of 64, position p is row p % ring of a head; without (0), row p - start[b].
struct Int8Rows {
    std::int8_t* codes[2];
    float* scales[2];
    const std::int64_t* start;
    const std::int64_t* first;
    std::int64_t batch_rows, head_rows, ring;

    std::int64_t row(std::int64_t b, std::int64_t h, std::int64_t position) const {
        const std::int64_t own = ring ? position % ring : position - start[b];
        return (first ? first[b] : b * batch_rows) + h * head_rows + own;
    }
};

struct AttendArgs {
    std::int64_t batch, heads, group, queries, head_dim, value_dim;
    // Queries [B, H G, Lq]: rotated (if `rotate`) and quantized where they are used, with the logits' factor `scale`;
    // mean, bfloat16 [B, H, D], or null, is what keys lack. *unfit is set where a valid row holds NaN, infinity or a
    // magnitude above 1e18. Compressed pages of a head may have the channels of K unrotated and in another order: order
    // [H, D], -1 for heads that have none, or null.
    FloatRows q;
    std::int64_t rotate;
    const std::int32_t* order;
    double scale;
    const std::uint16_t* mean;
    std::atomic<std::int32_t>* unfit;
    // Or, where q has no data: INT8 already [B, H, G, Lq, D], with units and mean logits [B, H, G, Lq].
    const std::int8_t* q_codes;
    const float* q_unit;
    const float* q_mean_logit;           // or null
    const std::int64_t* first_position;  // [B], where query row 0 stands
    const std::int64_t* valid_rows;      // [B], rows behind are left alone: 0 and -inf
    const std::int64_t* lengths;         // [B], keys of each sequence
    std::int64_t mean_from_block;        // first block whose keys are stored without the mean
    // Pages: addresses [B, page_stride] (0 where evicted), counts [B].
    const std::uint64_t* pages;
    const std::int64_t* page_counts;
    std::int64_t page_stride, sink_blocks;
    PageSections sinks, compressed;
    Int8Rows tail;  // no codes where there are none
    // Blocks from tail.start[b] on may be pages too: queries behind such a block read the page, those in it its rows.
    // Value scales are then relative to what each row sees.
    std::int64_t stored;
    // Softmax.
    std::int64_t softmax;  // 0 sas, 1 sas2, 2 exp, 3 sas16
    float threshold;
    float softcap;           // 0 for none
    std::int64_t row_scale;  // INT8 weights with a scale per row and block, not 1 / 127
    // Instead, the paper's: against the running maximum, with a scale for each tile of 64 query rows of a head. Results
    // are then rescaled with the approximation of `softmax`, or exactly.
    std::int64_t by_tile, approximate_rescale;
    std::int64_t causal, window;  // window 0 for none
    // Mask: kind 0 none, 1 bytes (nonzero attends), 2 float32 (added); element strides of b, h, q, k.
    std::int64_t mask_kind;
    const void* mask;
    std::int64_t mask_stride[4];
    std::int64_t mask_keys;  // how many keys the mask covers
    // Results: rows [B, H G, Lq], rotated back (if `rotate`), and float32 [B, H, G, Lq], or null.
    FloatRows out;
    float* lse;
    std::int64_t threads;
};

}  // namespace turbo
