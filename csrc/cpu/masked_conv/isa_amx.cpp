#define FASTVQ_ISA amx
#include "../simd/amx.h"
#include "tile_kernels.h"
