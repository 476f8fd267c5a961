#define FASTVQ_ISA avx512
#include "../simd/avx512.h"
#include "row_kernels.h"
