#define FASTVQ_ISA avx512
#include "../simd/avx512.h"
#include "rows.h"
