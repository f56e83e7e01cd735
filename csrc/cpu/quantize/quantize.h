// Stage 1 and the page codec: the kernels of quantize/interface.h. Stage 2 uses vectors of sixteen lanes; the others
// are loops that the compiler vectorizes.
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
