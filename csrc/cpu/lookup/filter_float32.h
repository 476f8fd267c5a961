// The filter with float32 operands: sums of fused multiply-adds, one element of D after another.
#pragma once
#include <cstdint>

#include "bounds.h"

namespace fastvq {
namespace {
// A tile of rows by a panel of codes has all its sums in registers: 8 by 3 vectors of 16 codes, 6 by 2 of 8 or 4 by 2 of 4.
constexpr int kTileRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4, kTileVectors = kLanes == 16 ? 3 : 2;
// The bound of bounds.h covers the rounding to float32.
constexpr bool kRounded = false;
constexpr double kRowSlack = kSlack;
}  // namespace
}  // namespace fastvq

#include "score_layout.h"

namespace fastvq {
namespace {

inline int64_t panel_floats(int64_t D) { return D * kWidth; }
inline int64_t tile_floats(int64_t D) { return D * kTileRows; }
inline float* panel_at(const PackedCodes& packed, int64_t panel) {
  return reinterpret_cast<float*>(packed.panels) + panel * panel_floats(packed.dim);
}

struct CodeLayout {
  static double chain(int64_t D) { return static_cast<double>(D) + 2; }
  static double underflow(int64_t D) { return (2 * static_cast<double>(D) + 10) * 0x1p-149; }
  static Placed put(const PackedCodes& packed, int64_t p, int j, const float*, double, float* eight) {
    if ((j & 7) == 7) transpose8(eight, packed.dim, panel_at(packed, p) + j - 7, kWidth);
    return {0, 0};
  }
};

// Step 2 for one tile and the first `Vectors` vectors of one panel. tile [D][kTileRows], panel [D][kWidth].
template <int Vectors, bool KeepScores>
__attribute__((noinline)) void score_tile(const float* tile, const float* panel, const float* bias, int64_t D,
                                          float* scores, float* maxima) {
  V sums[kTileRows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[i][v] = load(bias + v * kLanes);
  for (int64_t d = 0; d < D; ++d) {
    V codes[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) codes[v] = load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const V row = broadcast(tile[i]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[i][v] = fma(row, codes[v], sums[i][v]);
    }
    tile += kTileRows;
    panel += kWidth;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    V top = sums[i][0];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      if (KeepScores) store(scores + i * kScoreStride + v * kLanes, sums[i][v]);
      if (v) top = max(top, sums[i][v]);
    }
    store(maxima + i * kMaximaStride, top);
  }
}

// Recomputes the scores of one row of a tile against one panel.
inline void score_row(const float* tile, int64_t i, const float* panel, const float* bias, int64_t D, float* scores) {
  V sums[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) sums[v] = load(bias + v * kLanes);
  for (int64_t d = 0; d < D; ++d)
    for (int v = 0; v < kTileVectors; ++v)
      sums[v] = fma(broadcast(tile[d * kTileRows + i]), load(panel + d * kWidth + v * kLanes), sums[v]);
  for (int v = 0; v < kTileVectors; ++v) store(scores + v * kLanes, sums[v]);
}

// Step 1 for one tile: rows [first, first + n) into out [D][kTileRows], room for 8 floats behind it.
template <class E>
__attribute__((noinline)) void pack_tile(const Rows& x, int64_t h, int64_t first, int64_t n, const float* mean,
                                         float* out, float* eight, void* buffer, Measured* measured) {
  using Real = typename E::Real;
  const int64_t D = x.dim;
  if (x.stride_d != 1 && x.stride_inner == 1 && n == kTileRows && first / x.n_inner == (first + n - 1) / x.n_inner) {
    // Channel-first: neighbouring rows are neighbours in memory.
    const auto* p = row_at<E>(x, h, first);
    for (int i = 0; i < kTileRows; ++i) measured[i] = {0, 0};
    for (int64_t d = 0; d < D; ++d, p += x.stride_d)
      for (int i = 0; i < kTileRows; ++i) {
        const float v = static_cast<float>(E::get(p[i]) - static_cast<Real>(mean[d]));
        out[d * kTileRows + i] = v;
        measured[i].square += static_cast<double>(v) * static_cast<double>(v);
      }
    return;
  }
  for (int i = 0; i < kTileRows; ++i) {
    if (i < n) {
      const auto* p = contiguous(row_at<E>(x, h, first + i), x.stride_d, D, buffer);
      measured[i] = {place_code<E>(p, D, mean, 0, eight + i * D), 0};
    } else {
      for (int64_t d = 0; d < D; ++d) eight[i * D + d] = 0;
    }
  }
  transpose8(eight, D, out, kTileRows);
}

}  // namespace
}  // namespace fastvq

#include "filter.h"
