#define FASTVQ_ISA generic
#include "../simd/generic.h"
#include "vector_kernels.h"
