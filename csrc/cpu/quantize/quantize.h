// Stage 1 and the page codec: the kernels of quantize/interface.h. Stage 2 uses vectors of sixteen lanes; the others
// are loops that the compiler vectorizes.
#pragma once

#include "../isa.h"
#include "interface.h"
#include "pages.h"
#include "rows.h"

namespace turbo::TURBO_ISA {

inline QuantizeKernels quantize_kernels() { return {quantize_tokens, first_block_mean, encode_head, decode_head}; }

}  // namespace turbo::TURBO_ISA
