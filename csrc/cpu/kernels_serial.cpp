// Portable: isa.h has the definitions.
#include "kernels_isa.inc"
