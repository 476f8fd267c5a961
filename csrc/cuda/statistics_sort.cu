// Stable radix sort of (key, row), a byte of the key a pass, least significant first: no atomics that order anything, so
// rows of one key stay in their order.
//
//   keys [n], rows [n] (0 ... n-1 before the first pass)   n < 2^32
//
// A block has 2048 pairs: warp w the pairs 256 w ... 256 w + 255, 32 a round.
//   1. counts:  digits of each block, [256, n_blocks]
//   2. offsets: a warp a digit: exclusive sums over the blocks, and the digit's total
//   3. scatter: a pair goes to (digits below it) + (blocks before) + (warps before) + (rounds before) + (lanes before)
//
// Shared bytes of the scatter: 4 (8 x 256 + 8).
#include "statistics.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = kStatisticsThreads, kWarps = kThreads / 32, kRounds = 8;
constexpr int64_t kPairs = kThreads * kRounds;
constexpr int kDigits = 256;
static_assert(kDigits == kThreads, "a thread a digit");

int64_t blocks_of(int64_t n) { return (n + kPairs - 1) / kPairs; }

// The sum over the lanes before this one; `total` the sum over the warp.
__device__ __forceinline__ uint32_t sum_before_in_warp(uint32_t v, uint32_t& total) {
  uint32_t sum = v;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(kWarp, sum, static_cast<unsigned>(lanes));
    if (threadIdx.x % 32 >= static_cast<unsigned>(lanes)) sum += other;
  }
  total = __shfl_sync(kWarp, sum, 31);
  return sum - v;
}

// The sum over the threads before this one. `warp_sums` [kWarps] is shared.
__device__ __forceinline__ uint32_t sum_before(uint32_t v, uint32_t* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t total, before = sum_before_in_warp(v, total);
  if (lane == 0) warp_sums[warp] = total;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += warp_sums[w];
  return before;
}

__global__ void __launch_bounds__(kThreads)
    counts_kernel(const uint32_t* keys, int64_t n, int shift, uint32_t* counts) {
  int* digits = reinterpret_cast<int*>(shared_memory());
  digits[threadIdx.x] = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPairs;
  const int64_t last = first + kPairs < n ? first + kPairs : n;
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) atomicAdd(digits + (keys[i] >> shift) % kDigits, 1);
  __syncthreads();
  counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = static_cast<uint32_t>(digits[threadIdx.x]);
}

__global__ void __launch_bounds__(kThreads) offsets_kernel(uint32_t* counts, int64_t n_blocks, uint32_t* totals) {
  const int lane = threadIdx.x % 32, digit = static_cast<int>(blockIdx.x) * kWarps + threadIdx.x / 32;
  uint32_t* mine = counts + digit * n_blocks;
  uint32_t done = 0;
  for (int64_t base = 0; base < n_blocks; base += 32) {
    const int64_t i = base + lane;
    uint32_t total;
    const uint32_t before = sum_before_in_warp(i < n_blocks ? mine[i] : 0, total);
    if (i < n_blocks) mine[i] = done + before;
    done += total;
  }
  if (lane == 0) totals[digit] = done;
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const uint32_t* keys, const uint32_t* rows, int64_t n, int shift, const uint32_t* offsets,
                   const uint32_t* totals, uint32_t* keys_out, uint32_t* rows_out) {
  uint32_t* places = reinterpret_cast<uint32_t*>(shared_memory());  // [warp][digit]: counts, then where they begin
  uint32_t* warp_sums = places + kWarps * kDigits;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPairs + warp * (kPairs / kWarps) + lane;
  uint32_t* mine = places + warp * kDigits;
  for (int i = lane; i < kDigits; i += 32) mine[i] = 0;
  __syncwarp();
  uint32_t key[kRounds], rank[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = first + round * 32;
    key[round] = i < n ? keys[i] : 0;
    const uint32_t digit = (key[round] >> shift) % kDigits;
    unsigned same = __ballot_sync(kWarp, i < n);
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
      const unsigned ones = __ballot_sync(kWarp, static_cast<int>(digit >> bit & 1));
      same &= digit >> bit & 1 ? ones : ~ones;
    }
    rank[round] = mine[digit] + static_cast<uint32_t>(__popc(same & ((1u << lane) - 1)));
    __syncwarp();
    if (i < n && __ffs(static_cast<int>(same)) - 1 == lane) mine[digit] += static_cast<uint32_t>(__popc(same));
    __syncwarp();
  }
  __syncthreads();
  uint32_t place = sum_before(totals[tid], warp_sums) + offsets[static_cast<int64_t>(tid) * gridDim.x + blockIdx.x];
  for (int w = 0; w < kWarps; ++w) {
    const uint32_t count = places[w * kDigits + tid];
    places[w * kDigits + tid] = place;
    place += count;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int64_t i = first + round * 32;
    if (i >= n) continue;
    const uint32_t to = mine[(key[round] >> shift) % kDigits] + rank[round];
    keys_out[to] = key[round];
    rows_out[to] = rows ? rows[i] : static_cast<uint32_t>(i);
  }
}

int passes_of(int64_t n_keys) {
  int n = 1;
  while (n_keys >> (8 * n)) ++n;
  return n;
}

}  // namespace

size_t sort_workspace(int64_t n_total) {
  return sizeof(uint32_t) * kDigits * static_cast<size_t>(blocks_of(n_total) + 1);
}

int sort_place(int64_t n_keys) { return passes_of(n_keys) % 2; }

int sort_keys(uint32_t* pairs, int64_t n_total, int64_t n_keys, void* workspace, void* stream) {
  const int64_t n_blocks = blocks_of(n_total);
  uint32_t* totals = static_cast<uint32_t*>(workspace);
  uint32_t* counts = totals + kDigits;
  const size_t sums = sizeof(uint32_t) * kWarps, digits = sizeof(uint32_t) * kDigits;
  for (int pass = 0; pass < passes_of(n_keys); ++pass) {
    const uint32_t* from = pairs + 2 * n_total * (pass % 2);
    uint32_t* to = pairs + 2 * n_total * ((pass + 1) % 2);
    if (const int error = launch(counts_kernel, n_blocks, kThreads, digits, stream, from, n_total, 8 * pass, counts))
      return error;
    if (const int error = launch(offsets_kernel, kDigits / kWarps, kThreads, 0, stream, counts, n_blocks, totals))
      return error;
    if (const int error =
            launch(scatter_kernel, n_blocks, kThreads, kWarps * digits + sums, stream, from,
                   pass == 0 ? static_cast<const uint32_t*>(nullptr) : from + n_total, n_total, 8 * pass,
                   static_cast<const uint32_t*>(counts), static_cast<const uint32_t*>(totals), to, to + n_total))
      return error;
  }
  return 0;
}

}  // namespace fastvq::cuda
