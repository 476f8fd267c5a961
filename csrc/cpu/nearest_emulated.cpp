#define FASTVQ_TILE_VECTORS 2
#include "simd_avx512.h"
#include "tile_emulated.h"
#include "nearest_amx.h"
#define FASTVQ_NEAREST_TABLE nearest_emulated
#include "nearest_table.h"
