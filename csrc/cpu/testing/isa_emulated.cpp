#define FASTVQ_TILE_VECTORS 2
#include "../simd/avx512.h"
#include "emulated_tiles/tiles.h"
#include "peak_bf16_tiles.h"
#define FASTVQ_TESTING_TABLE testing_emulated
#include "kernel_table.h"
