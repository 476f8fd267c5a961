#include "../simd/avx2.h"
#include "peak_float32.h"
#define FASTVQ_TESTING_TABLE testing_avx2
#include "kernel_table.h"
