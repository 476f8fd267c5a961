#include "simd_avx2.h"
#include "nearest_float32.h"
#define FASTVQ_NEAREST_TABLE nearest_avx2
#include "nearest_table.h"
