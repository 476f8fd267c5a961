#define FASTVQ_TILE_VECTORS 2
#include "../simd/amx_tiles.h"
#include "../simd/avx512.h"
#include "filter_bf16_tiles.h"
#define FASTVQ_NEAREST_TABLE nearest_amx
#include "kernel_table.h"
