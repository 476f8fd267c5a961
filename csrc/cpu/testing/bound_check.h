// How much of its error bound the filter uses: the largest |score - truth| / bound over rows and codes. A ratio above 1
// means that the bound is wrong, a ratio near 0 that it is too wide. Scores and bounds are those of the lookup itself.
//
// The certificate needs  t_k - bound_k <= truth_k <= t_k + bound_k,  where truth_k is any number that orders the codes of
// a row as the definition's d_k do. So truth_k = constant of the row - d_k (euclidean: - d_k / 2), d_k evaluated by the
// definition. The constant is |x - m|^2 / 2, or minus x.m (dot), in twice the precision of double.
#pragma once
#include <cmath>
#include <cstdint>

#include "../lookup/exact.h"
#include "../lookup/rows.h"
#include "testing.h"

namespace fastvq {
namespace {

// Twice the precision of double: the sum high + low, |low| at most half a last bit of high.
struct Wide {
  double high = 0, low = 0;
  void add(double v) {
    const double sum = high + v, back = sum - high;
    low += (high - (sum - back)) + (v - back);
    high = sum;
  }
  void add_product(double a, double b) {
    const double product = a * b;
    add(product);
    low += std::fma(a, b, -product);
  }
};

// Square of a - b without rounding the difference.
inline void add_square(Wide& to, double a, double b) {
  const double t = a - b, back = a - t, rest = (a - (t + back)) + (back - b);
  to.add_product(t, t);
  to.add(2 * t * rest);
}

struct CheckWorkspace {
  FilterWorkspace filter;
  RowBounds* rows;
};
inline size_t check_layout(int64_t D, char* base, CheckWorkspace* out) {
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += (static_cast<size_t>(bytes) + 63) / 64 * 64;
    return at;
  };
  CheckWorkspace w;
  w.filter = filter_workspace(D <= kMaxFilterDim ? D : 1, take);  // wider rows are not filtered
  w.rows = reinterpret_cast<RowBounds*>(take(static_cast<int64_t>(sizeof(RowBounds)) * block_rows(D)));
  if (out) *out = w;
  return used;
}
size_t workspace_bytes(int64_t dim) { return check_layout(dim, nullptr, nullptr); }

// Rows [first, first + n) of a block, at most block_rows.
BoundUse check_bound(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                     char* workspace) {
  BoundUse use;
  if (packed.skip_filter) return use;
  CheckWorkspace s;
  check_layout(packed.dim, workspace, &s);
  const int64_t D = packed.dim, K = packed.n_codes;
  double *row = s.filter.doubles, *code = row + D;
  const bool euclidean = lookup.metric == Metric::euclidean;
  score_block(lookup, packed, h, first, n, s.filter, s.rows, [&](int64_t i, int64_t k0, const float* scores) {
    RowBounds& state = s.rows[i];
    if (state.n < 0) return;
    with_element(lookup.x->dtype, [&](auto e) {
      to_double<decltype(e)>(row_at<decltype(e)>(*lookup.x, h, first + i), lookup.x->stride_d, D, row);
    });
    Wide constant;
    for (int64_t d = 0; d < D; ++d)
      euclidean ? add_square(constant, row[d], packed.mean[d]) : constant.add_product(-row[d], packed.mean[d]);
    float bounds[kWidth];
    for (int v = 0; v < kTileVectors; ++v)
      store(bounds + v * kLanes, RowBound(state).of_codes(packed, k0 + v * kLanes));
    for (int64_t j = 0; j < kWidth && k0 + j < K; ++j) {
      if (packed.bias[k0 + j] <= kUnreachable) continue;
      with_element(lookup.codes->dtype, [&](auto e) {
        to_double<decltype(e)>(code_at<decltype(e)>(*lookup.codes, h, k0 + j), lookup.codes->stride_d, D, code);
      });
      const double score = definition_score(lookup.metric, row, code, D);
      Wide truth = constant;
      truth.add(-score);
      const double half = euclidean ? 0.5 : 1;
      const double off = std::fabs((truth.high * half - scores[j]) + truth.low * half);
      const double ratio = off / bounds[j];
      use.largest = ratio <= use.largest ? use.largest : ratio;  // also where it is NaN
      ++use.n_pairs;
    }
  });
  return use;
}

}  // namespace
}  // namespace fastvq
