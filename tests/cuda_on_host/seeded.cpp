// A small kernel, right as variant 0, and with one bug in each other variant: what cuda_on_host must catch.
//
//   seeded VARIANT N     prints the number of elements above zero and their sum
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/primitives.cuh"

using namespace fastvq::cuda;

enum Bug { none, missing_tail_mask, unwritten_shared, missing_barrier, barrier_after_return, plain_counter };

constexpr int kThreads = 64;

template <int bug>
__global__ void sum_above_zero(const float* x, int n, float* sums, int* count) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int tid = static_cast<int>(threadIdx.x), at = static_cast<int>(blockIdx.x) * kThreads + tid;
  if (bug == barrier_after_return && at >= n) return;
  const float v = at < n || bug == missing_tail_mask ? x[at] : 0;
  if (bug != unwritten_shared || tid % 32 != 31) shared[tid] = v > 0 ? v : 0;
  if (v > 0) {
    if (bug == plain_counter)
      *count += 1;
    else
      atomicAdd(count, 1);
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (bug != missing_barrier) __syncthreads();
    if (tid < half) shared[tid] += shared[tid + half];
  }
  if (tid == 0) sums[blockIdx.x] = shared[0];
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  void (*const variants[])(const float*, int, float*, int*) = {
      sum_above_zero<none>,           sum_above_zero<missing_tail_mask>,    sum_above_zero<unwritten_shared>,
      sum_above_zero<missing_barrier>, sum_above_zero<barrier_after_return>, sum_above_zero<plain_counter>};
  const int n = std::atoi(argv[2]), n_blocks = (n + kThreads - 1) / kThreads;
  float* x = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(n)));
  float* sums = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(n_blocks)));
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i % 5 - 2);
  int count = 0;
  launch(variants[std::atoi(argv[1])], n_blocks, kThreads, sizeof(float) * kThreads, nullptr, static_cast<const float*>(x), n, sums, &count);
  float sum = 0;
  for (int b = 0; b < n_blocks; ++b) sum += sums[b];
  std::printf("%d %g\n", count, static_cast<double>(sum));
  std::free(x);
  std::free(sums);
  return 0;
}
