// Fallback for rows with too many candidates: scores all codes in float64 with fused multiply-adds, 2 rows by 32 codes at
// a time. The error bound is 2^-51 (the filter's: 2^-24 or 2^-8), which leaves one candidate in almost all rows, at a
// third of the cost of the definition. best_of rescores the rows that keep several.
//
//   t_k = x.c_k - |c_k|^2 / 2  stands for  |x|^2 / 2 - d_k / 2  (dot: x.c_k, cosine: x.c_k / |c_k|), d_k as defined.
//   Each of the two is off by (D + 2) 2^-53 (|x| + |c_k|)^2 at most. Together that is at most half of
//   E_k = (D + 8) 2^-51 (|x| + |c_k|)^2,  dot (D + 8) 2^-51 |x| |c_k|,  cosine (D + 8) 2^-51 |x|
// where no square overflows or comes near underflow. Elsewhere the definition decides.
#pragma once
#include <cmath>
#include <cstdint>

#include "exact.h"
#include "candidates.h"

namespace fastvq {
namespace {

constexpr int kRescoreCodes = 32;
constexpr int64_t kMaxRescoreDim = 2048;  // 512 KiB of codes in double

constexpr int kMaxRescoreCandidates = 16;

struct RescoreRow : CandidateList<double, kMaxRescoreCandidates> {
  double norm;
};
struct RescoreWorkspace {
  double *codes, *rows;  // [D][kRescoreCodes], [2][D]
  RescoreRow* state;
};

template <class Take>
RescoreWorkspace rescore_workspace(int64_t D, int64_t rows, const Take& take) {
  RescoreWorkspace s;
  const int64_t dim = D <= kMaxRescoreDim ? D : 0;
  s.codes = reinterpret_cast<double*>(take(8 * dim * kRescoreCodes));
  s.rows = reinterpret_cast<double*>(take(8 * 2 * dim));
  s.state = reinterpret_cast<RescoreRow*>(take(static_cast<int64_t>(sizeof(RescoreRow)) * rows));
  return s;
}

// Raises a row's lower bound and lists its candidates among 32 codes. sums: the row's products with them.
inline void collect_candidates(RescoreRow& row, Metric metric, double unit, int64_t k0, const double* sums,
                               const double* scale, const double* bias, const double* norms) {
  double upper[kRescoreCodes], lower[8], top[8];
  for (int j = 0; j < 8; ++j) lower[j] = top[j] = -HUGE_VAL;
  for (int j0 = 0; j0 < kRescoreCodes; j0 += 8)
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
  for (int j = 0; j < kRescoreCodes && row.n >= 0; ++j)
    if (upper[j] >= row.lower && upper[j] > -HUGE_VAL && !push(row, k0 + j, upper[j])) row.n = -1;
}

// Decides pending rows (counted from row `first`) where it can. Keeps the others in `pending` and returns their number.
int64_t rescore_rows(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n_pending,
                     int64_t* pending, RescoreWorkspace& s, double* workspace, int64_t* indices) {
  const Rows& x = *lookup.x;
  const Codes& codes = *lookup.codes;
  const int64_t D = x.dim, K = codes.n_codes;
  if (D > kMaxRescoreDim) return n_pending;
  constexpr int kParts = kRescoreCodes / 8;
  const double unit = static_cast<double>(D + 8) * 0x1p-51;
  // Whether a sum of squares gives the norm: it is 0 only if every element is 0, not by underflow.
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
  for (int64_t k0 = 0; k0 < K; k0 += kRescoreCodes) {
    if (k0 % (4 * kRescoreCodes) == 0) checkpoint();
    for (int64_t part = 0; part < kRescoreCodes; part += kExactCodes)
      with_element(codes.dtype, [&](auto e) {
        gather_codes<decltype(e), kRescoreCodes>(codes, h, k0 + part, 0, D, s.codes + part);
      });
    double bias[kRescoreCodes], scale[kRescoreCodes], norms[kRescoreCodes];
    for (int j = 0; j < kRescoreCodes; ++j) {
      double square = 0, magnitudes = 0;
      for (int64_t d = 0; d < D; ++d) {
        square += s.codes[d * kRescoreCodes + j] * s.codes[d * kRescoreCodes + j];
        magnitudes += std::fabs(s.codes[d * kRescoreCodes + j]);
      }
      bool candidate =
          k0 + j < K && packed.bias[k0 + j] != kDuplicate && !(lookup.metric == Metric::cosine && square == 0);
      if (candidate && !in_range(square, magnitudes)) {
        with_element(codes.dtype, [&](auto e) {
          candidate = all_finite<decltype(e)>(code_at<decltype(e)>(codes, h, k0 + j), codes.stride_d, D);
        });
        if (candidate) return n_pending;
        for (int64_t d = 0; d < D; ++d) s.codes[d * kRescoreCodes + j] = 0;  // or its products would be NaN
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
          const D8 c = load_as<D8>(s.codes + d * kRescoreCodes + 8 * v);
          one[v] = fma(s.rows[d], c, one[v]);
          other[v] = fma(s.rows[D + d], c, other[v]);
        }
      double sums[2][kRescoreCodes];
      for (int v = 0; v < kParts; ++v) {
        store_as(sums[0] + 8 * v, one[v]);
        store_as(sums[1] + 8 * v, other[v]);
      }
      for (int row = 0; row < 1 + two; ++row)
        if (s.state[i + row].n >= 0)
          collect_candidates(s.state[i + row], lookup.metric, unit, k0, sums[row], scale, bias, norms);
    }
  }
  int64_t left = 0;
  for (int64_t i = 0; i < n_pending; ++i) {
    RescoreRow& row = s.state[i];
    prune(row);
    if (row.n == 0)
      pending[left++] = pending[i];
    else
      indices[pending[i]] =
          row.n == 1 ? row.code[0] : best_of(lookup, h, first + pending[i], row.code, row.n, workspace);
  }
  return left;
}

}  // namespace
}  // namespace fastvq
