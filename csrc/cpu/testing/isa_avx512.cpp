#include "../simd/avx512.h"
#include "peak_float32.h"
#define FASTVQ_TESTING_TABLE testing_avx512
#include "kernel_table.h"
