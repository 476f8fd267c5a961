#include "../simd/avx512.h"
#include "filter_float32.h"
#define FASTVQ_NEAREST_TABLE nearest_avx512
#include "kernel_table.h"
