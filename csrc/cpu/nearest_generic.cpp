#include "simd_generic.h"
#include "nearest_float32.h"
#define FASTVQ_NEAREST_TABLE nearest_generic
#include "nearest_table.h"
