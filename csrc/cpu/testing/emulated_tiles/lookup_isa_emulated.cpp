#define FASTVQ_TILE_VECTORS 2
#include "../../simd/avx512.h"
#include "tiles.h"
#include "../../lookup/filter_bf16_tiles.h"
#define FASTVQ_NEAREST_TABLE nearest_emulated
#include "../../lookup/kernel_table.h"
