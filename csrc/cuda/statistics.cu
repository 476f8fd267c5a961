// Counts and sums of the rows that chose each code: the keys, the choice of a way to add, and the way with atomics.
//
//   x [H, N, D], indices [H, N] -> sums [H, K, D], counts [H, K]
//
// Deterministic, every accumulator a double:
//   column owners   x small enough to be read a second time from the second-level cache, and few codes: three launches
//   sorted          else: a stable radix sort of the keys, then runs of equal keys are added in pieces of fixed length
// Both orders of addition follow from the keys and the sizes alone. Not deterministic: atomics in the type of sums.
#include "statistics.cuh"

#include "../fastvq_cuda.h"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = kStatisticsThreads, kWarps = kThreads / 32;
constexpr int64_t kRowsPerWarp = 32;
constexpr int64_t kCachedBytes = int64_t{24} << 20;  // of x: what the second-level cache of an A100 or later keeps

__device__ __forceinline__ bool row_is_finite(const Rows& x, int64_t at, int64_t first, int64_t step) {
  bool finite = true;
  for (int64_t d = first; d < x.dim; d += step) finite &= is_finite(load_double(x.data, x.dtype, at + d * x.stride_d));
  return finite;
}

// A warp takes 32 rows. Where a row's elements lie side by side its lanes read one row together, else a row each.
__global__ void __launch_bounds__(kThreads) keys_kernel(Statistics s, bool read_x, uint32_t* keys) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kRowsPerWarp;
  const int64_t mine = first + lane;
  bool used = false;
  int64_t key = s.n_keys;
  if (mine < s.n_total) {
    const int64_t index = s.indices[mine];
    used = index >= 0 && index < s.n_codes;
    if (used) key = mine / s.n_rows * s.n_codes + index;
  }
  if (read_x && s.x.stride_d != 1 && used) used = row_is_finite(s.x, row_of_all(s.x, s.n_rows, mine), 0, 1);
  if (read_x && s.x.stride_d == 1) {
    for (int i = 0; i < kRowsPerWarp; ++i) {
      bool finite = true;
      if (__shfl_sync(kWarp, static_cast<int>(used), i))
        finite = row_is_finite(s.x, row_of_all(s.x, s.n_rows, first + i), lane, 32);
      if (__any_sync(kWarp, !finite) && lane == i) used = false;
    }
  }
  if (mine < s.n_total) keys[mine] = static_cast<uint32_t>(used ? key : s.n_keys);
}

__global__ void __launch_bounds__(kThreads) zero_kernel(Statistics s) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads, n = s.n_keys * s.x.dim;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    store_sum(s, i, 0);
    if (i < s.n_keys) s.counts[i] = 0;
  }
}

// A warp takes a row at a time; the second reading comes from the first-level cache.
__global__ void __launch_bounds__(kThreads) atomic_kernel(Statistics s) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) * kRowsPerWarp;
  const int64_t last = first + kRowsPerWarp < s.n_total ? first + kRowsPerWarp : s.n_total;
  for (int64_t r = first; r < last; ++r) {
    const int64_t index = s.indices[r];
    if (index < 0 || index >= s.n_codes) continue;
    const int64_t at = row_of_all(s.x, s.n_rows, r), key = r / s.n_rows * s.n_codes + index;
    if (__any_sync(kWarp, !row_is_finite(s.x, at, lane, 32))) continue;
    for (int64_t d = lane; d < s.x.dim; d += 32) {
      const double v = load_double(s.x.data, s.x.dtype, at + d * s.x.stride_d);
      const int64_t to = key * s.x.dim + d;
      if (s.sums_double)
        atomicAdd(static_cast<double*>(s.sums) + to, v);
      else
        atomicAdd(static_cast<float*>(s.sums) + to, static_cast<float>(v));
    }
    if (lane == 0) atomicAdd(reinterpret_cast<unsigned long long*>(s.counts) + key, 1ull);
  }
}

bool take_owners(const Statistics& s) {
  const int64_t element = s.x.dtype == DType::f64 ? 8 : s.x.dtype == DType::f32 ? 4 : 2;
  return owners_fit(s) && s.n_total * s.x.dim * element <= kCachedBytes;
}

constexpr size_t round_up(size_t n) { return (n + 15) / 16 * 16; }
size_t pairs_bytes(int64_t n_total) { return round_up(4 * sizeof(uint32_t) * static_cast<size_t>(n_total)); }

}  // namespace

int statistics_keys(const Statistics& s, bool read_x, uint32_t* keys, void* stream) {
  const int64_t rows = kWarps * kRowsPerWarp;
  return launch(keys_kernel, (s.n_total + rows - 1) / rows, kThreads, 0, stream, s, read_x, keys);
}

Statistics statistics_of(const Rows& x, int64_t n_codes) {
  const int64_t n_rows = x.n_rows();
  return {x, nullptr, n_codes, nullptr, false, nullptr, n_rows, x.n_heads * n_rows, x.n_heads * n_codes};
}

int clear_statistics(const Statistics& s, void* stream) {
  const int64_t elements = int64_t{8} * kThreads;
  return launch(zero_kernel, (s.n_keys * s.x.dim + elements - 1) / elements, kThreads, 0, stream, s);
}

size_t keyed_statistics_workspace(const Statistics& s) {
  if (take_owners(s)) return round_up(sizeof(uint32_t) * static_cast<size_t>(s.n_total)) + owners_workspace(s);
  const size_t sorting = sort_workspace(s.n_total), adding = segments_workspace(s);
  return pairs_bytes(s.n_total) + (sorting > adding ? sorting : adding);
}

int add_keyed(const Statistics& s, void* workspace, void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(workspace);
  uint32_t* keys = static_cast<uint32_t*>(workspace);
  if (take_owners(s))
    return owners_add(s, keys, memory + round_up(sizeof(uint32_t) * static_cast<size_t>(s.n_total)), stream);
  // Sorting is over when adding begins: they share their memory.
  memory += pairs_bytes(s.n_total);
  if (const int error = sort_keys(keys, s.n_total, s.n_keys, memory, stream)) return error;
  return segments_add(s, keys + 2 * s.n_total * sort_place(s.n_keys), memory, stream);
}

size_t code_statistics_workspace(const Rows& x, int64_t n_codes, bool deterministic) {
  const Statistics s = statistics_of(x, n_codes);
  return !deterministic || s.n_total == 0 ? 0 : keyed_statistics_workspace(s);
}

int code_statistics(const Rows& x, const int64_t* indices, int64_t n_codes, bool deterministic, void* sums,
                    bool sums_double, int64_t* counts, void* workspace, void* stream) {
  Statistics s = statistics_of(x, n_codes);
  s.indices = indices;
  s.sums = sums;
  s.sums_double = sums_double;
  s.counts = counts;
  if (!deterministic || s.n_total == 0) {
    const int64_t rows = kWarps * kRowsPerWarp;
    if (const int error = clear_statistics(s, stream)) return error;
    return launch(atomic_kernel, (s.n_total + rows - 1) / rows, kThreads, 0, stream, s);
  }
  const bool read_x = take_owners(s) || !segments_check_rows(s);
  if (const int error = statistics_keys(s, read_x, static_cast<uint32_t*>(workspace), stream)) return error;
  return add_keyed(s, workspace, stream);
}

}  // namespace fastvq::cuda
