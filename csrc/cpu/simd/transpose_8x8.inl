// 8 x 8 transpose with AVX2 shuffles, included into files compiled for AVX2 or more (inside an anonymous namespace).
constexpr int TransposeTile = 8;

inline void transpose_tile(const float* src, int64_t src_row, float* dst, int64_t dst_row) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * src_row);
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < 2; ++j) {
      r[4 * half + 2 * j] = _mm256_shuffle_ps(t[4 * half + j], t[4 * half + 2 + j], 0x44);
      r[4 * half + 2 * j + 1] = _mm256_shuffle_ps(t[4 * half + j], t[4 * half + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * dst_row, _mm256_permute2f128_ps(r[i], r[4 + i], 0x20));
    _mm256_storeu_ps(dst + (4 + i) * dst_row, _mm256_permute2f128_ps(r[i], r[4 + i], 0x31));
  }
}
