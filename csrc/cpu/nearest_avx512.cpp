#include "simd_avx512.h"
#include "nearest_float32.h"
#define FASTVQ_NEAREST_TABLE nearest_avx512
#include "nearest_table.h"
