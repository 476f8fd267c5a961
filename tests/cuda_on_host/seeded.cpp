// A small kernel, right as variant 0, and with one bug in each other variant: what cuda_on_host must catch. Its blocks
// run together, and the first adds up what all have found.
//
//   seeded VARIANT N     prints the number of elements above zero and their sum
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda/primitives.cuh"

using namespace fastvq::cuda;

enum Bug {
  none,
  missing_tail_mask,
  unwritten_shared,
  missing_barrier,
  barrier_after_return,
  plain_counter,
  missing_wait,
  missing_arrival
};

constexpr int kThreads = 64;

template <int bug>
__global__ void sum_above_zero(const float* x, int n, float* sums, int* count, unsigned* arrived) {
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
  if (tid != 0) return;
  sums[blockIdx.x] = shared[0];
  if (bug != missing_arrival || blockIdx.x != 1) add_release(arrived, 1);
  if (blockIdx.x != 0) return;
  while (bug != missing_wait && load_acquire(arrived) < gridDim.x) relax();
  for (unsigned b = 1; b < gridDim.x; ++b) sums[0] += sums[b];
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  void (*const variants[])(const float*, int, float*, int*, unsigned*) = {sum_above_zero<none>,
                                                                          sum_above_zero<missing_tail_mask>,
                                                                          sum_above_zero<unwritten_shared>,
                                                                          sum_above_zero<missing_barrier>,
                                                                          sum_above_zero<barrier_after_return>,
                                                                          sum_above_zero<plain_counter>,
                                                                          sum_above_zero<missing_wait>,
                                                                          sum_above_zero<missing_arrival>};
  const int n = std::atoi(argv[2]), n_blocks = (n + kThreads - 1) / kThreads;
  float* x = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(n)));
  float* sums = static_cast<float*>(std::malloc(sizeof(float) * static_cast<size_t>(n_blocks)));
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i % 5 - 2);
  int count = 0;
  unsigned arrived = 0;
  launch_together(variants[std::atoi(argv[1])], n_blocks, kThreads, sizeof(float) * kThreads, nullptr,
                  static_cast<const float*>(x), n, sums, &count, &arrived);
  std::printf("%d %g\n", count, static_cast<double>(sums[0]));
  std::free(x);
  std::free(sums);
  return 0;
}
