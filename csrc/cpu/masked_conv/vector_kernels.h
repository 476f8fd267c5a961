// Kernels of the masked convolution on vectors of float32, compiled per instruction set.
//
// Tile of a product, AVX-512: 8 rows (pixels) x 3 vectors = 24 sums in registers over all taps and channels; 3 registers
// hold the weights of one input channel, the pixels' values are broadcast from memory. Weights are read in the order
// they were packed and fetched 8 channels ahead: they come from the second-level cache. AVX2: 4 x 3, generic: 4 x 2.
#pragma once
#include <cstdint>

#include "conv_kernels.h"

namespace fastvq {
namespace {

constexpr int kMaxVectors = kLanes == 4 ? 2 : 3, kMaxRows = kLanes == 16 ? 8 : 4;

// Prefetches the lines of a PrefetchLines, `share` of them at every segment of every tile.
struct Prefetcher {
  const char* at;
  int64_t share, outer_left, line, n_lines, stride;

  Prefetcher(const PrefetchLines& t, int64_t n_segments_in_all)
      : at(t.base), share(0), outer_left(t.base ? t.n_outer : 0), line(0), n_lines(t.n_lines), stride(t.stride_outer) {
    if (outer_left && n_segments_in_all) share = (outer_left * n_lines + n_segments_in_all - 1) / n_segments_in_all;
  }
  void step() {
    for (int64_t i = 0; i < share && outer_left > 0; ++i) {
      __builtin_prefetch(at + 64 * line, 1);
      if (++line == n_lines) {
        line = 0;
        at += stride;
        --outer_left;
      }
    }
  }
};

template <int Rows, int Vectors>
void product_tile(const Product& p, const float* a, float* c, Prefetcher& prefetcher) {
  V sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) sum[i][v] = load(p.init ? p.init + v * kLanes : c + i * p.c_row + v * kLanes);
  const float* b = p.b;
  const int64_t row = p.a_row, step = p.a_k;
  for (int64_t s = 0; s < p.n_segments; ++s) {
    prefetcher.step();
    // One pointer for three rows: an x86 address is a base plus an index times 1 or 2.
    const float* base[(Rows + 2) / 3];
    for (int i = 0; i < (Rows + 2) / 3; ++i) base[i] = a + p.a_segment[s] + 3 * i * row;
    // A copy for the loop over channels, because GCC 12 stores the outer array in every iteration.
    V local[Rows][Vectors];
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) local[i][v] = sum[i][v];
    for (int64_t k = 0; k < p.depth; ++k) {
      V w[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        w[v] = load(b + v * kLanes);
        __builtin_prefetch(b + (8 * Vectors + v) * kLanes);
      }
      for (int i = 0; i < Rows; ++i) {
        const V x = broadcast(base[i / 3][(i % 3) * row]);
        for (int v = 0; v < Vectors; ++v) local[i][v] = fma(x, w[v], local[i][v]);
      }
      for (int i = 0; i < (Rows + 2) / 3; ++i) base[i] += step;
      b += Vectors * kLanes;
    }
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) sum[i][v] = local[i][v];
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) store(c + i * p.c_row + v * kLanes, sum[i][v]);
}

template <int Rows, int Vectors>
void product_tail(const Product& p, int64_t n, const float* a, float* c, Prefetcher& prefetcher) {
  if (n == Rows) return product_tile<Rows, Vectors>(p, a, c, prefetcher);
  if constexpr (Rows > 1) product_tail<Rows - 1, Vectors>(p, n, a, c, prefetcher);
}

template <int Vectors>
void product_columns(const Product& p) {
  Prefetcher prefetcher(p.prefetch, p.n_segments * ((p.n_rows + kMaxRows - 1) / kMaxRows));
  int64_t i = 0;
  for (; i + kMaxRows <= p.n_rows; i += kMaxRows)
    product_tile<kMaxRows, Vectors>(p, p.a + i * p.a_row, p.c + i * p.c_row, prefetcher);
  if (i < p.n_rows) product_tail<kMaxRows, Vectors>(p, p.n_rows - i, p.a + i * p.a_row, p.c + i * p.c_row, prefetcher);
}

void product(const Product& p) {
  if (p.n_vectors == 1) return product_columns<1>(p);
  if (p.n_vectors == 2) return product_columns<2>(p);
  if constexpr (kMaxVectors >= 3) product_columns<3>(p);
}

// 2^n and expm1(r) with x = n ln2 + r, for x <= 0. The series is cut after r^7/7!: its relative error on
// |r| <= ln2/2 is below 0.26 * 2^-24. x below -87 is taken as -87 (2^n stays normal); NaN stays NaN.
struct Exp {
  V scale, series;
};
inline Exp split_exp(V x) {
  x = blend(x < broadcast(-87.0f), broadcast(-87.0f), x);
  const V shifted = fma(x, broadcast(1.44269504f), broadcast(12582912.0f));  // rounds to an integer in the low bits
  const V n = shifted - broadcast(12582912.0f);
  V r = fma(n, broadcast(-0.693145752f), x);  // ln2 in two pieces, the first short enough for an exact product
  r = fma(n, broadcast(-1.42860677e-6f), r);
  V q = broadcast(1.0f / 5040.0f);
  q = fma(q, r, broadcast(1.0f / 720.0f));
  q = fma(q, r, broadcast(1.0f / 120.0f));
  q = fma(q, r, broadcast(1.0f / 24.0f));
  q = fma(q, r, broadcast(1.0f / 6.0f));
  q = fma(q, r, broadcast(0.5f));
  Exp e;
  e.series = fma(q * r, r, r);
  e.scale = (V)(((VInt)shifted << 23) + (VInt{} + 0x3f800000));
  return e;
}

// tanh(x) = sign(x) * -m / (2 + m) with m = expm1(-2|x|); sigmoid(x) = (x < 0 ? z : 1) / (1 + z) with z = exp(-|x|).
// m and z carry at most 3 roundings, the quotients two more: both are within 6 * 2^-24 of the true value, relative
// (sigmoid below -87: within 2^-125 absolute).
inline V tanh_of(V x) {
  const VInt sign = (VInt)x & (VInt{} + static_cast<int>(0x80000000u));
  const V magnitude = (V)((VInt)x ^ sign);
  const Exp e = split_exp(broadcast(-2.0f) * magnitude);
  const V m = fma(e.scale, e.series, e.scale - broadcast(1.0f));
  return (V)((VInt)((V{} - m) / (broadcast(2.0f) + m)) ^ sign);
}
inline V sigmoid_of(V x) {
  const VInt negative = x < V{};
  const Exp e = split_exp(blend(negative, x, V{} - x));
  const V z = fma(e.scale, e.series, e.scale);
  return blend(negative, z, broadcast(1.0f)) / (broadcast(1.0f) + z);
}

void gate(float* a, float* b, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const V t = tanh_of(load(a + i)), s = sigmoid_of(load(b + i));
    store(a + i, t);
    store(b + i, s);
    store(out + i, t * s);
  }
}

void gate_backward(const float* __restrict grad, const float* __restrict tanh_a, const float* __restrict sigmoid_b,
                   float* __restrict grad_a, float* __restrict grad_b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i], t = tanh_a[i], s = sigmoid_b[i];
    grad_a[i] = g * s * (1.0f - t * t);
    grad_b[i] = g * t * (s * (1.0f - s));
  }
}

void transpose(const float* src, int64_t src_row, float* dst, int64_t dst_row, int64_t rows, int64_t cols) {
  const int64_t whole_rows = rows - rows % kTransposeTile, whole_cols = cols - cols % kTransposeTile;
  for (int64_t i = 0; i < whole_rows; i += kTransposeTile)
    for (int64_t j = 0; j < whole_cols; j += kTransposeTile)
      transpose_tile(src + i * src_row + j, src_row, dst + j * dst_row + i, dst_row);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j) dst[j * dst_row + i] = src[i * src_row + j];
}

// Bf16::put of elements.h, in a form that compilers vectorise.
void to_bf16(const float* __restrict src, uint16_t* __restrict dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, src + i, 4);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    dst[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000u ? nan : rounded);
  }
}

}  // namespace

const ConvKernels FASTVQ_TABLE(conv_kernels) = {kLanes, kMaxVectors, product, gate, gate_backward, transpose, to_bf16};

}  // namespace fastvq
