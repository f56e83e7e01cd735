#define TURBO_AMX
#define TURBO_ISA amx
#define TURBO_NAME "amx"
#define TURBO_VECTORS "vec_avx512.h"
#include "kernels_isa.inc"
