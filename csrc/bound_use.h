// How much of its error bound the lookup's filter uses; for tests (cpu/testing/bound_check.h).
#pragma once
#include "fastvq.h"

namespace fastvq {

struct BoundUse {
  double largest = 0;   // of |score - truth| / bound; NaN where one of them is
  int64_t n_pairs = 0;  // rows and codes that the filter scored, and that were compared
};
BoundUse bound_use(const Rows& x, const Codes& codes, Metric metric, Isa isa);

}  // namespace fastvq
