#define FASTVQ_ISA generic
#include "../simd/generic.h"
#include "peak_float32.h"
#include "bound_tables.h"
