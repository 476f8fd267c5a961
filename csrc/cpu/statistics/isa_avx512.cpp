#define FASTVQ_STATISTICS_NAMESPACE statistics_avx512
#include "rows.h"
