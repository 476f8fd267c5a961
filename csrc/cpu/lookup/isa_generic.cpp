#define FASTVQ_ISA generic
#include "../simd/generic.h"
#include "filter_float32.h"
#include "kernel_table.h"
