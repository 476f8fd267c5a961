#include "tile_amx.h"
#define FASTVQ_CONV_TILES conv_tiles_amx
#include "masked_conv_tiles.h"
