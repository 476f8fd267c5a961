#define FASTVQ_STATISTICS_NAMESPACE statistics_generic
#include "statistics_rows.h"
