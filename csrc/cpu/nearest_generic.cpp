#include "simd_generic.h"
#define FASTVQ_NEAREST_TABLE nearest_generic
#include "nearest_table.h"
