#define FASTVQ_ISA avx2
#include "../simd/avx2.h"
#include "row_kernels.h"
