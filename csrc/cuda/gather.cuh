// The epilogue of quantization for a block of rows whose codes are chosen: writes the codes, adds up the squared distances
// and feeds the rows to the statistics. The lookup and the exhaustive scan both use it, each for the rows that it resolves.
//
//   a row's elements lie side by side             16 bytes a lane, as many lanes a row as it fills, 32 at most
//   rows lie side by side (channel-first image)   a lane a row
//
// Each lane has several rows under way, because it waits for memory.
//
// A lane adds its squares in double, in the order in which it meets them, and so the block's sum has a fixed order too.
#pragma once
#include "filter.cuh"
#include "scan.cuh"

namespace fastvq::cuda {

__device__ __forceinline__ void load_four(const void* data, DType dtype, int64_t at, int64_t stride, int d, int dim,
                                          double (&out)[4]) {
  if (dtype == DType::f64) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = d + i < dim ? static_cast<const double*>(data)[at + (d + i) * stride] : 0;
    return;
  }
  float four[4];
  load_four(data, dtype, at, stride, d, dim, four);
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = static_cast<double>(four[i]);
}

// Each rounded once; those beyond the last are left out.
template <class Real>
__device__ __forceinline__ void store_four(void* data, DType dtype, int64_t at, int64_t stride, int d, int dim,
                                           const Real (&v)[4]) {
  if (dtype == DType::f32 && stride == 1 && d + 4 <= dim) {
    float* to = static_cast<float*>(data) + at + d;
    if (reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0) {
      *reinterpret_cast<float4*>(to) = {static_cast<float>(v[0]), static_cast<float>(v[1]), static_cast<float>(v[2]),
                                        static_cast<float>(v[3])};
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (d + i < dim) {
      const int64_t to = at + (d + i) * stride;
      if (dtype == DType::f64)
        static_cast<double*>(data)[to] = static_cast<double>(v[i]);
      else
        store_float(data, dtype, to, static_cast<float>(v[i]));
    }
}

// Lanes that share a row.
__host__ __device__ __forceinline__ int lanes_of_row(const Rows& x) {
  int lanes = 1;
  if (x.stride_d == 1)
    while (lanes < 32 && 4 * lanes < x.dim) lanes *= 2;
  return lanes;
}

// The sum over the block, in a fixed order, on thread 0. workspace [kThreads / 32]: shared memory.
template <int kThreads>
__device__ __forceinline__ double block_sum(double v, double* workspace) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) workspace[threadIdx.x / 32] = v;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += workspace[w];
  __syncthreads();
  return total;
}

// The block's squares, and its number of real rows: every thread brings its own.
template <int kThreads>
__device__ __forceinline__ void finish_gather(const Gather& g, double squares, int n_real, double* workspace) {
  squares = block_sum<kThreads>(squares, workspace);
  const double real = block_sum<kThreads>(n_real, workspace);
  if (threadIdx.x == 0) {
    g.partial[2 * static_cast<int64_t>(blockIdx.x)] = squares;
    g.partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = real;
  }
}

// Rows row_of(0) ... row_of(n - 1) of head h, whose codes are chosen[0 ... n - 1]: -1 is masked. kUnresolved: skipped
// here; the exhaustive scan writes that row.
// finite(i): whether row i holds neither NaN nor infinity. Returns the squares that this thread met.
template <int kThreads, int kRowsInFlight, class Real, class RowOf, class Finite>
__device__ __forceinline__ double gather_rows(const Gather& g, const Rows& x, const Codes& codes, int64_t h, int n,
                                              const int64_t* chosen, const RowOf& row_of, const Finite& finite) {
  const int tid = threadIdx.x, D = static_cast<int>(x.dim);
  const int lanes = lanes_of_row(x), groups = kThreads / lanes, lane = tid % lanes;
  double squares = 0;
  for (int first = tid / lanes; first < n; first += kRowsInFlight * groups) {
    int64_t code[kRowsInFlight], from[kRowsInFlight], to[kRowsInFlight], from_code[kRowsInFlight];
    bool counts[kRowsInFlight];
#pragma unroll
    for (int a = 0; a < kRowsInFlight; ++a) {
      const int i = first + a * groups;
      const int64_t r = row_of(i < n ? i : first);
      code[a] = i < n ? chosen[i] : kUnresolved;
      from[a] = row_offset(x, h, r);
      to[a] = row_offset(g.quantized, h, r);
      from_code[a] = code_offset(codes, h, code[a] < 0 ? 0 : code[a]);
      counts[a] = code[a] >= 0 && finite(i);
      if (lane != 0 || code[a] == kUnresolved) continue;
      const int64_t key = h * codes.n_codes + code[a];
      if (g.keys)
        g.keys[h * x.n_outer * x.n_inner + r] = static_cast<uint32_t>(counts[a] ? key : codes.n_heads * codes.n_codes);
      if (g.sums && counts[a]) atomicAdd(reinterpret_cast<unsigned long long*>(g.counts) + key, 1ull);
    }
    for (int d = 4 * lane; d < D; d += 4 * lanes) {
      Real v[kRowsInFlight][4], c[kRowsInFlight][4];
#pragma unroll
      for (int a = 0; a < kRowsInFlight; ++a) {
#pragma unroll
        for (int e = 0; e < 4; ++e) v[a][e] = c[a][e] = 0;
        if (code[a] < 0) continue;
        load_four(x.data, x.dtype, from[a], x.stride_d, d, D, v[a]);
        load_four(codes.data, codes.dtype, from_code[a], codes.stride_d, d, D, c[a]);
      }
#pragma unroll
      for (int a = 0; a < kRowsInFlight; ++a) {
        if (code[a] == kUnresolved) continue;
        store_four(const_cast<void*>(g.quantized.data), g.quantized.dtype, to[a], g.quantized.stride_d, d, D, c[a]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const double t = static_cast<double>(v[a][e]) - static_cast<double>(c[a][e]);
          // Infinity stands for no distance at all, as NaN does.
          squares += fabs(static_cast<double>(v[a][e])) < HUGE_VAL ? t * t : NAN;
        }
        if (g.sums && counts[a])
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (d + e < D) {
              const int64_t at = (h * codes.n_codes + code[a]) * D + d + e;
              if (g.sums_double)
                atomicAdd(static_cast<double*>(g.sums) + at, static_cast<double>(v[a][e]));
              else
                atomicAdd(static_cast<float*>(g.sums) + at, static_cast<float>(v[a][e]));
            }
      }
    }
  }
  return squares;
}

}  // namespace fastvq::cuda
