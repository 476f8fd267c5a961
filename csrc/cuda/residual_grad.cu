// What residual quantization's gradient takes from all levels: one pass over the elements of x, a thread each.
//
// indices hold a code on every level of a row, or -1 on every level: the caller has replaced all others.
//
//   r_0 = x;  r_{q+1} = r_q - c_q;  grad_x = sum of weight_q r_{q+1} + g;  total = sum of c_q       (float, or double)
#include "../fastvq_cuda.h"
#include "elements.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = 256;

template <class Work>
__global__ void __launch_bounds__(kThreads)
    residual_backward_kernel(Rows x, Codes levels, const int64_t* indices, const Work* weights, Rows g, Rows grad_x,
                             Work* total) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, D = x.dim, Q = levels.n_heads;
  const int64_t r = e / D, d = e % D;
  if (r >= x.n_outer * x.n_inner) return;
  const int64_t* chosen = indices + r * Q;
  Work sum = 0, pulled = 0;
  if (chosen[0] >= 0) {
    Work rest = static_cast<Work>(load_double(x.data, x.dtype, row_offset(x, 0, r) + d * x.stride_d));
#pragma unroll 4
    for (int64_t q = 0; q < Q; ++q) {
      const Work code = static_cast<const Work*>(levels.data)[code_offset(levels, q, chosen[q]) + d * levels.stride_d];
      rest -= code;
      sum += code;
      if (weights) pulled += weights[q] * rest;
    }
    if (g.data) pulled += static_cast<Work>(load_double(g.data, g.dtype, row_offset(g, 0, r) + d * g.stride_d));
  }
  if (total) total[e] = sum;
  const int64_t to = row_offset(grad_x, 0, r) + d * grad_x.stride_d;
  if (grad_x.dtype == DType::f64)
    static_cast<double*>(const_cast<void*>(grad_x.data))[to] = pulled;
  else
    store_float(const_cast<void*>(grad_x.data), grad_x.dtype, to, static_cast<float>(pulled));
}

template <class Work>
int launch_backward(const Rows& x, const Codes& levels, const int64_t* indices, const void* weights, const Rows& g,
                    const Rows& grad_x, void* total, void* stream) {
  return launch(residual_backward_kernel<Work>, (x.n_rows() * x.dim + kThreads - 1) / kThreads, kThreads, 0, stream, x,
                levels, indices, static_cast<const Work*>(weights), g, grad_x, static_cast<Work*>(total));
}

}  // namespace

int residual_backward(const Rows& x, const Codes& levels, const int64_t* indices, const void* weights, const Rows* g,
                      const Rows& grad_x, void* total, void* stream) {
  const auto run = levels.dtype == DType::f64 ? launch_backward<double> : launch_backward<float>;
  return run(x, levels, indices, weights, g ? *g : Rows{}, grad_x, total, stream);
}

}  // namespace fastvq::cuda
