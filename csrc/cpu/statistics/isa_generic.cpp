#define FASTVQ_ISA generic
#include "../simd/generic.h"
#include "row_kernels.h"
