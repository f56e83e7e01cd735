// Stage 1 of rows and the page codec: the kernels of quantize/interface.h. Plain loops that the
// compiler vectorizes, but for stage 2, which is written over sixteen lanes.
#pragma once

#include "convert.h"
#include "rotate.h"
#include "rows.h"
#include "progressive.h"
#include "packing.h"
#include "pages.h"

inline QuantizeKernels quantize_kernels() {
    return {quantize_tokens, quantize_queries, restore_rows, first_block_mean, encode_head, decode_head};
}
