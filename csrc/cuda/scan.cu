// Rows against every code by the definition: double, d = 0 ... D-1 in order, one accumulator, every operation rounded.
//
//   x [H, N, D], codes [H, K, D] -> indices [H, N]
//
// A block owns a span of rows and lists those that are to be scanned. Sixteen of them at a time meet all codes, 128 at a
// time, one code a thread:
//
//     codes 128 x 16 dims -> shared (transposed)   rows 16 x 16 dims -> shared
//     thread j: sums[0..15] over d, in order       (a code's dims come in sixteens; the accumulators stay in registers)
//
// 1. list the rows of the span; 2. for each sixteen: stage, score, keep the best (score, code) a thread; 3. the best of
// the block: lexicographic minimum by shuffles, then over the four warps.
//
// 4. the sixteen are gathered, where that is asked for.
//
// Shared bytes: 8 (16 x 129 + 16 x 16) for the tiles, 16 (4 x 16) for the warps' best, 8 x 16 for the choice, 8 x span for
// the list, and the counters.
#include "exact.cuh"
#include "gather.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kRows = 16, kCodes = 128, kDims = 16, kWarps = kCodes / 32;
constexpr int kCodesPitch = kCodes + 1;  // a transposed store then hits all banks
// A span of rows a block: where every row is scanned, one sixteen; where few are, enough to read the indices quickly.
constexpr int kShortSpan = kRows, kLongSpan = 256;

struct Shared {
  double codes[kDims * kCodesPitch];
  double rows[kDims * kRows];  // [dim][row]: a thread reads all rows of one dim
  double best[kWarps * kRows];
  int64_t best_code[kWarps * kRows];
  int64_t chosen[kRows];
  int n_listed;
  int not_finite;  // one bit a row
};

template <Metric kMetric>
__global__ void __launch_bounds__(kCodes) scan_kernel(Scan s, int span, int64_t n_spans) {
  unsigned char* memory = shared_memory();
  Shared& m = *reinterpret_cast<Shared*>(memory);
  int64_t* list = reinterpret_cast<int64_t*>(memory + sizeof(Shared));
  const int64_t N = s.x.n_outer * s.x.n_inner, D = s.x.dim, K = s.codes.n_codes;
  const int64_t h = blockIdx.x / n_spans, first = blockIdx.x % n_spans * span;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t last = first + span < N ? first + span : N;
  int64_t* indices = s.indices + h * N;

  // One thread lists, so that the list is in order; it is short, and nearly always empty.
  if (tid == 0) {
    m.n_listed = 0;
    if (!s.unresolved_only)
      for (int64_t r = first; r < last; ++r) {
        if (s.mask && !s.mask[h * N + r])
          indices[r] = -1;
        else
          list[m.n_listed++] = r;
      }
  }
  __syncthreads();
  if (s.unresolved_only) {
    for (int64_t base = first; base < last; base += kCodes) {
      const bool mine = base + tid < last && indices[base + tid] == kUnresolved;
      const unsigned found = __ballot_sync(kWarp, mine);
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp) {
          if (mine) list[m.n_listed + __popc(found & ((1u << lane) - 1))] = base + tid;
          __syncwarp();
          if (lane == 0) m.n_listed += __popc(found);
        }
        __syncthreads();
      }
    }
  }

  const int n_listed = m.n_listed;
  const bool gathers = s.gather.partial != nullptr;
  double squares = 0;
  if (gathers && !s.unresolved_only && s.mask) {
    if (tid < span) m.chosen[tid] = first + tid < last && !s.mask[h * N + first + tid] ? -1 : kUnresolved;
    __syncthreads();
    squares = gather_rows<kCodes, 1, double>(
        s.gather, s.x, s.codes, h, static_cast<int>(last - first), m.chosen, [&](int i) { return first + i; },
        [](int) { return true; });
    __syncthreads();
  }
  for (int from = 0; from < n_listed; from += kRows) {
    const int n_rows = n_listed - from < kRows ? n_listed - from : kRows;
    if (tid == 0) m.not_finite = 0;
    double best[kRows];
    int best_tile[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      best[i] = HUGE_VAL;
      best_tile[i] = -1;
    }
    for (int64_t k0 = 0; k0 < K; k0 += kCodes) {
      double sums[kRows], square = 0, odd = 0;
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i] = 0;
      for (int64_t d0 = 0; d0 < D; d0 += kDims) {
        const int n_dims = static_cast<int>(D - d0 < kDims ? D - d0 : kDims);
        __syncthreads();
        for (int e = tid; e < kCodes * kDims; e += kCodes) {
          const int d = e % kDims, j = e / kDims;
          if (d < n_dims && k0 + j < K)
            m.codes[d * kCodesPitch + j] =
                load_double(s.codes.data, s.codes.dtype, code_offset(s.codes, h, k0 + j) + (d0 + d) * s.codes.stride_d);
        }
        for (int e = tid; e < kRows * kDims; e += kCodes) {
          const int d = e % kDims, i = e / kDims;
          double v = 0;
          if (d < n_dims && i < n_rows)
            v = load_double(s.x.data, s.x.dtype, row_offset(s.x, h, list[from + i]) + (d0 + d) * s.x.stride_d);
          m.rows[d * kRows + i] = v;
          if (!is_finite(v)) atomicOr(&m.not_finite, 1 << i);
        }
        __syncthreads();
        if (k0 + tid < K)
          for (int d = 0; d < n_dims; ++d) {
            const double c = m.codes[d * kCodesPitch + tid];
            odd += __dsub_rn(c, c);  // 0 for a finite code, NaN for another
            if (kMetric == Metric::cosine) square = __dadd_rn(square, __dmul_rn(c, c));
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const double v = m.rows[d * kRows + i];
              if (kMetric == Metric::euclidean) {
                const double t = __dsub_rn(v, c);
                sums[i] = __dadd_rn(sums[i], __dmul_rn(t, t));
              } else {
                sums[i] = __dadd_rn(sums[i], __dmul_rn(v, c));
              }
            }
          }
      }
      const double norm = __dsqrt_rn(square);
      const bool candidate = k0 + tid < K && odd == 0 && (kMetric != Metric::cosine || norm != 0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        double score = sums[i];
        if (kMetric != Metric::euclidean) score = -score;
        if (kMetric == Metric::cosine) score = __ddiv_rn(score, norm);
        if (candidate && score < best[i]) {  // a later code of the same score does not replace an earlier one
          best[i] = score;
          best_tile[i] = static_cast<int>(k0 / kCodes);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      double score = best[i];
      int64_t code = best_tile[i] < 0 ? K : static_cast<int64_t>(best_tile[i]) * kCodes + tid;
      group_minimum(score, code, 32);
      if (lane == 0) {
        m.best[warp * kRows + i] = score;
        m.best_code[warp * kRows + i] = code;
      }
    }
    __syncthreads();
    if (tid < n_rows) {
      double score = m.best[tid];
      int64_t code = m.best_code[tid];
      for (int w = 1; w < kWarps; ++w) {
        const double other = m.best[w * kRows + tid];
        const int64_t other_code = m.best_code[w * kRows + tid];
        if (other < score || (other == score && other_code < code)) {
          score = other;
          code = other_code;
        }
      }
      m.chosen[tid] = code == K || (m.not_finite >> tid & 1) ? 0 : code;
      indices[list[from + tid]] = m.chosen[tid];
    }
    __syncthreads();
    if (gathers) {
      squares += gather_rows<kCodes, 1, double>(
          s.gather, s.x, s.codes, h, n_rows, m.chosen, [&](int i) { return list[from + i]; },
          [&](int i) { return (m.not_finite >> i & 1) == 0; });
      __syncthreads();
    }
  }
  // Rows that were left to this scan have been counted where they were left.
  if (gathers) finish_gather<kCodes>(s.gather, squares, tid == 0 && !s.unresolved_only ? n_listed : 0, m.best);
}

}  // namespace

int64_t scan_blocks(const Rows& x, bool unresolved_only) {
  const int span = unresolved_only ? kLongSpan : kShortSpan;
  return x.n_heads * ((x.n_rows() + span - 1) / span);
}

int scan(const Scan& s, void* stream) {
  const int span = s.unresolved_only ? kLongSpan : kShortSpan;
  const int64_t n_blocks = scan_blocks(s.x, s.unresolved_only);
  const size_t shared = sizeof(Shared) + sizeof(int64_t) * static_cast<size_t>(span);
  const auto kernel = s.metric == Metric::euclidean ? scan_kernel<Metric::euclidean>
                      : s.metric == Metric::cosine  ? scan_kernel<Metric::cosine>
                                                    : scan_kernel<Metric::dot>;
  return launch(kernel, n_blocks, kCodes, shared, stream, s, span, n_blocks / s.x.n_heads);
}

}  // namespace fastvq::cuda
