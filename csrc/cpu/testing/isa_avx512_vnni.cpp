#include "../simd/avx512.h"
#include "peak_int16.h"
#define FASTVQ_TESTING_TABLE testing_avx512_vnni
#include "kernel_table.h"
