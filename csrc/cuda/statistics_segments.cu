// Sums of rows that are sorted by key: runs of one key are added in pieces that end at multiples of 128 positions, so a
// code that holds nearly every row is added by all processors.
//
//   keys [n], rows [n] -> sums [H, K, D], counts [H, K]
//
// A warp takes 128 positions and 32, 64 or 128 columns, lane l the columns l, l + 32, ...:
//   1. four rows at a time are loaded, then added in order; a row that is not finite is passed over
//   2. at the end of a run: one that lies whole in the piece is written out; one that began before goes to
//      partial[piece][0], one that goes on behind to partial[piece][1]
//   3. a second kernel finds each key's run by bisection, adds the parts of one that was cut, in order, and writes zeros
//      for a code without rows
#include "statistics.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = kStatisticsThreads, kWarps = kThreads / 32;
constexpr int kPiece = 128, kRowsInFlight = 4, kWidest = 128;

struct Partial {
  double* sums;  // [n_pieces, 2, D]
  uint32_t* counts;  // [n_pieces, 2]
};

int64_t pieces_of(const Statistics& s) { return (s.n_total + kPiece - 1) / kPiece; }

template <int kColumns>
__global__ void __launch_bounds__(kThreads, 2)  // else the compiler aims at more blocks, and spills
    pieces_kernel(Statistics s, const uint32_t* keys, const uint32_t* rows, Partial partial, int64_t n_tiles) {
  const int lane = threadIdx.x % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t piece = unit / n_tiles, D = s.x.dim, column = unit % n_tiles * (32 * kColumns) + lane;
  const int64_t first = piece * kPiece;
  if (first >= s.n_total) return;
  const int64_t last = first + kPiece < s.n_total ? first + kPiece : s.n_total;

  double sums[kColumns];
  uint32_t count = 0, current = keys[first];
  int64_t begin = first;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) sums[c] = 0;

  const auto finish = [&](int64_t end) {
    if (current < s.n_keys) {
      const bool before = begin == first && first > 0 && keys[first - 1] == current;
      const bool behind = end == last && last < s.n_total && keys[last] == current;
      const int64_t part = piece * 2 + (before ? 0 : 1);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int64_t d = column + 32 * c;
        if (d >= D) continue;
        if (before || behind)
          partial.sums[part * D + d] = sums[c];
        else
          store_sum(s, current * D + d, sums[c]);
      }
      if (column == 0) {
        if (before || behind)
          partial.counts[part] = count;
        else
          s.counts[current] = count;
      }
    }
    count = 0;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c] = 0;
  };

  for (int64_t base = first; base < last; base += 32) {
    const int64_t mine = base + lane;
    const uint32_t my_key = mine < last ? keys[mine] : 0, my_row = mine < last ? rows[mine] : 0;
    const int n = static_cast<int>(last - base < 32 ? last - base : 32);
    for (int j = 0; j < n; j += kRowsInFlight) {
      double values[kRowsInFlight][kColumns];
      uint32_t key[kRowsInFlight];
#pragma unroll
      for (int a = 0; a < kRowsInFlight; ++a) {
        key[a] = __shfl_sync(kWarp, my_key, j + a);
        const uint32_t row = __shfl_sync(kWarp, my_row, j + a);
        const bool here = j + a < n && key[a] < s.n_keys;
        const int64_t at = here ? row_of_all(s.x, s.n_rows, row) : 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int64_t d = column + 32 * c;
          values[a][c] = here && d < D ? load_double(s.x.data, s.x.dtype, at + d * s.x.stride_d) : 0;
        }
      }
#pragma unroll
      for (int a = 0; a < kRowsInFlight; ++a) {
        if (j + a >= n) break;
        if (key[a] != current) {
          finish(base + j + a);
          begin = base + j + a;
          current = key[a];
        }
        bool finite = true;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) finite &= is_finite(values[a][c]);
        // Rows of several tiles of columns were looked at when the keys were made.
        if (__any_sync(kWarp, !finite)) continue;
        ++count;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[c] += values[a][c];
      }
    }
  }
  finish(last);
}

// The first position whose key is not below `key`.
__device__ __forceinline__ int64_t run_start(const uint32_t* keys, int64_t n, int64_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// A warp takes a key.
__global__ void __launch_bounds__(kThreads) join_kernel(Statistics s, const uint32_t* keys, Partial partial) {
  const int lane = threadIdx.x % 32;
  const int64_t key = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32, D = s.x.dim;
  if (key >= s.n_keys) return;
  const int64_t start = run_start(keys, s.n_total, key), end = run_start(keys, s.n_total, key + 1);
  const int64_t first = start / kPiece, last = (end - 1) / kPiece;
  const bool empty = start == end;
  if (!empty && first == last) return;
  // The parts: piece `first` [1], then [0] of each later one. An empty code has none.
  const int64_t behind = empty ? first : last;
  for (int64_t d = lane; d < D; d += 32) {
    double sum = empty ? 0 : partial.sums[(first * 2 + 1) * D + d];
#pragma unroll 8
    for (int64_t piece = first + 1; piece <= behind; ++piece) sum += partial.sums[piece * 2 * D + d];
    store_sum(s, key * D + d, sum);
  }
  if (lane != 0) return;
  int64_t count = empty ? 0 : partial.counts[first * 2 + 1];
#pragma unroll 8
  for (int64_t piece = first + 1; piece <= behind; ++piece) count += partial.counts[piece * 2];
  s.counts[key] = count;
}

}  // namespace

bool segments_check_rows(const Statistics& s) { return s.x.dim <= kWidest; }

size_t segments_workspace(const Statistics& s) {
  const size_t parts = 2 * static_cast<size_t>(pieces_of(s));
  return parts * static_cast<size_t>(s.x.dim) * sizeof(double) + parts * sizeof(uint32_t);
}

int segments_add(const Statistics& s, const uint32_t* sorted, void* workspace, void* stream) {
  const int64_t D = s.x.dim, n_pieces = pieces_of(s), n_tiles = (D + kWidest - 1) / kWidest;
  Partial partial{static_cast<double*>(workspace), nullptr};
  partial.counts = reinterpret_cast<uint32_t*>(partial.sums + 2 * n_pieces * D);
  const auto kernel = D <= 32 ? pieces_kernel<1> : D <= 64 ? pieces_kernel<2> : pieces_kernel<4>;
  if (const int error = launch(kernel, (n_pieces * n_tiles + kWarps - 1) / kWarps, kThreads, 0, stream, s, sorted,
                               sorted + s.n_total, partial, n_tiles))
    return error;
  return launch(join_kernel, (s.n_keys + kWarps - 1) / kWarps, kThreads, 0, stream, s, sorted, partial);
}

}  // namespace fastvq::cuda
