// Scores by the definition: exact rescoring of the candidates that the filter could not separate.
#pragma once
#include "elements.cuh"

namespace fastvq::cuda {

template <Metric metric, class LoadX, class LoadC>
__device__ __forceinline__ double exact_sum(int64_t dim, const LoadX& x, const LoadC& c) {
  double sum = 0, square = 0;
#pragma unroll 4
  for (int64_t d = 0; d < dim; ++d) {
    const double a = x(d), b = c(d);
    if (metric == Metric::euclidean) {
      const double t = __dsub_rn(a, b);
      sum = __dadd_rn(sum, __dmul_rn(t, t));
    } else {
      sum = __dadd_rn(sum, __dmul_rn(a, b));
    }
    if (metric == Metric::cosine) square = __dadd_rn(square, __dmul_rn(b, b));
  }
  if (metric == Metric::euclidean) return sum;
  return metric == Metric::cosine ? __ddiv_rn(-sum, __dsqrt_rn(square)) : -sum;
}

template <class LoadX, class LoadC>
__device__ __forceinline__ double exact_score(Metric metric, int64_t dim, const LoadX& x, const LoadC& c) {
  switch (metric) {
    case Metric::euclidean:
      return exact_sum<Metric::euclidean>(dim, x, c);
    case Metric::cosine:
      return exact_sum<Metric::cosine>(dim, x, c);
    default:
      return exact_sum<Metric::dot>(dim, x, c);
  }
}

// d_k of row r and code k of head h; the code is finite, and not zero under the cosine metric.
__device__ __forceinline__ double exact_score(const Rows& x, const Codes& codes, Metric metric, int64_t h, int64_t r,
                                              int64_t k) {
  const int64_t row = row_offset(x, h, r), code = code_offset(codes, h, k);
  if (x.dtype == DType::f32 && codes.dtype == DType::f32) {  // the usual case, without a branch an element
    const float* xs = static_cast<const float*>(x.data) + row;
    const float* cs = static_cast<const float*>(codes.data) + code;
    return exact_score(
        metric, x.dim, [&](int64_t d) { return static_cast<double>(xs[d * x.stride_d]); },
        [&](int64_t d) { return static_cast<double>(cs[d * codes.stride_d]); });
  }
  return exact_score(
      metric, x.dim, [&](int64_t d) { return load_double(x.data, x.dtype, row + d * x.stride_d); },
      [&](int64_t d) { return load_double(codes.data, codes.dtype, code + d * codes.stride_d); });
}

// The lexicographic minimum of (score, code) over groups of `lanes` lanes, in all of them.
__device__ __forceinline__ void group_minimum(double& score, int64_t& code, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kWarp, score, step);
    const int64_t other_code = __shfl_xor_sync(kWarp, static_cast<long long>(code), step);
    if (other < score || (other == score && other_code < code)) {
      score = other;
      code = other_code;
    }
  }
}

}  // namespace fastvq::cuda
