#define FASTVQ_STATISTICS_NAMESPACE statistics_avx512
#include "statistics_rows.h"
