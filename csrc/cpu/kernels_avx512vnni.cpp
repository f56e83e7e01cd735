#define TURBO_ISA avx512vnni
#define TURBO_NAME "avx512vnni"
#define TURBO_VECTORS "vec_avx512.h"
#include "kernels_isa.inc"
