#define FASTVQ_ISA amx
#include "../simd/amx.h"
#include "peak_bf16_tiles.h"
#include "bound_tables.h"
