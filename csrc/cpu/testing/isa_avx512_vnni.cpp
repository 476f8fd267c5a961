#define FASTVQ_ISA avx512_vnni
#include "../simd/avx512_vnni.h"
#include "peak_int16.h"
#include "bound_tables.h"
