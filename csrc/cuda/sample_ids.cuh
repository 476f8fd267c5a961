// An id drawn from logits by the threads of one block, by inverse CDF in float64:
//
//   w_k = exp(l_k / T - max_j l_j / T), 0 for ids that top_k or top_p leave out
//   id  = the lowest k with w_k > 0 and w_0 + .. + w_k > min(u S, the number below S), S the sum of all; T = 0: the
//         lowest k of the largest logit
//
// Thread t alone reads and writes the weights of ids [t K / threads, (t + 1) K / threads). K and the number of threads
// decide the order in which sums are added.
//
//   top_k   keeps the first k ids in descending order of weight, lower ids first among ties
//   top_p   then keeps each id before which less than p of the sum lies
//
// Neither sorts. The weight of the last id kept is found by bisection; ties are then counted.
//
// Shared bytes: 8 for each warp.
#pragma once
#include "../fastvq_cuda.h"
#include "primitives.cuh"

namespace fastvq::cuda {

constexpr int kLanes = 32;

// f over the values of all threads of the block, in a fixed order; the same to each.
template <class T, class F>
__device__ T over_block(T v, F f, void* shared) {
  T* of_warps = static_cast<T*>(shared);
  for (int mask = kLanes / 2; mask > 0; mask /= 2) v = f(v, __shfl_xor_sync(kWarp, v, mask));
  __syncthreads();
  if (threadIdx.x % kLanes == 0) of_warps[threadIdx.x / kLanes] = v;
  __syncthreads();
  v = of_warps[0];
  for (unsigned w = 1; w < blockDim.x / kLanes; ++w) v = f(v, of_warps[w]);
  return v;
}

// The sum over the threads before this one.
__device__ inline double over_threads_before(double v, void* shared) {
  double* of_warps = static_cast<double*>(shared);
  const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  double sum = v;
  for (unsigned step = 1; step < kLanes; step *= 2) {
    const double before = __shfl_up_sync(kWarp, sum, step);
    if (lane >= step) sum += before;
  }
  const double here = __shfl_up_sync(kWarp, sum, 1);
  __syncthreads();
  if (lane == kLanes - 1) of_warps[warp] = sum;
  __syncthreads();
  double base = 0;
  for (unsigned w = 0; w < warp; ++w) base += of_warps[w];
  return base + (lane == 0 ? 0.0 : here);
}

struct Larger {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// Sets to zero all but the ids before which, in descending order, less than `target` lies. The measure of an id is one
// (top_k) or its weight (top_p); target is at most that of all.
template <bool kByWeight>
__device__ void keep_largest(double* w, int64_t first, int64_t last, double target, void* shared) {
  const auto measure = [&](double least, bool equal_too) {
    double sum = 0;
    for (int64_t k = first; k < last; ++k)
      if (w[k] > least || (equal_too && w[k] == least)) sum += kByWeight ? w[k] : 1.0;
    return over_block(sum, Sum{}, shared);
  };
  // The last one kept weighs `low`: with all from there on, target is reached. The largest weight is 1.
  double low = 0, high = 1;
  while (low < high) {
    // Weights are not negative: their bits are in their order.
    const int64_t a = __double_as_longlong(low), b = __double_as_longlong(high);
    const double middle = __longlong_as_double(a + (b - a + 1) / 2);
    const bool reached = measure(middle, true) >= target;
    double next = reached ? 1.0 : 0.0;
    for (int64_t k = first; k < last; ++k) {
      if (reached && w[k] >= middle) next = w[k] < next ? w[k] : next;
      if (!reached && w[k] < middle) next = w[k] > next ? w[k] : next;
    }
    if (reached)
      low = over_block(next, Smaller{}, shared);
    else
      high = over_block(next, Larger{}, shared);
  }
  const double above = measure(low, false);
  double equals = 0;
  for (int64_t k = first; k < last; ++k) equals += w[k] == low ? 1.0 : 0.0;
  double n = over_threads_before(equals, shared);
  for (int64_t k = first; k < last; ++k) {
    if (w[k] < low) w[k] = 0;
    if (w[k] == low && !(above + (n++) * (kByWeight ? low : 1.0) < target)) w[k] = 0;
  }
}

// The same to every thread of the block. w [K] is workspace. 0 where a logit is NaN or none is finite.
__device__ inline int64_t sample_ids(const float* logits, int64_t n_codes, double u, const SamplerChoice& choice,
                                     double* w, void* shared) {
  const int64_t first = n_codes * threadIdx.x / blockDim.x, last = n_codes * (threadIdx.x + 1) / blockDim.x;
  float most = -INFINITY;
  for (int64_t k = first; k < last; ++k) most = fmaxf(most, logits[k]);
  most = over_block(most, Larger{}, shared);
  int64_t found = n_codes;
  if (choice.temperature == 0) {
    for (int64_t k = last - 1; k >= first; --k)
      if (logits[k] == most) found = k;
    found = over_block(found, Smaller{}, shared);
    return found < n_codes ? found : 0;
  }

  double sum = 0;
  for (int64_t k = first; k < last; ++k) {
    w[k] = exp(static_cast<double>(logits[k]) / choice.temperature - static_cast<double>(most) / choice.temperature);
    sum += w[k];
  }
  if (!(over_block(sum, Sum{}, shared) > 0)) return 0;
  if (choice.top_k > 0 && choice.top_k < n_codes)
    keep_largest<false>(w, first, last, static_cast<double>(choice.top_k), shared);
  const auto own_sum = [&] {
    double own = 0;
    for (int64_t k = first; k < last; ++k) own += w[k];
    return own;
  };
  if (choice.top_p > 0) {
    const double all = over_block(own_sum(), Sum{}, shared);
    keep_largest<true>(w, first, last, choice.top_p * all, shared);
  }
  sum = own_sum();
  const double total = over_block(sum, Sum{}, shared);
  // Just below the total at most: rounding must not pick an id past the last one that has weight.
  const double below = __longlong_as_double(__double_as_longlong(total) - 1);
  const double threshold = u * total < below ? u * total : below;
  double running = over_threads_before(sum, shared);
  int64_t last_one = -1;
  for (int64_t k = first; k < last; ++k) {
    running += w[k];
    if (w[k] > 0) {
      last_one = k;
      if (running > threshold && found == n_codes) found = k;
    }
  }
  found = over_block(found, Smaller{}, shared);
  last_one = over_block(last_one, Larger{}, shared);  // the last with weight, where sums in another order fell short
  return found < n_codes ? found : last_one;
}

}  // namespace fastvq::cuda
