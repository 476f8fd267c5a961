#define FASTVQ_STATISTICS_NAMESPACE statistics_avx2
#include "rows.h"
