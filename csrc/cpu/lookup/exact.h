// The definition: scores in double, d = 0 ... D-1 in order, one accumulator, no fused multiply-add (the build
// switches contraction off), ties to the lowest index. Each lane of a vector scores another code in this order.
//   euclidean: t = x_d - c_kd; acc += t * t       dot: acc += x_d * c_kd, d_k = -acc
//   cosine: as dot, d_k = -acc / sqrt(sum c_kd^2); a code of norm 0 is no candidate
// A code that holds NaN or infinity is no candidate. Index 0 where there is no candidate or no d_k below infinity.
#pragma once
#include <cmath>
#include <cstdint>

#include "lookup.h"
#include "../simd/vectors.h"

namespace fastvq {
namespace {

// Codes scored together: enough chains of additions to hide their latency, few enough for the registers.
constexpr int kExactCodes = kLanes == 16 ? 32 : 16;
constexpr int64_t kExactDims = 128;
constexpr int kMaxExact = 256;  // codes that best_of chooses among

struct ScanWorkspace {
  int64_t* pending;  // rows of the block, counted from its first
  double *best, *sums, *codes, *row;
};

// d_k of one finite code.
inline double definition_score(Metric metric, const double* row, const double* code, int64_t D) {
  double sum = 0, square = 0;
  if (metric == Metric::euclidean) {
    for (int64_t d = 0; d < D; ++d) {
      const double t = row[d] - code[d];
      sum += t * t;
    }
    return sum;
  }
  for (int64_t d = 0; d < D; ++d) sum += row[d] * code[d];
  if (metric == Metric::dot) return -sum;
  for (int64_t d = 0; d < D; ++d) square += code[d] * code[d];
  return -sum / std::sqrt(square);
}

// d_k summed in the fastest order, and a bound of its difference from the definition's d_k. Each of the two is within
// (D + 3) 2^-53 of the exact number, relative to that number (euclidean: all terms are positive) or to |x| |c|; the bound is
// twice their sum, for terms of second order.
struct BoundedScore {
  double score, error;
  bool in_range;  // no square overflowed or came near underflow
};
template <class E>
inline BoundedScore bounded_score(Metric metric, const double* row, const typename E::Stored* code, int64_t D) {
  D8 sums = {}, rows = {}, codes = {};
  double sum = 0, rr = 0, cc = 0;
  int64_t d = 0;
  const auto in_range = [](double square) { return square > 0x1p-900 && square < 0x1p900; };
  const double unit = static_cast<double>(D + 8) * 0x1p-50;
  if (metric == Metric::euclidean) {
    for (; d + 8 <= D; d += 8) {
      const D8 t = load_as<D8>(row + d) - widen(load(E{}, code + d));
      sums += t * t;
    }
    for (sum = sum_lanes(sums); d < D; ++d) {
      const double t = row[d] - static_cast<double>(E::get(code[d]));
      sum += t * t;
    }
    return {sum, sum * unit, in_range(sum)};
  }
  for (; d + 8 <= D; d += 8) {
    const D8 x = load_as<D8>(row + d), c = widen(load(E{}, code + d));
    sums += x * c;
    rows += x * x;
    codes += c * c;
  }
  for (sum = sum_lanes(sums), rr = sum_lanes(rows), cc = sum_lanes(codes); d < D; ++d) {
    const double c = E::get(code[d]);
    sum += row[d] * c;
    rr += row[d] * row[d];
    cc += c * c;
  }
  const bool fine = in_range(rr) && in_range(cc);
  if (metric == Metric::dot) return {-sum, std::sqrt(rr) * std::sqrt(cc) * unit, fine};
  return {-sum / std::sqrt(cc), std::sqrt(rr) * unit, fine};
}

// The nearest of n finite codes: by bounded_score where that separates them, else by the definition.
// workspace: 2 D doubles.
inline int64_t best_of(const LookupCall& lookup, int64_t h, int64_t r, const int64_t* codes, int n, double* workspace) {
  const Rows& x = *lookup.x;
  const int64_t D = x.dim;
  double *row = workspace, *code = workspace + D;
  with_element(x.dtype, [&](auto e) { to_double<decltype(e)>(row_at<decltype(e)>(x, h, r), x.stride_d, D, row); });
  double lower[kMaxExact], upper = HUGE_VAL;
  int best = 0;
  bool decided = true;
  with_element(lookup.codes->dtype, [&](auto e) {
    using E = decltype(e);
    for (int i = 0; i < n; ++i) {
      const auto* p = contiguous(code_at<E>(*lookup.codes, h, codes[i]), lookup.codes->stride_d, D, code);
      const BoundedScore q = bounded_score<E>(lookup.metric, row, p, D);
      decided &= q.in_range;
      lower[i] = q.score - q.error;
      if (q.score + q.error < upper) {
        upper = q.score + q.error;
        best = i;
      }
    }
  });
  for (int i = 0; i < n; ++i) decided &= i == best || lower[i] > upper;
  if (decided) return codes[best];
  double least = HUGE_VAL;
  int64_t index = -1;
  for (int i = 0; i < n; ++i) {
    with_element(lookup.codes->dtype, [&](auto e) {
      to_double<decltype(e)>(code_at<decltype(e)>(*lookup.codes, h, codes[i]), lookup.codes->stride_d, D, code);
    });
    const double score = definition_score(lookup.metric, row, code, D);
    if (score < least || (score == least && codes[i] < index)) {
      least = score;
      index = codes[i];
    }
  }
  return index < 0 ? 0 : index;
}

// Codes [k0, k0 + kExactCodes), elements [d0, d0 + n), as doubles, zero beyond the last code; out [n][Stride].
template <class E, int Stride = kExactCodes>
void gather_codes(const Codes& codes, int64_t h, int64_t k0, int64_t d0, int64_t n, double* out) {
  for (int j = 0; j < kExactCodes; ++j) {
    const bool exists = k0 + j < codes.n_codes;
    const auto* p = code_at<E>(codes, h, exists ? k0 + j : 0) + d0 * codes.stride_d;
    for (int64_t d = 0; d < n; ++d)
      out[d * Stride + j] = exists ? static_cast<double>(E::get(p[d * codes.stride_d])) : 0;
  }
}

// Scores rows `pending` (counted from row `first`) against every code.
inline void scan_rows(const LookupCall& lookup, int64_t h, int64_t first, int64_t n_pending, ScanWorkspace& s,
                      int64_t* indices) {
  const Rows& x = *lookup.x;
  const Codes& codes = *lookup.codes;
  const int64_t D = x.dim, K = codes.n_codes;
  const bool euclidean = lookup.metric == Metric::euclidean, cosine = lookup.metric == Metric::cosine;
  int64_t n = 0;
  for (int64_t i = 0; i < n_pending; ++i) {
    const int64_t r = s.pending[i];
    indices[r] = 0;
    const bool finite = with_element(
        x.dtype, [&](auto e) { return all_finite<decltype(e)>(row_at<decltype(e)>(x, h, first + r), x.stride_d, D); });
    if (!finite) continue;
    s.best[n] = HUGE_VAL;
    s.pending[n++] = r;
  }
  if (n == 0) return;
  constexpr int kHalves = kExactCodes / 8;
  for (int64_t k0 = 0; k0 < K; k0 += kExactCodes) {
    if (k0 % (8 * kExactCodes) == 0) checkpoint();
    D8 squares[kHalves] = {}, odd[kHalves] = {};
    for (int64_t i = 0; i < n * kExactCodes; ++i) s.sums[i] = 0;
    for (int64_t d0 = 0; d0 < D; d0 += kExactDims) {
      const int64_t dims = D - d0 < kExactDims ? D - d0 : kExactDims;
      with_element(codes.dtype, [&](auto e) { gather_codes<decltype(e)>(codes, h, k0, d0, dims, s.codes); });
      for (int64_t d = 0; d < dims; ++d)
        for (int v = 0; v < kHalves; ++v) {
          const D8 c = load_as<D8>(s.codes + d * kExactCodes + 8 * v);
          odd[v] += c - c;  // stays 0 for finite codes, becomes NaN for others
          squares[v] += c * c;
        }
      for (int64_t i = 0; i < n; ++i) {
        with_element(x.dtype, [&](auto e) {
          using E = decltype(e);
          to_double<E>(row_at<E>(x, h, first + s.pending[i]) + d0 * x.stride_d, x.stride_d, dims, s.row);
        });
        double* at = s.sums + i * kExactCodes;
        D8 sums[kHalves];
        for (int v = 0; v < kHalves; ++v) sums[v] = load_as<D8>(at + 8 * v);
        if (euclidean)
          for (int64_t d = 0; d < dims; ++d)
            for (int v = 0; v < kHalves; ++v) {
              const D8 t = s.row[d] - load_as<D8>(s.codes + d * kExactCodes + 8 * v);
              sums[v] += t * t;
            }
        else
          for (int64_t d = 0; d < dims; ++d)
            for (int v = 0; v < kHalves; ++v) sums[v] += s.row[d] * load_as<D8>(s.codes + d * kExactCodes + 8 * v);
        for (int v = 0; v < kHalves; ++v) store_as(at + 8 * v, sums[v]);
      }
    }
    for (int j = 0; j < kExactCodes && k0 + j < K; ++j) {
      const double square = squares[j / 8][j % 8];
      if (odd[j / 8][j % 8] != 0 || (cosine && square == 0)) continue;
      const double norm = std::sqrt(square);
      for (int64_t i = 0; i < n; ++i) {
        double score = s.sums[i * kExactCodes + j];
        if (!euclidean) score = -score;
        if (cosine) score /= norm;
        if (score < s.best[i]) {
          s.best[i] = score;
          indices[s.pending[i]] = k0 + j;
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastvq
