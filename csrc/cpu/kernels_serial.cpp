#define TURBO_SERIAL
#define TURBO_ISA serial
#define TURBO_NAME "serial"
#define TURBO_VECTORS "vec_serial.h"
#include "kernels_isa.inc"
