#define FASTVQ_ISA amx
#include "../simd/amx.h"
#include "filter_bf16_tiles.h"
#include "kernel_table.h"
