#define FASTVQ_ISA avx2
#include "../simd/avx2.h"
#include "peak_float32.h"
#include "bound_tables.h"
