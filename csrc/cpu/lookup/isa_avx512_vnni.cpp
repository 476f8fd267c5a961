#include "../simd/avx512.h"
#include "filter_int16.h"
#define FASTVQ_NEAREST_TABLE nearest_avx512_vnni
#include "kernel_table.h"
