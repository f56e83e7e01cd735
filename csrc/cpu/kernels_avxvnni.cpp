#define TURBO_AVXVNNI
#define TURBO_ISA avxvnni
#define TURBO_NAME "avxvnni"
#define TURBO_VECTORS "vec_avx2.h"
#include "kernels_isa.inc"
