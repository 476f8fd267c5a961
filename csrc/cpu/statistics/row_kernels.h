// The inner loops of code_statistics, compiled per instruction set.
//
// Every loop is independent over columns and adds in float64 without FMA, so the result has the same bits for vectors of
// any width.
#pragma once
#include <cstdint>

#include "../common/elements.h"
#include "kernels.h"

namespace fastvq {
namespace {

// How far ahead of the additions cache lines are prefetched. The order of the codes is random, so no hardware prefetcher
// predicts the addresses of their sums. Much further ahead would delay the loads that are needed now.
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

template <class E, class Real>
void stage_rows(const void* x, const int64_t* offsets, int64_t n, int64_t width, int64_t stride_d, Real* out) {
  const auto* base = static_cast<const typename E::Stored*>(x);
  if (stride_d == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const auto* __restrict row = base + offsets[i];
      Real* __restrict to = out + i * width;
      for (int64_t d = 0; d < width; ++d) to[d] = E::get(row[d]);
    }
    return;
  }
  // One column after another: in a channel-first image a column of neighbouring rows is contiguous.
  for (int64_t d = 0; d < width; ++d)
    for (int64_t i = 0; i < n; ++i) out[i * width + d] = E::get(base[offsets[i] + d * stride_d]);
}

inline void stage(const void* x, DType dtype, const int64_t* offsets, int64_t n, int64_t width, int64_t stride_d,
                  void* out) {
  with_element(dtype, [&](auto e) {
    using E = decltype(e);
    stage_rows<E>(x, offsets, n, width, stride_d, static_cast<typename E::Real*>(out));
  });
}

}  // namespace

const StatisticsKernels FASTVQ_TABLE(statistics_kernels) = {add_rows<float>, add_rows<double>, stage};

}  // namespace fastvq
