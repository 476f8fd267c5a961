#include "../simd/avx2.h"
#include "filter_float32.h"
#define FASTVQ_NEAREST_TABLE nearest_avx2
#include "kernel_table.h"
