// The float32 tile of the lookup for any processor: 4 rows by 2 vectors of 4 codes, in the compiler's own vectors.
#pragma once
#include <cstdint>
#include <cstring>

namespace fastvq {
namespace {

typedef float V __attribute__((vector_size(16)));
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 2;

inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline V spread(float f) { return V{f, f, f, f}; }
// Two roundings, not one: the error bound allows for it.
inline V mul_add(V a, V b, V c) { return a * b + c; }
inline V add(V a, V b) { return a + b; }
inline V sub(V a, V b) { return a - b; }
inline V larger(V a, V b) { return a > b ? a : b; }
inline unsigned at_least(V a, V b) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(a[i] >= b[i]) << i;
  return mask;
}
inline float largest(V v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// dst[d * ld + j] = src[j * n + d] for 8 rows j, d in [0, n); rows from ld on are dropped.
inline void transpose8(const float* src, int64_t n, float* dst, int64_t ld) {
  const int64_t rows = ld < 8 ? ld : 8;
  for (int64_t d = 0; d < n; ++d)
    for (int64_t j = 0; j < rows; ++j) dst[d * ld + j] = src[j * n + d];
}

}  // namespace
}  // namespace fastvq
