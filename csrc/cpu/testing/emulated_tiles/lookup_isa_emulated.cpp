#define FASTVQ_ISA emulated
#include "emulated.h"
#include "../../lookup/filter_bf16_tiles.h"
#include "../../lookup/kernel_table.h"
