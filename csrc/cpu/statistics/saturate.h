// Storing what was added up in double. For sources compiled for the baseline instruction set.
#pragma once
#include <limits>

namespace fastvq {

// What lies beyond the largest finite number becomes that number, so that rows near it leave no infinity behind, which
// a moving average would keep for good. NaN stays NaN.
template <class Real>
Real saturated(double v) {
  constexpr double most = static_cast<double>(std::numeric_limits<Real>::max());
  v = v > most ? most : v;
  v = v < -most ? -most : v;
  return static_cast<Real>(v);
}

}  // namespace fastvq
