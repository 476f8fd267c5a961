#include "../simd/amx_tiles.h"
#define FASTVQ_CONV_TILES conv_tiles_amx
#include "tiles.h"
