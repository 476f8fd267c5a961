#include "tiles.h"
#define FASTVQ_CONV_TILES conv_tiles_emulated
#include "../../masked_conv/tiles.h"
