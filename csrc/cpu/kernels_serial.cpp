// Portable: what isa.h defines.
#include "kernels_isa.inc"
