// The vector types of the instruction set: sixteen 32-bit lanes, with the names and results of vec_serial.h.
#pragma once

#include "isa.h"

#include TURBO_VECTORS
