#define FASTVQ_TILE_VECTORS 2
#include "../simd/avx512.h"
#include "../simd/amx_tiles.h"
#include "peak_bf16_tiles.h"
#define FASTVQ_TESTING_TABLE testing_amx
#include "kernel_table.h"
