#include "../simd/generic.h"
#include "peak_float32.h"
#define FASTVQ_TESTING_TABLE testing_generic
#include "kernel_table.h"
