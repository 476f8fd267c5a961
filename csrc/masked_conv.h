// Masked convolution: what a call holds, and the kernels that each instruction set provides.
//
// A masked convolution is a sum of one matrix product per ACTIVE tap. Everything here works on the list of those
// taps, so masked weights are never read into a result.
#pragma once
#include <cstdint>
#include <vector>

#include "fastvq.h"

namespace fastvq {

// [B, C, H, W] with any strides, counted in elements.
struct Image {
  void* data;
  DType dtype;  // f32 or bf16
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

struct Tap {
  int64_t index;   // place in the kernel, row by row
  int64_t dy, dx;  // which input position it reads, relative to the output position
};

// [C_out, C_in, kh, kw] weights and which of them count.
struct MaskedWeight {
  const void* data;  // contiguous
  DType dtype;       // f32 or bf16
  int64_t c_out, c_in, kernel_size;  // kernel_size = kh * kw
  std::vector<Tap> taps;
  int64_t centre;   // index of the centre tap
  int64_t colours;  // 1, or the number of equal channel groups that are ordered at the centre tap
  bool own_colour;  // whether a group sees itself at the centre tap (mask B)

  bool active(int64_t tap, int64_t out, int64_t in) const {
    if (colours == 1 || tap != centre) return true;
    const int64_t group_out = out * colours / c_out, group_in = in * colours / c_in;
    return own_colour ? group_in <= group_out : group_in < group_out;
  }
};

// What is added to the pre-activations of a gated convolution: [B, 2C, H, W] with any strides (zero for a broadcast).
// out = tanh(a) * sigmoid(b); tanh and sigmoid are kept where `saved` is true, for backward.
struct Gate {
  Image condition;  // data is null when there is none
  Image tanh_a, sigmoid_b;
  bool saved;
};

// Cache lines that will be written when a product is done: fetched while it runs, a few at the start of every segment.
struct Touch {
  const char* base;  // null: none
  int64_t n_outer, stride_outer, n_lines;
};

// One thin matrix product: c[i] = init + sum over segments s and k of a[i*a_row + a_segment[s] + k*a_k] * b[s, k, :],
// for n_rows rows i and n_vectors vectors of columns. Each element is one chain of fused multiply-adds in the order
// of (s, k), whatever tile it lies in.
struct Product {
  const float* a;
  int64_t a_row, a_k;
  const int64_t* a_segment;
  int64_t n_segments, depth;
  const float* b;  // [n_segments, depth, n_vectors * lanes], contiguous
  float* c;
  int64_t c_row;
  const float* init;  // [n_vectors * lanes], or null: go on from what c holds
  int64_t n_rows;
  int n_vectors;
  Touch touch;
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
  void (*narrow)(const float* src, uint16_t* dst, int64_t n);
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
// Null where the instruction set has no tiles.
const TileKernels* tile_kernels(Isa isa);

const ConvKernels& conv_kernels(Isa isa);
const ConvKernels& conv_kernels_generic();
const ConvKernels& conv_kernels_avx2();
const ConvKernels& conv_kernels_avx512();
const TileKernels& conv_tiles_amx();
const TileKernels& conv_tiles_emulated();

// Output channels that one product makes together.
struct Block {
  int64_t first, n_channels;
  int n_vectors;
};
// Threads worth starting: one costs 10 to 30 microseconds, and this much work takes longer.
inline int useful_threads(int n_threads, double multiply_adds) {
  const double worth = multiply_adds / 4e6;
  return worth < 2.0 ? 1 : worth < n_threads ? static_cast<int>(worth) : n_threads;
}

std::vector<Block> split_channels(int64_t n_channels, const ConvKernels& kernels);
// One block of channels [tap][depth][lane]. Forward: lanes are output channels, depth input ones; swapped: the reverse.
void pack_block(const MaskedWeight& w, bool swapped, int64_t first, int64_t n_channels, int64_t lanes, float* dst);

void masked_conv_forward(const Image& x, const MaskedWeight& weight, const float* bias, const Image& out, Isa isa,
                         int n_threads);
void gated_masked_conv_forward(const Image& x, const MaskedWeight& weight, const float* bias, const Gate& gate,
                               const Image& out, Isa isa, int n_threads);
void masked_conv_input_grad(const Image& grad_out, const MaskedWeight& weight, const Image& grad_x, Isa isa,
                            int n_threads);
// grad_weight [C_out, C_in, kh, kw] and grad_bias [C_out] (or null), float32, written in full.
void masked_conv_weight_grad(const Image& x, const Image& grad_out, const MaskedWeight& weight, float* grad_weight,
                             float* grad_bias, Isa isa, int n_threads);
// Gradient of tanh(a) * sigmoid(b) from the saved factors; [n_outer, n_inner] -> [n_outer, 2, n_inner], contiguous.
void gate_backward(const float* grad, const float* tanh_a, const float* sigmoid_b, float* grad_ab, int64_t n_outer,
                   int64_t n_inner, Isa isa, int n_threads);

}  // namespace fastvq
