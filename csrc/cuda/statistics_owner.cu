// Sums per code with an owner for every accumulator: no atomics, no sort.
//
// A block adds a span of one head's rows in 16 columns, for all codes, in shared memory. Its threads are 16 groups of
// 16: group g owns the codes k with k % 16 == g, thread c of it the column c of those.
//
//     rows in tiles of 64:  x 64 x 16 -> shared (all threads)   keys 64 -> shared
//     group g:              of the tile's rows those of its codes, found by ballot, in order: sums[k][c] += x[r][c]
//
// 1. tiles; 2. the block's sums and counts to the workspace, [H, span, K, D]; 3. a second kernel adds the spans, in order.
//
// Shared bytes: K x 16 x 8 + 64 x 16 x 8 + 4 (K + 64).
#include "statistics.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = kStatisticsThreads;
constexpr int kColumns = 16, kGroups = kThreads / kColumns, kTile = 64;
constexpr int64_t kMostSpans = 64;

int64_t slices_of(const Statistics& s) { return (s.x.dim + kColumns - 1) / kColumns; }
// At least twice as many rows as codes, so that what is written is less than what is read.
int64_t spans_of(const Statistics& s) {
  const int64_t n = s.n_rows / (2 * s.n_codes);
  return n < 1 ? 1 : n > kMostSpans ? kMostSpans : n;
}
size_t shared_bytes(int64_t n_codes) {
  return sizeof(double) * kColumns * static_cast<size_t>(n_codes + kTile) +
         sizeof(uint32_t) * static_cast<size_t>(n_codes + kTile);
}

__global__ void __launch_bounds__(kThreads, 1)  // shared memory lets no second block in
    owners_kernel(Statistics s, const uint32_t* keys, int64_t n_slices, int64_t n_spans, double* partial,
                  uint32_t* partial_counts) {
  const int64_t K = s.n_codes, D = s.x.dim;
  double* sums = reinterpret_cast<double*>(shared_memory());
  double* tile = sums + K * kColumns;
  uint32_t* counts = reinterpret_cast<uint32_t*>(tile + kTile * kColumns);
  uint32_t* codes = counts + K;
  const int tid = threadIdx.x, lane = tid % 32, column = tid % kColumns, group = tid / kColumns;
  const int64_t slice = blockIdx.x % n_slices, span = blockIdx.x / n_slices % n_spans,
                h = blockIdx.x / n_slices / n_spans;
  const int64_t first = s.n_rows * span / n_spans, last = s.n_rows * (span + 1) / n_spans;
  const int64_t d = slice * kColumns + column;

  for (int64_t i = tid; i < K * kColumns; i += kThreads) sums[i] = 0;
  for (int64_t k = tid; k < K; k += kThreads) counts[k] = 0;
  for (int64_t base = first; base < last; base += kTile) {
    const int n = static_cast<int>(last - base < kTile ? last - base : kTile);
    __syncthreads();
    if (tid < kTile) {
      const int64_t key = tid < n ? keys[h * s.n_rows + base + tid] : s.n_keys;
      codes[tid] = static_cast<uint32_t>(key == s.n_keys ? K : key - h * K);
    }
#pragma unroll
    for (int i = group; i < kTile; i += kGroups)
      if (i < n && d < D)
        tile[i * kColumns + column] = load_double(s.x.data, s.x.dtype, row_offset(s.x, h, base + i) + d * s.x.stride_d);
    __syncthreads();
    for (int half = 0; half < kTile; half += 32) {
      const uint32_t code = codes[half + lane];
      const uint32_t owner = code < K ? code % kGroups : kGroups;
      const int low = group & ~1;  // a warp is two groups
      const unsigned of_low = __ballot_sync(kWarp, owner == static_cast<uint32_t>(low));
      const unsigned of_high = __ballot_sync(kWarp, owner == static_cast<uint32_t>(low + 1));
      for (unsigned mine = group == low ? of_low : of_high; mine; mine &= mine - 1) {
        const int i = half + __ffs(static_cast<int>(mine)) - 1;
        const uint32_t k = codes[i];
        if (d < D) sums[k * kColumns + column] += tile[i * kColumns + column];
        if (column == 0) ++counts[k];
      }
    }
  }
  __syncthreads();
  const int64_t at = (h * n_spans + span) * K;
  if (d < D)
    for (int64_t k = group; k < K; k += kGroups) partial[(at + k) * D + d] = sums[k * kColumns + column];
  if (slice == 0)
    for (int64_t k = tid; k < K; k += kThreads) partial_counts[at + k] = counts[k];
}

__global__ void __launch_bounds__(kThreads)
    spans_kernel(Statistics s, int64_t n_spans, const double* partial, const uint32_t* partial_counts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, D = s.x.dim;
  if (i >= s.n_keys * D) return;
  const int64_t key = i / D, d = i % D, h = key / s.n_codes, k = key % s.n_codes;
  double sum = 0;
  int64_t count = 0;
  for (int64_t span = 0; span < n_spans; ++span) {
    const int64_t at = (h * n_spans + span) * s.n_codes + k;
    sum += partial[at * D + d];
    if (d == 0) count += partial_counts[at];
  }
  store_sum(s, i, sum);
  if (d == 0) s.counts[key] = count;
}

}  // namespace

bool owners_fit(const Statistics& s) { return shared_bytes(s.n_codes) <= shared_limit(); }

size_t owners_workspace(const Statistics& s) {
  const size_t codes = static_cast<size_t>(s.n_keys * spans_of(s));
  return codes * static_cast<size_t>(s.x.dim) * sizeof(double) + codes * sizeof(uint32_t);
}

int owners_add(const Statistics& s, const uint32_t* keys, void* workspace, void* stream) {
  const int64_t n_slices = slices_of(s), n_spans = spans_of(s), elements = s.n_keys * s.x.dim;
  double* partial = static_cast<double*>(workspace);
  uint32_t* partial_counts = reinterpret_cast<uint32_t*>(partial + elements * n_spans);
  if (const int error = launch(owners_kernel, s.x.n_heads * n_spans * n_slices, kThreads, shared_bytes(s.n_codes),
                               stream, s, keys, n_slices, n_spans, partial, partial_counts))
    return error;
  return launch(spans_kernel, (elements + kThreads - 1) / kThreads, kThreads, 0, stream, s, n_spans, partial,
                partial_counts);
}

}  // namespace fastvq::cuda
