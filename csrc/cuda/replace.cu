// Replacement of dead codes by rows of x: those that the reference chooses.
//
//   x [H, N, D]   codebook, embed_sum [H, K, D]   cluster_size [H, K], in place
//   usable [H, N]: whether a row holds neither NaN nor infinity   rank [H, N]: usable rows up to each, itself included
//   dead [H, K]   slots [H, K]: dead codes up to each   uniforms [H, K] in [0, 1)
//
//   1. usable_rows: as many lanes a row as 16 bytes a lane fill
//   2. the caller counts: rank and slots
//   3. replace_dead_codes, a warp a code: its number among the usable rows, found by bisection, and a copy
#include "../fastvq_cuda.h"
#include "gather.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) usable_kernel(Rows x, uint8_t* usable) {
  const int lanes = lanes_of_row(x), lane = static_cast<int>(threadIdx.x) % lanes, D = static_cast<int>(x.dim);
  const int64_t N = x.n_outer * x.n_inner,
                row = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + threadIdx.x / lanes;
  const bool here = row < x.n_heads * N;
  const int64_t at = here ? row_offset(x, row / N, row % N) : 0;
  int odd = 0;
  for (int d = 4 * lane; here && d < D; d += 4 * lanes) {
    double v[4];
    load_four(x.data, x.dtype, at, x.stride_d, d, D, v);
#pragma unroll
    for (int e = 0; e < 4; ++e) odd |= !is_finite(v[e]);
  }
  for (int step = lanes / 2; step > 0; step /= 2) odd |= __shfl_xor_sync(kWarp, odd, step);
  if (here && lane == 0) usable[row] = odd == 0;
}

template <class Real>
__global__ void __launch_bounds__(kThreads) replace_kernel(EmaBuffers b, Rows x, Replacement a) {
  const int64_t K = b.n_codes, N = x.n_outer * x.n_inner;
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (key >= b.n_heads * K || !a.dead[key]) return;
  const int64_t h = key / K, k = key % K;
  const int64_t* rank = a.rank + h * N;
  const int64_t n = rank[N - 1], slot = a.slots[key] - 1, n_slots = a.slots[h * K + K - 1];
  if (n == 0) return;
  // One of an even share of the usable rows.
  const int64_t first = slot * n / n_slots, last = (slot + 1) * n / n_slots;
  int64_t nth = first + static_cast<int64_t>(__dmul_rn(a.uniforms[key], static_cast<double>(last - first)));
  const int64_t most = last - 1 < first ? first : last - 1;
  if (nth > most) nth = most;
  // The row of that number: the first whose rank is above it.
  int64_t low = 0, high = N - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rank[middle] > nth)
      high = middle;
    else
      low = middle + 1;
  }
  const int64_t from = row_offset(x, h, low);
  const Real threshold = static_cast<Real>(a.threshold);
  Real* row = static_cast<Real*>(b.codebook) + h * b.codebook_head + k * b.codebook_k;
  Real* sum = static_cast<Real*>(b.embed_sum) + h * b.embed_sum_head + k * b.embed_sum_k;
  for (int64_t d = threadIdx.x % 32; d < b.dim; d += 32) {
    const Real v = static_cast<Real>(load_double(x.data, x.dtype, from + d * x.stride_d));
    row[d * b.codebook_d] = v;
    sum[d * b.embed_sum_d] = saturated<Real>(static_cast<double>(v * threshold));
  }
  if (threadIdx.x % 32 == 0)
    static_cast<Real*>(b.cluster_size)[h * b.cluster_size_head + k * b.cluster_size_k] = threshold;
}

}  // namespace

int usable_rows(const Rows& x, uint8_t* usable, void* stream) {
  const int64_t rows = kThreads / lanes_of_row(x);
  return launch(usable_kernel, (x.n_heads * x.n_rows() + rows - 1) / rows, kThreads, 0, stream, x, usable);
}

int replace_dead_codes(const EmaBuffers& b, const Rows& x, const Replacement& a, void* stream) {
  return launch(b.dtype == DType::f64 ? replace_kernel<double> : replace_kernel<float>,
                (b.n_heads * b.n_codes + kWarps - 1) / kWarps, kThreads, 0, stream, b, x, a);
}

}  // namespace fastvq::cuda
