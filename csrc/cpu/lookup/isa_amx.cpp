#define FASTVQ_TILE_VECTORS 2
#include "../simd/avx512.h"
#include "../simd/amx_tiles.h"
#include "filter_bf16_tiles.h"
#define FASTVQ_NEAREST_TABLE nearest_amx
#include "kernel_table.h"
