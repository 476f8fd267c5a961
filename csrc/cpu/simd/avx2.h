// Vectors of 8 floats: AVX2 with FMA.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "isa.h"
#include "transpose_avx.h"

namespace fastvq {
namespace {

constexpr int kLanes = 8;
using V = __m256;
typedef int32_t VInt __attribute__((vector_size(32)));

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline V broadcast(float f) { return _mm256_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V max(V a, V b) { return _mm256_max_ps(a, b); }
inline V blend(VInt mask, V yes, V no) { return (V)((mask & (VInt)yes) | (~mask & (VInt)no)); }
// One bit a lane: a >= b.
inline unsigned at_least(V a, V b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
}
inline float max_lanes(V v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

}  // namespace
}  // namespace fastvq
