// The ceiling of lookup/filter_int16.h: independent chains of vpdpwssd on registers alone.
#pragma once
#include <cstdint>

#include "../lookup/filter_int16.h"

namespace fastvq {
namespace {

double peak_fma(int64_t n, float* out) {
  __m512i sums[kTileRows][kTileVectors];
  const __m512i pairs = _mm512_set1_epi32(static_cast<int>(out[0]) + 0x00010001);
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) sums[i][v] = _mm512_set1_epi32(i * kTileVectors + v);
  for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sums[i][v] = multiply_pairs(sums[i][v], pairs, pairs);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) asm volatile("" ::"v"(sums[i][v]));  // or all of it would be removed
  return 2.0 * 2 * static_cast<double>(n) * kTileRows * kTileVectors * kLanes;
}

}  // namespace
}  // namespace fastvq
