// Kernels of the masked convolution on matrix tiles, compiled for the processor's tiles and for emulated ones.
//
//               16 channels out   16 more            product:  a row of pixels times the weights of a block of channels
//   16 pixels   | sum 0         | sum 1 |            gradient: channels in (lines of pixels) times channels out
//   16 more     | sum 2         | sum 3 |            both: a step is one instruction, 32 channels or 32 pixels deep
#pragma once
#include <cstdint>

#include "conv_kernels.h"

namespace fastvq {
namespace {

constexpr int kTile = 16 * 32;  // bfloat16 elements of a register

// Accumulators [16 * Halves][16 * Vectors] at c.
template <int Halves, int Vectors>
inline void load_sums(const float* c, int64_t row) {
  tile::load<0>(c, 4 * row);
  if constexpr (Vectors == 2) tile::load<1>(c + 16, 4 * row);
  if constexpr (Halves == 2) {
    tile::load<2>(c + 16 * row, 4 * row);
    if constexpr (Vectors == 2) tile::load<3>(c + 16 * row + 16, 4 * row);
  }
}
template <int Halves, int Vectors>
inline void store_sums(float* c, int64_t row) {
  tile::store<0>(c, 4 * row);
  if constexpr (Vectors == 2) tile::store<1>(c + 16, 4 * row);
  if constexpr (Halves == 2) {
    tile::store<2>(c + 16 * row, 4 * row);
    if constexpr (Vectors == 2) tile::store<3>(c + 16 * row + 16, 4 * row);
  }
}

// One step: rows of 64 bytes, `stride` elements apart, times Vectors registers of pairs.
template <int Halves, int Vectors>
inline void step(const uint16_t* rows, int64_t stride, const uint16_t* pairs) {
  tile::load<4>(rows, 2 * stride);
  tile::load<6>(pairs, 64);
  tile::multiply<0, 0>();
  if constexpr (Vectors == 2) {
    tile::load<7>(pairs + kTile, 64);
    tile::multiply<0, 1>();
  }
  if constexpr (Halves == 2) {
    tile::load<5>(rows + 16 * stride, 2 * stride);
    tile::multiply<1, 0>();
    if constexpr (Vectors == 2) tile::multiply<1, 1>();
  }
}

template <int Halves, int Vectors>
void pixels_product(const TileProduct& p, int64_t first) {
  // A stride of zero gives every pixel the start values of its channels.
  tile::load<0>(p.init, 0);
  if constexpr (Vectors == 2) tile::load<1>(p.init + 16, 0);
  if constexpr (Halves == 2) {
    tile::load<2>(p.init, 0);
    if constexpr (Vectors == 2) tile::load<3>(p.init + 16, 0);
  }
  const uint16_t* b = p.b;
  for (int64_t s = 0; s < p.n_segments; ++s) {
    const uint16_t* a = p.a + first * p.a_row + p.a_segment[s];
    for (int64_t i = 0; i < p.n_steps; ++i, a += 32, b += Vectors * kTile) step<Halves, Vectors>(a, p.a_row, b);
  }
  store_sums<Halves, Vectors>(p.c + first * p.c_row, p.c_row);
}

template <int Vectors>
void row_product(const TileProduct& p) {
  const tile::Scope tiles;
  int64_t first = 0;
  for (; first + 16 < p.n_rows; first += 32) pixels_product<2, Vectors>(p, first);
  if (first < p.n_rows) pixels_product<1, Vectors>(p, first);
}

void product(const TileProduct& p) { p.n_vectors == 1 ? row_product<1>(p) : row_product<2>(p); }

template <int Vectors>
void lines_gradient(const TileGradient& g) {
  const tile::Scope tiles;
  load_sums<2, Vectors>(g.c, 16 * Vectors);
  const uint16_t* grad = g.grad;
  for (int64_t line = 0; line < g.n_lines; ++line) {
    const uint16_t* x = g.x + line * g.x_line;
    for (int64_t i = 0; i < g.n_steps; ++i, x += 32, grad += Vectors * kTile) step<2, Vectors>(x, g.x_channel, grad);
  }
  store_sums<2, Vectors>(g.c, 16 * Vectors);
}

void gradient(const TileGradient& g) { g.n_vectors == 1 ? lines_gradient<1>(g) : lines_gradient<2>(g); }

inline __m128i load8(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store8(uint16_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }

void transpose_8x8(const uint16_t* src, int64_t src_row, uint16_t* dst, int64_t dst_row) {
  __m128i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = load8(src + i * src_row);
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
    a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    store8(dst + 2 * i * dst_row, _mm_unpacklo_epi16(a[i], a[i + 4]));
    store8(dst + (2 * i + 1) * dst_row, _mm_unpackhi_epi16(a[i], a[i + 4]));
  }
}

void transpose(const uint16_t* src, int64_t src_row, uint16_t* dst, int64_t dst_row, int64_t rows, int64_t cols) {
  const int64_t whole_rows = rows - rows % 8, whole_cols = cols - cols % 8;
  for (int64_t i = 0; i < whole_rows; i += 8)
    for (int64_t j = 0; j < whole_cols; j += 8)
      transpose_8x8(src + i * src_row + j, src_row, dst + j * dst_row + i, dst_row);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j) dst[j * dst_row + i] = src[i * src_row + j];
}

void pair(const uint16_t* pixels, int64_t pixel, int64_t n, int64_t n_pairs, uint16_t* to) {
  const __m256i none = _mm256_setzero_si256();
  for (int64_t i = 0; i < n_pairs; ++i, to += 32) {
    const auto at = [&](int64_t p) {
      return p < n ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels + p * pixel)) : none;
    };
    const __m512i even = _mm512_cvtepu16_epi32(at(2 * i)), odd = _mm512_cvtepu16_epi32(at(2 * i + 1));
    _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}

void add_pairs(const uint16_t* pairs, int64_t n_pairs, float* sum) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  __m512 total = _mm512_loadu_ps(sum);
  for (int64_t i = 0; i < n_pairs; ++i) {
    const __m512i v = _mm512_loadu_si512(pairs + 32 * i);
    total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)));
    total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_and_si512(v, high)));
  }
  _mm512_storeu_ps(sum, total);
}

}  // namespace

const TileKernels FASTVQ_TABLE(tile_kernels) = {product, gradient, transpose, pair, add_pairs};

}  // namespace fastvq
