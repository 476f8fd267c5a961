// Between the filter and the definition: rows that the filter left with too many codes meet every code once more, in
// double, with fused multiply-adds in two rows by 32 codes. That certifies nearly all of them (its bound is 2^-51, not
// 2^-24 or 2^-8) at a third of the definition's cost; the few codes left of a row are best_of's.
//
//   t_k = x.c_k - |c_k|^2 / 2  stands for  |x|^2 / 2 - d_k / 2  (dot: x.c_k, cosine: x.c_k / |c_k|), d_k as defined.
//   Each is off by (D + 2) 2^-53 of (|x| + |c_k|)^2 at most, the definition and this one together: half of
//   E_k = (D + 8) 2^-51 (|x| + |c_k|)^2,  dot (D + 8) 2^-51 |x| |c_k|,  cosine (D + 8) 2^-51 |x|
// as long as no square overflows or comes near underflow; elsewhere the definition decides.
#pragma once
#include <cmath>
#include <cstdint>

#include "exact.h"
#include "candidates.h"

namespace fastvq {
namespace {

constexpr int kQuickCodes = 32;
constexpr int64_t kMaxQuickDim = 2048;  // 512 KiB of codes in double

constexpr int kMaxQuick = 16;

struct QuickRow : Noted<double, kMaxQuick> {
  double norm;
};
struct QuickScratch {
  double *codes, *rows;  // [D][kQuickCodes], [2][D]
  QuickRow* state;
};

#if defined(__AVX512F__)
inline D8 fused(double a, const D8& b, const D8& c) {
  return (D8)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline D8 fused(double a, const D8& b, const D8& c) {
  const __m256d s = _mm256_set1_pd(a);
  return {(D4)_mm256_fmadd_pd(s, (__m256d)b.low, (__m256d)c.low),
          (D4)_mm256_fmadd_pd(s, (__m256d)b.high, (__m256d)c.high)};
}
#else
inline D8 fused(double a, const D8& b, const D8& c) { return c + a * b; }
#endif

template <class Take>
QuickScratch quick_scratch(int64_t D, int64_t rows, const Take& take) {
  QuickScratch s;
  const int64_t dim = D <= kMaxQuickDim ? D : 0;
  s.codes = reinterpret_cast<double*>(take(8 * dim * kQuickCodes));
  s.rows = reinterpret_cast<double*>(take(8 * 2 * dim));
  s.state = reinterpret_cast<QuickRow*>(take(static_cast<int64_t>(sizeof(QuickRow)) * rows));
  return s;
}

// One row against a chunk: sums are its products with the codes.
inline void judge_quick(QuickRow& row, Metric metric, double unit, int64_t k0, const double* sums, const double* scale,
                        const double* bias, const double* norms) {
  double upper[kQuickCodes], lower[8], top[8];
  for (int j = 0; j < 8; ++j) lower[j] = top[j] = -HUGE_VAL;
  for (int j0 = 0; j0 < kQuickCodes; j0 += 8)
    for (int j = 0; j < 8; ++j) {
      const double t = sums[j0 + j] * scale[j0 + j] + bias[j0 + j], reach = row.norm + norms[j0 + j];
      const double off = unit * (metric == Metric::euclidean ? reach * reach : row.norm * norms[j0 + j]);
      upper[j0 + j] = t + off;
      lower[j] = t - off > lower[j] ? t - off : lower[j];
      top[j] = t + off > top[j] ? t + off : top[j];
    }
  double most = -HUGE_VAL;
  for (int j = 0; j < 8; ++j) {
    row.lower = lower[j] > row.lower ? lower[j] : row.lower;
    most = top[j] > most ? top[j] : most;
  }
  if (!(most >= row.lower) || most == -HUGE_VAL) return;
  for (int j = 0; j < kQuickCodes && row.n >= 0; ++j)
    if (upper[j] >= row.lower && upper[j] > -HUGE_VAL && !note(row, k0 + j, upper[j])) row.n = -1;
}

// Decides what it can of the rows pending (counted from row `first`); the others stay pending, their number is returned.
int64_t quick_scan(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n_pending,
                   int64_t* pending, QuickScratch& s, double* room, int64_t* indices) {
  const Rows& x = *lookup.x;
  const Codes& codes = *lookup.codes;
  const int64_t D = x.dim, K = codes.n_codes;
  if (D > kMaxQuickDim) return n_pending;
  constexpr int kParts = kQuickCodes / 8;
  const double unit = static_cast<double>(D + 8) * 0x1p-51;
  // A sum of squares that says how long its vector is: zero only where every element is, not by underflow.
  const auto in_range = [](double square, double magnitudes) {
    return magnitudes == 0 || (square > 0x1p-900 && square < 0x1p900);
  };
  const auto fetch = [&](int64_t r, double* to) {
    with_element(x.dtype,
                 [&](auto e) { to_double<decltype(e)>(row_at<decltype(e)>(x, h, first + r), x.stride_d, D, to); });
  };
  for (int64_t i = 0; i < n_pending; ++i) {
    fetch(pending[i], s.rows);
    double square = 0, magnitudes = 0;
    for (int64_t d = 0; d < D; ++d) {
      square += s.rows[d] * s.rows[d];
      magnitudes += std::fabs(s.rows[d]);
    }
    s.state[i].norm = std::sqrt(square);
    s.state[i].lower = -HUGE_VAL;
    s.state[i].n = in_range(square, magnitudes) ? 0 : -1;
  }
  for (int64_t k0 = 0; k0 < K; k0 += kQuickCodes) {
    if (k0 % (4 * kQuickCodes) == 0) checkpoint();
    for (int64_t part = 0; part < kQuickCodes; part += kExactCodes)
      with_element(codes.dtype,
                   [&](auto e) { gather_codes<decltype(e), kQuickCodes>(codes, h, k0 + part, 0, D, s.codes + part); });
    double bias[kQuickCodes], scale[kQuickCodes], norms[kQuickCodes];
    for (int j = 0; j < kQuickCodes; ++j) {
      double square = 0, magnitudes = 0;
      for (int64_t d = 0; d < D; ++d) {
        square += s.codes[d * kQuickCodes + j] * s.codes[d * kQuickCodes + j];
        magnitudes += std::fabs(s.codes[d * kQuickCodes + j]);
      }
      bool candidate =
          k0 + j < K && packed.bias[k0 + j] != kRepeated && !(lookup.metric == Metric::cosine && square == 0);
      if (candidate && !in_range(square, magnitudes)) {
        with_element(codes.dtype, [&](auto e) {
          candidate = all_finite<decltype(e)>(code_at<decltype(e)>(codes, h, k0 + j), codes.stride_d, D);
        });
        if (candidate) return n_pending;
        for (int64_t d = 0; d < D; ++d) s.codes[d * kQuickCodes + j] = 0;  // or its products would be NaN
        square = 0;
      }
      const double norm = std::sqrt(square);
      norms[j] = lookup.metric == Metric::cosine ? 1 : norm;
      scale[j] = lookup.metric == Metric::cosine && norm > 0 ? 1 / norm : 1;
      bias[j] = !candidate ? -HUGE_VAL : lookup.metric == Metric::euclidean ? -0.5 * square : 0;
    }
    for (int64_t i = 0; i < n_pending; i += 2) {
      const bool two = i + 1 < n_pending;
      fetch(pending[i], s.rows);
      fetch(pending[two ? i + 1 : i], s.rows + D);
      D8 one[kParts] = {}, other[kParts] = {};
      for (int64_t d = 0; d < D; ++d)
        for (int v = 0; v < kParts; ++v) {
          const D8 c = load_as<D8>(s.codes + d * kQuickCodes + 8 * v);
          one[v] = fused(s.rows[d], c, one[v]);
          other[v] = fused(s.rows[D + d], c, other[v]);
        }
      double sums[2][kQuickCodes];
      for (int v = 0; v < kParts; ++v) {
        store_as(sums[0] + 8 * v, one[v]);
        store_as(sums[1] + 8 * v, other[v]);
      }
      for (int row = 0; row < 1 + two; ++row)
        if (s.state[i + row].n >= 0)
          judge_quick(s.state[i + row], lookup.metric, unit, k0, sums[row], scale, bias, norms);
    }
  }
  int64_t left = 0;
  for (int64_t i = 0; i < n_pending; ++i) {
    QuickRow& row = s.state[i];
    drop_beaten(row);
    if (row.n == 0)
      pending[left++] = pending[i];
    else
      indices[pending[i]] = row.n == 1 ? row.code[0] : best_of(lookup, h, first + pending[i], row.code, row.n, room);
  }
  return left;
}

}  // namespace
}  // namespace fastvq
