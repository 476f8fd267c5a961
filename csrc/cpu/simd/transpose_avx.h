// Transposes of eight by eight floats.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace fastvq {
namespace {

constexpr int kTransposeTile = 8;

// dst[d * dst_row + j] = src[j * src_row + d], written row after row.
__attribute__((always_inline)) inline void transpose_tile(const float* src, int64_t src_row, float* dst,
                                                          int64_t dst_row) {
  __m256 r[8], t[8];
  for (int j = 0; j < 8; ++j) r[j] = _mm256_loadu_ps(src + j * src_row);
  for (int j = 0; j < 8; j += 2) {
    t[j] = _mm256_unpacklo_ps(r[j], r[j + 1]);
    t[j + 1] = _mm256_unpackhi_ps(r[j], r[j + 1]);
  }
  for (int j = 0; j < 8; j += 4) {
    r[j] = _mm256_shuffle_ps(t[j], t[j + 2], 0x44);
    r[j + 1] = _mm256_shuffle_ps(t[j], t[j + 2], 0xee);
    r[j + 2] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0x44);
    r[j + 3] = _mm256_shuffle_ps(t[j + 1], t[j + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) _mm256_storeu_ps(dst + j * dst_row, _mm256_permute2f128_ps(r[j], r[j + 4], 0x20));
  for (int j = 0; j < 4; ++j) _mm256_storeu_ps(dst + (4 + j) * dst_row, _mm256_permute2f128_ps(r[j], r[j + 4], 0x31));
}

// dst[d * ld + j] = src[j * n + d] for 8 rows j, d in [0, n).
// Where ld < 8 the rows written last overlap into the next column and are overwritten by it, so dst needs 8 floats more.
inline void transpose8(const float* src, int64_t n, float* dst, int64_t ld) {
  int64_t d = 0;
  for (; d + 8 <= n; d += 8) transpose_tile(src + d, n, dst + d * ld, ld);
  for (; d < n; ++d)
    for (int j = 0; j < 8; ++j) dst[d * ld + j] = src[j * n + d];
}

}  // namespace
}  // namespace fastvq
