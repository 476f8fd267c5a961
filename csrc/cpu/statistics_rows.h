// The inner loops of code_statistics, compiled once per instruction set: each including file names its own namespace.
//
// Every loop is independent over columns and adds in float64 without FMA, so however wide a compiler makes it,
// the bits are the same. No std:: template may appear here: its copy compiled for a wide instruction set could be
// the one that the linker keeps for everybody.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../fastvq.h"
#include "statistics_kernels.h"

#ifndef FASTVQ_STATISTICS_NAMESPACE
#error "name the instruction set's namespace before including this file"
#endif

namespace fastvq {
namespace FASTVQ_STATISTICS_NAMESPACE {

// How far ahead of the additions cache lines are asked for. The order of the codes is random, so no hardware prefetcher
// guesses where their sums lie; asking much further than this crowds out the loads that are needed now.
constexpr int64_t kAheadBytes = 2048;

template <class T>
void add_rows(const void* x, const int64_t* offsets, const int64_t* slots, int64_t n, int64_t width, double* table) {
  const T* base = static_cast<const T*>(x);
  const int64_t blocks = width / 16 * 16;
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t ahead = kAheadBytes / (width * static_cast<int64_t>(sizeof(T))) + 1;
  for (int64_t i = 0; i < n; ++i) {
    const T* __restrict row = base + offsets[i];
    double* __restrict sum = table + slots[i];
    if (i + ahead < n) {
      const T* next_row = base + offsets[i + ahead];
      const double* next_sum = table + slots[i + ahead];
      for (int64_t d = 0; d < width; d += line) __builtin_prefetch(next_row + d);
      for (int64_t d = 0; d < width; d += 8) __builtin_prefetch(next_sum + d, 1);
    }
    for (int64_t d = 0; d < blocks; d += 16)
      for (int j = 0; j < 16; ++j) sum[d + j] += static_cast<double>(row[d + j]);
    for (int64_t d = blocks; d < width; ++d) sum[d] += static_cast<double>(row[d]);
  }
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
struct BFloat16 { uint16_t bits; };
inline float widen(BFloat16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
struct Float16 { uint16_t bits; };
inline float widen(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  // Below the smallest normal number the value is an integer times 2^-24; above it the exponent is shifted; the top
  // exponent holds infinities and NaNs and stays the top one.
  const float denormal = static_cast<float>(magnitude) * from_bits(0x33800000u);
  uint32_t denormal_bits;
  std::memcpy(&denormal_bits, &denormal, sizeof denormal_bits);
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23);
  return from_bits(sign | (magnitude < 0x0400u ? denormal_bits : normal));
}

template <class T, class Out>
void stage_rows(const T* x, const int64_t* offsets, int64_t n, int64_t width, int64_t stride_d, Out* out) {
  if (stride_d == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const T* __restrict row = x + offsets[i];
      Out* __restrict to = out + i * width;
      for (int64_t d = 0; d < width; ++d) to[d] = widen(row[d]);
    }
    return;
  }
  // A column at a time: in a channel-first image the neighbours of an element are the same channel of the next rows.
  for (int64_t d = 0; d < width; ++d)
    for (int64_t i = 0; i < n; ++i) out[i * width + d] = widen(x[offsets[i] + d * stride_d]);
}

#if defined(__F16C__)
inline void stage_halves(const Float16* x, const int64_t* offsets, int64_t n, int64_t width, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const Float16* row = x + offsets[i];
    float* to = out + i * width;
    int64_t d = 0;
    for (; d + 8 <= width; d += 8)
      _mm256_storeu_ps(to + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + d))));
    for (; d < width; ++d) to[d] = widen(row[d]);
  }
}
#endif

inline void stage(const void* x, DType dtype, const int64_t* offsets, int64_t n, int64_t width, int64_t stride_d,
                  void* out) {
  switch (dtype) {
    case DType::f32:
      stage_rows(static_cast<const float*>(x), offsets, n, width, stride_d, static_cast<float*>(out));
      return;
    case DType::f64:
      stage_rows(static_cast<const double*>(x), offsets, n, width, stride_d, static_cast<double*>(out));
      return;
    case DType::bf16:
      stage_rows(static_cast<const BFloat16*>(x), offsets, n, width, stride_d, static_cast<float*>(out));
      return;
    case DType::f16:
#if defined(__F16C__)
      if (stride_d == 1) {
        stage_halves(static_cast<const Float16*>(x), offsets, n, width, static_cast<float*>(out));
        return;
      }
#endif
      stage_rows(static_cast<const Float16*>(x), offsets, n, width, stride_d, static_cast<float*>(out));
      return;
  }
}

extern const StatisticsKernels kernels;
const StatisticsKernels kernels{&add_rows<float>, &add_rows<double>, &stage};

}  // namespace FASTVQ_STATISTICS_NAMESPACE
}  // namespace fastvq
