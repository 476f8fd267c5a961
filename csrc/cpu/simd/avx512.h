// Vectors of 16 floats: AVX-512 F, BW, DQ and VL.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "isa.h"
#include "transpose_avx.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own intrinsics start from registers that are undefined on purpose, and it warns of them.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fastvq {
namespace {

constexpr int kLanes = 16;
using V = __m512;
typedef int32_t VInt __attribute__((vector_size(64)));

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V broadcast(float f) { return _mm512_set1_ps(f); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V max(V a, V b) { return _mm512_max_ps(a, b); }
inline V blend(VInt mask, V yes, V no) { return (V)((mask & (VInt)yes) | (~mask & (VInt)no)); }
// One bit a lane: a >= b.
inline unsigned at_least(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline float max_lanes(V v) { return _mm512_reduce_max_ps(v); }

}  // namespace
}  // namespace fastvq
