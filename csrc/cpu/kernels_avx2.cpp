#define TURBO_ISA avx2
#define TURBO_NAME "avx2"
#define TURBO_VECTORS "vec_avx2.h"
#include "kernels_isa.inc"
