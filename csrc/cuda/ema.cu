// The moving average of the statistics per code, and the codebook it gives.
//
//   codebook, embed_sum  [H, K, D]    cluster_size  [H, K]     float or double, any strides, in place
//   sums  [H, K, D] float or double   counts  [H, K] int64     contiguous
//   plan  [2, H, K] double            what to divide a code by, or a mark; the share of its old embed_sum that stays
//
//   1. sizes, a block a head: the sum of the new sizes in a fixed order, then cluster_size and the plan
//   2. elements, a warp a code: embed_sum and codebook, each element read once and written once
//
// Arithmetic is double and each stored value is rounded once: the result is that of the CPU's kernel to the bit, but for
// the order in which the sizes are added up.
#include "../fastvq_cuda.h"
#include "elements.cuh"
#include "primitives.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr double kKeepCode = -1, kSkipHead = -2;  // a code keeps its row of the codebook; a head counted nothing

struct SizesShared {
  double totals[kWarps];
  int counted[kWarps];
};

template <class Real>
__device__ __forceinline__ double new_size(Real old, int64_t count, double decay) {
  const double size = decay * static_cast<double>(old) + (1 - decay) * static_cast<double>(count);
  return static_cast<double>(static_cast<Real>(size));
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    sizes_kernel(EmaBuffers b, const int64_t* counts, EmaOptions o, double* plan) {
  SizesShared& m = *reinterpret_cast<SizesShared*>(shared_memory());
  const int64_t h = blockIdx.x, K = b.n_codes, n_plan = b.n_heads * K;
  Real* sizes = static_cast<Real*>(b.cluster_size) + h * b.cluster_size_head;
  double total = 0;
  bool counted = false;
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    const int64_t count = counts[h * K + k];
    counted |= count != 0;
    total += new_size(sizes[k * b.cluster_size_k], count, o.decay);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kWarp, total, lanes);
  const int any = __any_sync(kWarp, counted);
  if (threadIdx.x % 32 == 0) {
    m.totals[threadIdx.x / 32] = total;
    m.counted[threadIdx.x / 32] = any;
  }
  __syncthreads();
  total = 0;
  counted = false;
  for (int w = 0; w < kWarps; ++w) {
    total += m.totals[w];
    counted |= m.counted[w] != 0;
  }
  for (int64_t k = threadIdx.x; k < K; k += kThreads) {
    Real& stored = sizes[k * b.cluster_size_k];
    const double size = new_size(stored, counts[h * K + k], o.decay);
    double divisor = size < o.eps ? o.eps : size;
    if (o.laplace) divisor = (size + o.eps) / (total + static_cast<double>(K) * o.eps) * total;
    if ((o.debias && size == 0) || total == 0) divisor = kKeepCode;
    plan[h * K + k] = counted ? divisor : kSkipHead;
    plan[n_plan + h * K + k] = o.debias && stored == 0 ? 0.0 : o.decay;
    if (counted) stored = static_cast<Real>(size);
  }
}

template <class Real, class Sum>
__global__ void __launch_bounds__(kThreads)
    elements_kernel(EmaBuffers b, const Sum* sums, double take, const double* plan) {
  const int64_t n_plan = b.n_heads * b.n_codes;
  const int64_t code = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (code >= n_plan) return;
  const double divisor = plan[code], keep = plan[n_plan + code];
  if (divisor == kSkipHead) return;
  const int64_t h = code / b.n_codes, k = code % b.n_codes;
  Real* average = static_cast<Real*>(b.embed_sum) + h * b.embed_sum_head + k * b.embed_sum_k;
  Real* row = static_cast<Real*>(b.codebook) + h * b.codebook_head + k * b.codebook_k;
  for (int64_t d = threadIdx.x % 32; d < b.dim; d += 32) {
    // The product with 0 would keep a NaN.
    const double old = keep == 0 ? 0.0 : keep * static_cast<double>(average[d * b.embed_sum_d]);
    const double sum = static_cast<double>(saturated<Sum>(static_cast<double>(sums[code * b.dim + d])));
    const Real now = saturated<Real>(old + take * sum);
    average[d * b.embed_sum_d] = now;
    if (divisor != kKeepCode) row[d * b.codebook_d] = saturated<Real>(static_cast<double>(now) / divisor);
  }
}

template <class Real, class Sum>
int update(const EmaBuffers& b, const void* sums, const int64_t* counts, const EmaOptions& o, double* plan,
           void* stream) {
  if (const int error =
          launch(sizes_kernel<Real>, b.n_heads, kThreads, sizeof(SizesShared), stream, b, counts, o, plan))
    return error;
  return launch(elements_kernel<Real, Sum>, (b.n_heads * b.n_codes + kWarps - 1) / kWarps, kThreads, 0, stream, b,
                static_cast<const Sum*>(sums), 1 - o.decay, static_cast<const double*>(plan));
}

}  // namespace

size_t ema_update_workspace(const EmaBuffers& b) {
  return 2 * sizeof(double) * static_cast<size_t>(b.n_heads * b.n_codes);
}

int ema_update(const EmaBuffers& b, const void* sums, bool sums_double, const int64_t* counts, const EmaOptions& o,
               void* workspace, void* stream) {
  const auto run = b.dtype == DType::f64 ? (sums_double ? update<double, double> : update<double, float>)
                                         : (sums_double ? update<float, double> : update<float, float>);
  return run(b, sums, counts, o, static_cast<double*>(workspace), stream);
}

}  // namespace fastvq::cuda
