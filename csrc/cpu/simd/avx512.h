// The float32 tile of the lookup for AVX-512: 8 rows by 3 vectors of 16 codes.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "transpose_avx.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics start from registers that are undefined on purpose, and it warns of them.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastvq {
namespace {

using V = __m512;
// The tile of rows and the vectors of a panel: of the float32 filter, unless the including file says otherwise.
#ifndef FASTVQ_TILE_VECTORS
#define FASTVQ_TILE_VECTORS 3
#endif
constexpr int kLanes = 16, kTileRows = 8, kTileVectors = FASTVQ_TILE_VECTORS;

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V spread(float f) { return _mm512_set1_ps(f); }
inline V mul_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
inline unsigned at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline float largest(V v) { return _mm512_reduce_max_ps(v); }

}  // namespace
}  // namespace fastvq
