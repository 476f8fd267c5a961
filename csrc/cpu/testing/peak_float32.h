// The ceiling of lookup/filter_float32.h: independent chains of multiply-adds on registers alone.
#pragma once
#include <cstdint>

#include "../lookup/filter_float32.h"

namespace fastvq {
namespace {

constexpr int kChains = kTileRows * kTileVectors;
double peak_fma(int64_t n, float* out) {
  V sums[kChains];
  const V a = broadcast(0.5f),
          b = broadcast(out[0] + 1);  // every chain stays near 2: zeros and denormals take other times
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sums[i] = broadcast(static_cast<float>(i));
  for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) sums[i] = fma(sums[i], a, b);
  }
  V total = sums[0];
  for (int i = 1; i < kChains; ++i) total = max(total, sums[i]);
  store(out, sub(total, total));
  return 2.0 * static_cast<double>(n) * kChains * kLanes;
}

}  // namespace
}  // namespace fastvq
