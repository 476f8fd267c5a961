#define FASTVQ_ISA emulated
#include "emulated.h"
#include "../../masked_conv/tile_kernels.h"
