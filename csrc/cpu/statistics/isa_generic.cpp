#define FASTVQ_STATISTICS_NAMESPACE statistics_generic
#include "rows.h"
