// The filter with operands in 16-bit integers: sums of products are exact in 32 bits, two elements of D an instruction.
//
// A vector v is held as integers q = round(v 2^e).
//   1. e is the largest exponent with |v| at most 46000 2^-e and no element above 32767 2^-e: elements fit 16 bits.
//   2. Rounding adds at most sqrt(D) / 2 to the norm: |q| is at most 46000 + sqrt(D) / 2.
//   3. By Cauchy and Schwarz, a sum of products and all its partial sums are at most (46000 + sqrt(D) / 2)^2.
//   4. That is below 2^31: the sums fit 32 bits.
// The rounding error, at most sqrt(D) / 2 of a norm of 16000 or more, is measured. With 16 bits the spread of a
// vector's elements matters little.
#pragma once
#include <cmath>
#include <cstdint>

#include "bounds.h"
#include "rounded_operands.h"

namespace fastvq {
namespace {
// A tile of rows by a panel of codes has all its sums in registers: 8 by 3 vectors, 24 of 32 registers.
constexpr int kTileRows = 8, kTileVectors = 3;
}  // namespace
}  // namespace fastvq

#include "score_layout.h"

namespace fastvq {
namespace {

// A tile is [steps][kTileRows] pairs, then the rows' units [kTileRows]; a panel [steps][kWidth] pairs, then the codes'
// units [kWidth]. A vector is its unit times its integers.
inline int64_t steps(int64_t D) { return (D + 1) / 2; }
inline int64_t panel_floats(int64_t D) { return (steps(D) + 1) * kWidth; }
inline int64_t tile_floats(int64_t D) { return (steps(D) + 1) * kTileRows; }
inline float* panel_at(const PackedCodes& packed, int64_t panel) {
  return reinterpret_cast<float*>(packed.panels) + panel * panel_floats(packed.dim);
}

struct Integers {
  float unit;  // the vector is unit times its integers
  double lost;  // squared norm of the rounding error
};

// Writes v [D], whose norm is given, as pairs of integers into words [steps(D)]. words may begin at v or before it.
inline Integers to_integers(const float* v, int64_t D, double norm, float* words) {
  // Units of 2^-74 and more: the product of two is a float32 (see CodeLayout::underflow).
  constexpr int kFinest = 74;
  const int64_t W = steps(D);
  if (!(norm < 0x1p121)) {  // or NaN: the caller does not use the scores of such a vector
    for (int64_t w = 0; w < W; ++w) words[w] = 0;
    return {1, 0};
  }
  int exponent = 0;
  const double mantissa = std::frexp(norm, &exponent);  // below 1: the norm is mantissa 2^exponent
  const auto first = [](int64_t n) { return static_cast<__mmask16>(n >= kLanes ? 0xffff : n > 0 ? (1u << n) - 1 : 0); };
  V highest = broadcast(0);
  for (int64_t d0 = 0; d0 < D; d0 += kLanes)
    highest = max(highest, _mm512_abs_ps(_mm512_maskz_loadu_ps(first(D - d0), v + d0)));
  int e = 16 - exponent - (mantissa * 0x1p16 > 46000);
  e -= std::ldexp(static_cast<double>(max_lanes(highest)), e) > 32767;
  e = norm == 0 || e > kFinest ? kFinest : e;
  const V scale = broadcast(std::ldexp(1.0f, e));
  V losts = broadcast(0);
  for (int64_t d0 = 0; d0 < 2 * W; d0 += kLanes) {
    const int64_t left = D - d0, out = 2 * W - d0;
    const V scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(first(left), v + d0), scale);
    const __m512i q = _mm512_cvtps_epi32(scaled);
    const V rest = sub(scaled, _mm512_cvtepi32_ps(q));
    losts = fma(rest, rest, losts);
    _mm256_mask_storeu_epi16(words + d0 / 2, first(out), _mm512_cvtepi32_epi16(q));
  }
  return {std::ldexp(1.0f, -e), std::ldexp(static_cast<double>(_mm512_reduce_add_ps(losts)), -2 * e)};
}

// The error of rounding the operands. A code c' is held as c^, e = c' - c^; a row x' as x^, lost = x' - x^:
//   x'.c' - x^.c^ = lost.c^ + x'.e
//                <= |lost| |c^| + |x'| |e|
// The error of the score:
//   1. The score is the exact integer x^.c^, rounded to float32, then one multiply-add with the bias.
//   2. Rounding changes no element by more than itself: a vector of integers has at most twice the exact vector's norm.
//   3. So 3 u (4 |x'||c'| + |b|) covers both roundings.
// The error of the products with the units:
//   1. The units of rows and codes are powers of two.
//   2. The first product is exact; the second is made inside the multiply-add.
//   3. Below 2^-126 rounding takes 2^-150 at most.
struct CodeLayout {
  static double chain(int64_t) { return 16; }
  static double underflow(int64_t) { return 0x1p-148; }

  static Placed put(const PackedCodes& packed, int64_t p, int j, const float* code, double norm, float* eight) {
    const int64_t D = packed.dim, W = steps(D);
    // The integers of row j & 7 overwrite only rows before it.
    const Integers integers = to_integers(code, D, norm, eight + (j & 7) * W);
    float* panel = panel_at(packed, p);
    panel[W * kWidth + j] = integers.unit;
    if ((j & 7) == 7) transpose8(eight, W, panel + j - 7, kWidth);
    const double rest = std::sqrt(integers.lost * kRowSlack);
    return {rest, norm + rest};
  }
};

// Step 2 for one tile and the first `Vectors` vectors of one panel.
template <int Vectors, bool KeepScores>
__attribute__((noinline)) void score_tile(const float* tile, const float* panel, const float* bias, int64_t D,
                                          float* scores, float* maxima) {
  __m512i sums[kTileRows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm512_setzero_si512();
  for (int64_t w = steps(D); w > 0; --w) {
    __m512i codes[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) codes[v] = load_pairs(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const __m512i row = broadcast_pair(tile + i);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[i][v] = multiply_pairs(sums[i][v], row, codes[v]);
    }
    tile += kTileRows;
    panel += kWidth;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    const V unit = broadcast(tile[i]);
    V top;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const V product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][v]), unit);
      const V score = fma(product, load(panel + v * kLanes), load(bias + v * kLanes));
      if (KeepScores) store(scores + i * kScoreStride + v * kLanes, score);
      top = v ? max(top, score) : score;
    }
    store(maxima + i * kMaximaStride, top);
  }
}

// Recomputes the scores of one row of a tile against one panel.
inline void score_row(const float* tile, int64_t i, const float* panel, const float* bias, int64_t D, float* scores) {
  const int64_t W = steps(D);
  __m512i sums[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) sums[v] = _mm512_setzero_si512();
  for (int64_t w = 0; w < W; ++w)
    for (int v = 0; v < kTileVectors; ++v)
      sums[v] = multiply_pairs(sums[v], broadcast_pair(tile + w * kTileRows + i),
                               load_pairs(panel + w * kWidth + v * kLanes));
  for (int v = 0; v < kTileVectors; ++v) {
    const V product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[v]), broadcast(tile[W * kTileRows + i]));
    store(scores + v * kLanes, fma(product, load(panel + W * kWidth + v * kLanes), load(bias + v * kLanes)));
  }
}

// Step 1 for one tile: rows [first, first + n) into out.
template <class E>
__attribute__((noinline)) void pack_tile(const Rows& x, int64_t h, int64_t first, int64_t n, const float* mean,
                                         float* out, float* eight, void* buffer, Measured* measured) {
  using Real = typename E::Real;
  const int64_t D = x.dim, W = steps(D);
  if (x.stride_d != 1 && x.stride_inner == 1 && first / x.n_inner == (first + n - 1) / x.n_inner) {
    // Channel-first: neighbouring rows are neighbours in memory.
    const auto* p = row_at<E>(x, h, first);
    for (int64_t i = 0; i < n; ++i) measured[i].square = 0;
    for (int64_t d = 0; d < D; ++d, p += x.stride_d)
      for (int64_t i = 0; i < n; ++i) {
        const float v = static_cast<float>(E::get(p[i]) - static_cast<Real>(mean[d]));
        eight[i * D + d] = v;
        measured[i].square += static_cast<double>(v) * static_cast<double>(v);
      }
  } else {
    for (int64_t i = 0; i < n; ++i)
      measured[i].square =
          place_code<E>(contiguous(row_at<E>(x, h, first + i), x.stride_d, D, buffer), D, mean, 0, eight + i * D);
  }
  float* units = out + W * kTileRows;
  for (int64_t i = 0; i < kTileRows; ++i) {
    if (i < n) {
      const Integers integers = to_integers(eight + i * D, D, std::sqrt(measured[i].square), eight + i * W);
      measured[i].lost = integers.lost;
      units[i] = integers.unit;
    } else {
      for (int64_t w = 0; w < W; ++w) eight[i * W + w] = 0;
      units[i] = 1;
    }
  }
  transpose8(eight, W, out, kTileRows);
}

}  // namespace
}  // namespace fastvq

#include "filter.h"
