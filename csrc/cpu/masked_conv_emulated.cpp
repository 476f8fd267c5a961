#include "tile_emulated.h"
#define FASTVQ_CONV_TILES conv_tiles_emulated
#include "masked_conv_tiles.h"
