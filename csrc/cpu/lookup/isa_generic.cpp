#include "../simd/generic.h"
#include "filter_float32.h"
#define FASTVQ_NEAREST_TABLE nearest_generic
#include "kernel_table.h"
