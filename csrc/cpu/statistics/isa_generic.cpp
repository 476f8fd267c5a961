#define FASTVQ_ISA generic
#include "../simd/generic.h"
#include "rows.h"
