// Storing sums of double. For sources compiled for the baseline instruction set.
#pragma once
#include <limits>

namespace fastvq {

// A value beyond the largest finite number becomes that number: a moving average would keep an infinity for good. NaN
// stays NaN.
template <class Real>
Real saturated(double v) {
  constexpr double most = static_cast<double>(std::numeric_limits<Real>::max());
  v = v > most ? most : v;
  v = v < -most ? -most : v;
  return static_cast<Real>(v);
}

}  // namespace fastvq
