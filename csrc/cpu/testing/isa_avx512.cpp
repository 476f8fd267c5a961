#define FASTVQ_ISA avx512
#include "../simd/avx512.h"
#include "peak_float32.h"
#include "bound_tables.h"
