// The gradients of quantization.
//
//   x, g, grad_x [H, N, D]   codes, grad_codes [H, K, D]   indices [H, N], -1 where masked
//   sums [H, K, D] double, counts [H, K] of the finite rows that chose each code   n_real [] real rows
//   weight []: the gradient that comes in at a loss
//
//   1. to_rows writes G + pull (x - c), pull = weight 2 beta / (D n_real). Lanes share a row as in gather.cuh.
//      Without the rotation: G = g.
//      With it: G = lambda (g - 2 r (r.g) + 2 x^ (c^.g)), x^ = x/|x|, c^ = c/|c|, lambda = |c|/|x|,
//      r = (x^ + c^)/|x^ + c^|. G is computed as a g + b x + e c: two passes over the row make its sums (the second
//      reads the first-level cache), a third pass writes.
//   2. to_codes writes (count c - sum) weight 2 / (D n_real), a thread an element.
//
// Arithmetic is double, each element is rounded once.
#include "../fastvq_cuda.h"
#include "gather.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr double kOpposite = 1e-6;  // reference.py: DEGENERATE

// 2 weight factor / (D n_real)
__device__ __forceinline__ double loss_weight(const LossWeight& w, int64_t dim) {
  const int64_t n = *w.n_real;
  return load_double(w.weight, w.dtype, 0) * (2 * w.factor) /
         (static_cast<double>(dim) * static_cast<double>(n < 1 ? 1 : n));
}

__device__ __forceinline__ double row_sum(double v, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kWarp, v, step);
  return v;
}

__global__ void __launch_bounds__(kThreads, 3)  // else the compiler aims at more blocks, and spills
    to_rows_kernel(RowsGradient a) {
  const int lanes = lanes_of_row(a.x), lane = static_cast<int>(threadIdx.x) % lanes, D = static_cast<int>(a.x.dim);
  const int64_t N = a.x.n_outer * a.x.n_inner, total = a.x.n_heads * N;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const int64_t index = row < total ? a.indices[row] : -1;
  const bool real = index >= 0 && index < a.codes.n_codes;  // one that was changed since is left out
  const int64_t h = row < total ? row / N : 0, r = row < total ? row % N : 0;
  const int64_t from = row_offset(a.x, h, r), to = row_offset(a.grad_x, h, r),
                code = code_offset(a.codes, h, real ? index : 0);
  const int64_t from_g = a.g.data ? row_offset(a.g, h, r) : 0;
  const double pull = a.loss.weight ? loss_weight(a.loss, a.x.dim) : 0;
  const bool differs = a.loss.weight || a.rotation;
  const auto load = [&](int d, double (&v)[4], double (&c)[4], double (&g)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = c[e] = g[e] = 0;
    if (!real) return;
    if (differs) {
      load_four(a.x.data, a.x.dtype, from, a.x.stride_d, d, D, v);
      load_four(a.codes.data, a.codes.dtype, code, a.codes.stride_d, d, D, c);
    }
    if (a.g.data) load_four(a.g.data, a.g.dtype, from_g, a.g.stride_d, d, D, g);
  };

  double keep = 1, along_x = 0, along_c = 0;
  if (a.rotation) {
    double xx = 0, cc = 0, xg = 0, cg = 0, v[4], c[4], g[4];
#pragma unroll 1
    for (int d = 4 * lane; d < D; d += 4 * lanes) {
      load(d, v, c, g);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        xx += v[e] * v[e];
        cc += c[e] * c[e];
        xg += v[e] * g[e];
        cg += c[e] * g[e];
      }
    }
    xx = row_sum(xx, lanes);
    cc = row_sum(cc, lanes);
    const double length_x = sqrt(xx), length_c = sqrt(cc), per_x = 1 / length_x, per_c = 1 / length_c;
    double square = 0;  // |x^ + c^|^2; from the dot product it would cancel where they are opposite
#pragma unroll 1
    for (int d = 4 * lane; d < D; d += 4 * lanes) {
      load(d, v, c, g);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const double sum = v[e] * per_x + c[e] * per_c;
        if (d + e < D) square += sum * sum;  // beyond, 0 times infinity
      }
    }
    xg = row_sum(xg, lanes);
    cg = row_sum(cg, lanes);
    square = row_sum(square, lanes);
    // A row that is not finite gets the NaN of the formula.
    if ((length_x > 0 && length_c > 0 && square > kOpposite * kOpposite) || !(xx < HUGE_VAL)) {
      const double along = 2 * (xg * per_x + cg * per_c) / square;
      keep = length_c * per_x;
      along_x = keep * per_x * (2 * cg * per_c - along);
      along_c = -keep * per_c * along;
    }
  }
  const bool turned = keep != 1 || along_x != 0 || along_c != 0;
  if (row >= total) return;
#pragma unroll 1
  for (int d = 4 * lane; d < D; d += 4 * lanes) {
    double v[4], c[4], g[4];
    load(d, v, c, g);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (turned) g[e] = keep * g[e] + (along_x * v[e] + along_c * c[e]);
      if (a.loss.weight && real) g[e] += pull * (v[e] - c[e]);
      if (!real) g[e] = 0;
    }
    store_four(const_cast<void*>(a.grad_x.data), a.grad_x.dtype, to, a.grad_x.stride_d, d, D, g);
  }
}

__global__ void __launch_bounds__(kThreads) to_codes_kernel(CodesGradient a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, D = a.codes.dim, K = a.codes.n_codes;
  if (i >= a.codes.n_heads * K * D) return;
  const int64_t key = i / D, d = i % D, h = key / K, k = key % K;
  const int64_t count = a.counts[key];
  double v = 0;  // a code that is not finite is not used, and zero times it is not zero; the weight may be infinite
  if (count > 0)
    v = (static_cast<double>(count) *
             load_double(a.codes.data, a.codes.dtype, code_offset(a.codes, h, k) + d * a.codes.stride_d) -
         a.sums[i]) *
        loss_weight(a.loss, D);
  const int64_t to = code_offset(a.grad_codes, h, k) + d * a.grad_codes.stride_d;
  void* out = const_cast<void*>(a.grad_codes.data);
  if (a.grad_codes.dtype == DType::f64)
    static_cast<double*>(out)[to] = v;
  else
    store_float(out, a.grad_codes.dtype, to, static_cast<float>(v));
}

}  // namespace

int quantize_rows_gradient(const RowsGradient& a, void* stream) {
  const int lanes = lanes_of_row(a.x);
  const int64_t rows = kThreads / lanes, total = a.x.n_heads * a.x.n_rows();
  return launch(to_rows_kernel, (total + rows - 1) / rows, kThreads, 0, stream, a);
}

int quantize_codes_gradient(const CodesGradient& a, void* stream) {
  const int64_t elements = a.codes.n_heads * a.codes.n_codes * a.codes.dim;
  return launch(to_codes_kernel, (elements + kThreads - 1) / kThreads, kThreads, 0, stream, a);
}

}  // namespace fastvq::cuda
