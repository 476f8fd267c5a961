#include "simd_avx2.h"
#include "nearest_filter.h"
#define FASTVQ_NEAREST_TABLE nearest_avx2
#include "nearest_table.h"
