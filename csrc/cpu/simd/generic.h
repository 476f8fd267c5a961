// Vectors of 4 floats for any processor, in the compiler's own vectors. The names are those of every simd/<name>.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace fastvq {
namespace {

constexpr int kLanes = 4;
typedef float V __attribute__((vector_size(16)));
typedef int32_t VInt __attribute__((vector_size(16)));

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V broadcast(float f) { return V{f, f, f, f}; }
// Two roundings, not one: error bounds allow for it.
inline V fma(V a, V b, V c) { return a * b + c; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V blend(VInt mask, V yes, V no) { return (V)((mask & (VInt)yes) | (~mask & (VInt)no)); }
// One bit a lane: a >= b.
inline unsigned at_least(V a, V b) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(a[i] >= b[i]) << i;
  return mask;
}
inline float max_lanes(V v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

constexpr int kTransposeTile = 4;
inline void transpose_tile(const float* src, int64_t src_row, float* dst, int64_t dst_row) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) dst[j * dst_row + i] = src[i * src_row + j];
}

// dst[d * ld + j] = src[j * n + d] for 8 rows j, d in [0, n); rows from ld on are dropped.
inline void transpose8(const float* src, int64_t n, float* dst, int64_t ld) {
  const int64_t rows = ld < 8 ? ld : 8;
  for (int64_t d = 0; d < n; ++d)
    for (int64_t j = 0; j < rows; ++j) dst[d * ld + j] = src[j * n + d];
}

}  // namespace
}  // namespace fastvq
