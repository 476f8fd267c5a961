#define FASTVQ_ISA emulated
#include "emulated_tiles/emulated.h"
#include "peak_bf16_tiles.h"
#include "bound_tables.h"
