// What an instruction set provides for the masked convolution, and how channels are cut into blocks.
#pragma once
#include <cstdint>
#include <vector>

#include "../../fastvq_cpu.h"

namespace fastvq {

// Cache lines that will be written after a product: fetched while it runs, a few at the start of every segment.
struct PrefetchLines {
  const char* base;  // null: none
  int64_t n_outer, stride_outer, n_lines;
};

// One thin matrix product: c[i] = init + sum over segments s and k of a[i*a_row + a_segment[s] + k*a_k] * b[s, k, :],
// for n_rows rows i and n_vectors vectors of columns. Each element is one chain of fused multiply-adds in the order
// of (s, k), the same in every tile.
struct Product {
  const float* a;
  int64_t a_row, a_k;
  const int64_t* a_segment;
  int64_t n_segments, depth;
  const float* b;  // [n_segments, depth, n_vectors * lanes], contiguous
  float* c;
  int64_t c_row;
  const float* init;  // [n_vectors * lanes], or null: start from c
  int64_t n_rows;
  int n_vectors;
  PrefetchLines prefetch;
};

struct ConvKernels {
  int lanes;        // floats in a vector
  int max_vectors;  // widest block of columns a product takes
  void (*product)(const Product&);
  // out = tanh(a) * sigmoid(b) over n floats, n a multiple of lanes; on return a holds the tanh and b the sigmoid.
  void (*gate)(float* a, float* b, float* out, int64_t n);
  void (*gate_backward)(const float* grad, const float* tanh_a, const float* sigmoid_b, float* grad_a, float* grad_b,
                        int64_t n);
  // dst[j * dst_row + i] = src[i * src_row + j]
  void (*transpose)(const float* src, int64_t src_row, float* dst, int64_t dst_row, int64_t rows, int64_t cols);
  // To the nearest bfloat16, ties to even.
  void (*to_bf16)(const float* src, uint16_t* dst, int64_t n);
};

// The same product of bfloat16 on matrix tiles, 16 pixels by 16 channels each: products exact, sums float32, in the order
// of (segment, step of 32 channels) and within a step in the instruction's own. Numbers below 2^-126 count as zero.
struct TileProduct {
  const uint16_t* a;  // pixels a_row apart, a multiple of 32 channels each; registers of 16 pixels are read whole
  int64_t a_row;
  const int64_t* a_segment;
  int64_t n_segments, n_steps;
  const uint16_t* b;  // [n_segments][n_steps][n_vectors][16 pairs of channels][16][2]
  float* c;           // written for n_rows rounded up to 16
  int64_t c_row;
  const float* init;  // [n_vectors * 16]
  int64_t n_rows;
  int n_vectors;
};

// c[i, j] += sum over lines and pixels p of x[i * x_channel + line * x_line + p] * grad[line, p, j], i = 0 ... 31.
struct TileGradient {
  const uint16_t* x;
  int64_t x_channel, x_line;
  const uint16_t* grad;  // [n_lines][n_steps of 32 pixels][n_vectors][16 pairs of pixels][16][2]
  int64_t n_lines, n_steps;
  float* c;  // [32][n_vectors * 16]
  int n_vectors;
};

struct TileKernels {
  void (*product)(const TileProduct&);
  void (*gradient)(const TileGradient&);
  // dst[j * dst_row + i] = src[i * src_row + j]
  void (*transpose)(const uint16_t* src, int64_t src_row, uint16_t* dst, int64_t dst_row, int64_t rows, int64_t cols);
  // Pixels [n][16] as pairs [n_pairs][16][2], zeros from pixel n on.
  void (*pair)(const uint16_t* pixels, int64_t pixel, int64_t n, int64_t n_pairs, uint16_t* to);
  // sum[j] += over pairs [n_pairs][16][2]
  void (*add_pairs)(const uint16_t* pairs, int64_t n_pairs, float* sum);
};

extern const ConvKernels conv_kernels_generic;
#if defined(__x86_64__)
extern const ConvKernels conv_kernels_avx2, conv_kernels_avx512;
#if defined(FASTVQ_AMX)
extern const TileKernels tile_kernels_amx;
#endif
#if defined(FASTVQ_EMULATED)
extern const TileKernels tile_kernels_emulated;
#endif
#endif
const ConvKernels& conv_kernels(Isa isa);
// Null where the instruction set has no tiles.
const TileKernels* tile_kernels(Isa isa);

// Output channels that one product computes together.
struct ChannelBlock {
  int64_t first, n_channels;
  int n_vectors;
};
std::vector<ChannelBlock> split_channels(int64_t n_channels, const ConvKernels& kernels);
// One block of channels [tap][depth][lane]. Forward: lanes are output channels, depth input ones; swapped: the reverse.
void pack_block(const MaskedWeight& w, bool swapped, int64_t first, int64_t n_channels, int64_t lanes, float* dst);

}  // namespace fastvq
