// Residual quantization, all levels in one launch: the residuals of a block of rows stay in shared memory.
//
//   r = x;  for each level:  i = nearest(r, codes);  r -= c_i        quantized = sum of the c_i, in the order of levels
//
//     shared:  residual [kRows, width] float | what the search keeps (search.cuh)
//
// For each level: 1. its first codes are sent for; 2. a warp lays out its rows of the residual as fp16 operands;
// 3. search and choice, as in lookup.cu; 4. a row that they leave is scored against every code by its warp,
// because the next level needs its code in this launch; 5. the warp subtracts the codes from its rows, and adds up the
// squares of the new residual, in double. At last the codes are read again and added: shared memory for the sums would
// cost rows.
//
// A row belongs to one warp outside of search and choice, four of its elements to one lane. Residuals and sums are
// float; each warp writes the squares of each level apart, so that their order is fixed.
#include "../fastvq_cuda.h"
#include "choose.cuh"
#include "shapes.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kWarps = kSearchThreads / 32;
constexpr int kRowsInFlight = 4;  // rows of a warp whose codes are under way at a time
constexpr size_t kResidualBytes = sizeof(float);  // of each element, beside the search

struct Residual {
  Rows x;
  Codes levels;  // float; a head is a level
  Metric metric;
  bool fast;
  const uint8_t* mask;  // [N] or null
  Rows quantized;
  int64_t* indices;  // [N, Q]
  double* squares;  // [Q, n_blocks, kWarps]
};

__device__ __forceinline__ const float* code_of(const Residual& a, int64_t q, int64_t k) {
  return static_cast<const float*>(a.levels.data) + code_offset(a.levels, q, k);
}

// Four consecutive dims of a code, zero beyond the last.
__device__ __forceinline__ void load_code(const Residual& a, int64_t q, int64_t k, int d, float (&out)[4]) {
  const float* code = code_of(a, q, k) + d * a.levels.stride_d;
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = d + e < a.levels.dim ? code[e * a.levels.stride_d] : 0;
}

// The least (score, code) of all codes, a code a lane; 0 where there is none. A code that is not finite scores NaN or
// infinity, and so does a zero code under the cosine metric.
template <class Score>
__device__ __forceinline__ int64_t scan_row(int64_t n_codes, const Score& score_of) {
  double best = HUGE_VAL;
  int64_t code = kUnresolved;
#pragma unroll 1
  for (int64_t k = threadIdx.x % 32; k < n_codes; k += 32) {
    const double d = score_of(k);
    if (d > -HUGE_VAL && d < best) {
      best = d;
      code = k;
    }
  }
  group_minimum(best, code, 32);
  return code < 0 ? 0 : code;
}

// Takes the codes of level q off a warp's rows. Returns the lane's part of the squares of what is left.
template <class S>
__device__ __forceinline__ double advance(const Residual& a, int64_t q, const SearchMemory<S>& m, float* residual,
                                          int width) {
  const int lane = threadIdx.x % 32, dim = static_cast<int>(a.x.dim);
  double square = 0;
#pragma unroll 1
  for (int i0 = threadIdx.x / 32; i0 < S::kRows; i0 += kWarps * kRowsInFlight)
#pragma unroll 1
    for (int d = 4 * lane; d < dim; d += 128) {
      float code[kRowsInFlight][4];
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int64_t k = m.chosen[i0 + j * kWarps];
        if (k >= 0) load_code(a, q, k, d, code[j]);
      }
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        if (m.chosen[i0 + j * kWarps] < 0) continue;
        float4* at = reinterpret_cast<float4*>(residual + (i0 + j * kWarps) * width + d);
        const float4 held = *at;
        const float before[4] = {held.x, held.y, held.z, held.w};
        float after[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          after[e] = before[e] - code[j][e];
          const double gap = static_cast<double>(before[e]) - static_cast<double>(code[j][e]);
          square += gap * gap;
        }
        *at = {after[0], after[1], after[2], after[3]};
      }
    }
  return square;
}

// quantized of one row, from the indices of its levels.
__device__ __forceinline__ void write_sum(const Residual& a, int64_t r) {
  const int dim = static_cast<int>(a.x.dim);
  const int64_t Q = a.levels.n_heads, to = row_offset(a.quantized, 0, r);
  const int64_t* chosen = a.indices + r * Q;
  for (int d = 4 * static_cast<int>(threadIdx.x % 32); d < dim; d += 128) {
    float sum[4] = {0, 0, 0, 0};
#pragma unroll 4
    for (int64_t q = 0; q < Q; ++q) {
      if (chosen[q] < 0) continue;
      float code[4];
      load_code(a, q, chosen[q], d, code);
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += code[e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (d + e < dim)
        store_float(const_cast<void*>(a.quantized.data), a.quantized.dtype, to + (d + e) * a.quantized.stride_d,
                    sum[e]);
  }
}

template <class S>
__global__ void __launch_bounds__(kSearchThreads, S::kBlocks) residual_kernel(Residual a, PackedCodebook p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * S::kRows, N = a.x.n_outer * a.x.n_inner;
  const int64_t Q = a.levels.n_heads, K = a.levels.n_codes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = p.n_steps * 16;
  float* residual = reinterpret_cast<float*>(shared_memory());
  const SearchMemory<S> m(shared_memory() + S::kRows * width * sizeof(float), width);
  for (int i = warp; i < S::kRows; i += kWarps) {
    const int64_t r = first + i;
    for (int d = 4 * lane; d < width; d += 128) {
      float v[4] = {0, 0, 0, 0};
      if (r < N) load_four(a.x.data, a.x.dtype, row_offset(a.x, 0, r), a.x.stride_d, d, p.dim, v);
      *reinterpret_cast<float4*>(residual + i * width + d) = {v[0], v[1], v[2], v[3]};
    }
  }
#pragma unroll 1
  for (int64_t q = 0; q < Q; ++q) {
    const PackedHead head(p, q);
    Stream<S> stream(head, m.stages);
#pragma unroll
    for (int i = 0; i < S::kStages - 1; ++i) stream.copy_stage();
    const HeadInfo info = p.heads[q];
#pragma unroll 1
    for (int i = warp; i < S::kRows; i += kWarps) {
      const int64_t r = first + i;
      const bool real = r < N, skipped = real && a.mask && !a.mask[r];
      const RowStatus state = place_row<S::kPart>(
          [&](int d, float (&v)[4]) {
            const float4 held = *reinterpret_cast<const float4*>(residual + i * width + d);
            v[0] = held.x;
            v[1] = held.y;
            v[2] = held.z;
            v[3] = held.w;
          },
          real && !skipped, a.metric, a.fast, info, p.means + q * width, p.dim, width, i % 16,
          m.operand + i / 16 * p.n_steps * 512, m.info[i]);
      if (lane == 0) m.state[i] = skipped ? masked : state;
    }
    __syncthreads();
    search_codes(head, m, stream, a.fast);
    const auto score_of = [&](int i, int64_t k) {
      const float *row = residual + i * width, *code = code_of(a, q, k);
      return exact_score(
          a.metric, a.x.dim, [&](int64_t d) { return static_cast<double>(row[d]); },
          [&](int64_t d) { return static_cast<double>(code[d * a.levels.stride_d]); });
    };
    choose_codes(head, m, a.fast, score_of);
    __syncthreads();
#pragma unroll 1
    for (int i = warp; i < S::kRows; i += kWarps) {
      const int64_t r = first + i;
      int64_t chosen = r < N ? m.chosen[i] : -1;
      if (chosen == kUnresolved) chosen = scan_row(K, [&](int64_t k) { return score_of(i, k); });
      __syncwarp();
      if (lane == 0) {
        m.chosen[i] = chosen;
        if (r < N) a.indices[r * Q + q] = chosen;
      }
    }
    __syncwarp();
    const double square = warp_sum(advance(a, q, m, residual, width));
    // Infinite only where a residual holds infinity, which stands for no distance at all: NaN then.
    if (lane == 0) a.squares[(q * gridDim.x + blockIdx.x) * kWarps + warp] = square + (square - square);
  }
  for (int i = warp; i < S::kRows && first + i < N; i += kWarps) write_sum(a, first + i);
}

// Two blocks to a multiprocessor where that is possible: one places rows while the other multiplies.
template <class F>
auto with_residual_shape(const PackedCodebook& p, const F& f) {
  const size_t limit = shared_limit(), half = limit / 2;
  return with_shape<Rows32>(p, block_bytes<Rows64>(p.n_steps * 16, kResidualBytes) <= half ? half : limit,
                            kResidualBytes, f);
}

}  // namespace

bool residual_fits(const Rows& x, const Codes& levels) {
  return levels.dtype == DType::f32 && filter_serves(x, levels) &&
         shape_fits<Rows32>(static_cast<int>((levels.dim + 63) / 64 * 64), kResidualBytes);
}

size_t residual_workspace(const Codes& levels) { return packed_layout(levels, nullptr, nullptr); }

int64_t residual_parts(const Rows& x, const Codes& levels) {
  PackedCodebook packed;
  packed_layout(levels, nullptr, &packed);
  return with_residual_shape(packed, [&](auto shape) {
    constexpr int64_t rows = decltype(shape)::kRows;
    return (x.n_rows() + rows - 1) / rows * kWarps;
  });
}

int residual_quantize(const Rows& x, const Codes& levels, Metric metric, bool fast, const uint8_t* mask,
                      const Rows& quantized, int64_t* indices, double* squares, void* workspace, void* stream) {
  PackedCodebook packed;
  packed_layout(levels, static_cast<unsigned char*>(workspace), &packed);
  if (const int error = pack_codes(levels, metric, fast, packed, stream)) return error;
  const Residual call{x, levels, metric, fast, mask, quantized, indices, squares};
  return with_residual_shape(packed, [&](auto shape) {
    using S = decltype(shape);
    return launch(residual_kernel<S>, (x.n_rows() + S::kRows - 1) / S::kRows, kSearchThreads,
                  block_bytes<S>(packed.n_steps * 16, kResidualBytes), stream, call, packed);
  });
}

}  // namespace fastvq::cuda
