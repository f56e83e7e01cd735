// The arguments of attention: plain pointers and sizes. B sequences, H KV heads, G query heads per KV head, Lq query
// rows, D channels of queries and keys, Dv of values. A block has 64 tokens.
#pragma once

#include <atomic>
#include <cstdint>

namespace turbo {

// FORMAT_VERSION of kv/layout.py. Python refuses an extension built for another one.
constexpr int kFormat = 4;

constexpr int kBlock = 64;
constexpr int kMaxHeadDim = 512;

enum FloatKind : std::int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Float rows [B, H, T] of D contiguous channels, with strides in elements. With `starts`, the sequences are
// concatenated: token t of sequence b is token starts[b] + t, and batch_stride is not used.
struct FloatRows {
    void* data;
    std::int64_t kind;  // FloatKind
    std::int64_t batch_stride, head_stride, token_stride;
    const std::int64_t* starts;
};

// K or V of one head in a page: widths of the codes of the first D / 2 channels and of the others, and byte offsets of
// codes, steps and zeros. step and zero are -1 at 8 bits.
struct HeadOffsets {
    std::int64_t bits[2], codes, step, zero;
};

// The layout of a page: `offsets` [H][2] (K, V), and byte offsets of the scales of K and V. token_scales is -1 without
// them.
struct PageSections {
    const HeadOffsets* offsets;
    std::int64_t token_scales[2];
    std::int64_t scales[2];
};

// INT8 rows of D or Dv channels after the pages, with a scale each: those of sequence b from position start[b] on, a
// multiple of 64. They begin at row first[b], or b * batch_rows if that is null, with head_rows rows for each head.
// With a ring, a multiple of 64, position p is row p % ring of a head; without (0), row p - start[b].
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
    // Queries [B, H G, Lq], which the kernel rotates (if `rotate`) and quantizes; the logits have the factor `scale`.
    FloatRows q;
    std::int64_t rotate;
    // int32 [H, D] or null: the order of K's channels in compressed pages, where they are not rotated; -1 for heads
    // whose pages are like INT8 rows.
    const std::int32_t* order;
    double scale;
    const std::uint16_t* mean;              // bfloat16 [B, H, D] or null, subtracted from stored keys
    std::atomic<std::int32_t>* non_finite;  // set if a valid row holds NaN, infinity or a magnitude above 1e18
    // If q.data is null: queries as INT8 [B, H, G, Lq, D], with units and mean logits [B, H, G, Lq]. A logit is the
    // integer product times the unit and the key's scale, plus the mean logit if the mean is subtracted from the key.
    const std::int8_t* q_codes;
    const float* q_unit;
    const float* q_mean_logit;           // or null
    const std::int64_t* first_position;  // [B], position of query row 0
    const std::int64_t* valid_rows;      // [B], later rows are padding and give 0 and -inf
    const std::int64_t* lengths;         // [B], number of keys
    std::int64_t mean_from_block;        // the first block from whose keys the mean is subtracted
    // Pages: addresses [B, page_stride] (0 if evicted), counts [B]; the first `sink_blocks` have the layout `sinks`.
    const std::uint64_t* pages;
    const std::int64_t* page_counts;
    std::int64_t page_stride, sink_blocks;
    PageSections sinks, compressed;
    Int8Rows tail;  // codes are null if there are none
    // Blocks from tail.start[b] on may also be pages: queries after such a block read the page, those in it the rows.
    // Value scales are then relative to the largest that a row sees.
    std::int64_t stored;
    // Softmax.
    std::int64_t softmax;  // 0 sas, 1 sas2, 2 exp, 3 sas16
    float threshold;
    float softcap;           // 0 for none
    std::int64_t row_scale;  // INT8 weights with a scale per row and block, instead of 1 / 127
    // Weights as in the paper instead: against the running maximum, with a scale for each tile of 64 query rows of a
    // head. Running results are rescaled with the approximation of `softmax`, or exactly.
    std::int64_t by_tile, approximate_rescale;
    std::int64_t causal, window;  // window 0 for none
    // Mask: kind 0 none, 1 bytes (nonzero attends), 2 float32, 3 bfloat16, 4 float16 (all three added to the logits);
    // strides of b, h, q, k in elements.
    std::int64_t mask_kind;
    const void* mask;
    std::int64_t mask_stride[4];
    std::int64_t mask_keys;  // number of keys that the mask covers
    // Results: rows [B, H G, Lq], rotated back (if `rotate`), and log-sum-exp float32 [B, H, G, Lq], or null.
    FloatRows out;
    float* lse;
    std::int64_t threads;
};

}  // namespace turbo
