#include "simd_avx512.h"
#include "nearest_int16.h"
#define FASTVQ_NEAREST_TABLE nearest_avx512_vnni
#include "nearest_table.h"
