// The instruction set that a file is compiled for. A kernels_<isa>.cpp defines TURBO_ISA, the namespace of its kernels
// within turbo, TURBO_NAME, and TURBO_VECTORS, the header of its vector types. Without them, the portable kernels are
// compiled.
#pragma once

#ifndef TURBO_ISA
#define TURBO_SERIAL
#define TURBO_ISA serial
#define TURBO_NAME "serial"
#define TURBO_VECTORS "vec_serial.h"
#endif
