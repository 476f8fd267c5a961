// The float32 tile of the lookup for AVX2 and FMA: 6 rows by 2 vectors of 8 codes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "transpose_avx.h"

namespace fastvq {
namespace {

using V = __m256;
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V spread(float f) { return _mm256_set1_ps(f); }
inline V mul_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline unsigned at_least(V a, V b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline float largest(V v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

}  // namespace
}  // namespace fastvq
