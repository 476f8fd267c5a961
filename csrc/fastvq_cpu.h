// The CPU kernels that fastvq._cpu binds. Pointers are to host memory.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "fastvq_types.h"

namespace fastvq {

// The numbers are part of the binding: fastvq/backends/cpu.py holds the same table.
enum class Isa : int {
  generic = 0,
  avx2 = 1,
  avx512 = 2,
  avx512_vnni = 3,  // avx512, with the lookup's filter in 16-bit integers
  amx = 4,          // avx512, with lookups and bfloat16 convolutions on matrix tiles
  emulated = 5,     // as amx, the tiles computed in plain vectors: for tests, in builds that ask for it
};
const char* isa_name(Isa isa);
// Instruction sets that were compiled in and that this processor and operating system run, weakest first. The first call
// of a process asks the operating system for amx's tiles.
std::vector<Isa> available_isas();
// Why available_isas has no amx; empty where it has.
std::string amx_unavailable();
std::string compiler();

// ---- nearest code and quantization (cpu/lookup/driver.cpp) ----

struct LookupCounts {
  int64_t rescored = 0;  // rows with several candidates, which were rescored
  int64_t scanned = 0;   // rows without a list of candidates, which were scored against every code
};
// indices [H, N]: for every row the lexicographic minimum of (d_k, k), d_k in float64 in the order of the definition.
// fast: the winner of the filter instead. x and codes have as many heads (a shared codebook: stride_head 0).
// packed_memory: null, or what pack_codebook wrote for these codes, this metric and instruction set; it is only read.
LookupCounts nearest(const Rows& x, const Codes& codes, Metric metric, bool fast, int64_t* indices, Isa isa,
                     int n_threads, void* packed_memory);

// Packs a codebook into packed_bytes bytes at packed_memory, aligned to 64.
int64_t packed_bytes(const Codes& codes, Isa isa);
// The size that pack_codebook recorded in memory of at least 64 bytes; -1 where pack_codebook did not write it.
int64_t recorded_bytes(const void* packed_memory);
void pack_codebook(const Codes& codes, Metric metric, Isa isa, int n_threads, void* packed_memory);

struct QuantizeSums {
  double squares;  // of (x - c) over real vectors, NaN where one of them is not finite
  int64_t n_rows;  // real vectors
};
// Counts and sums per code. sums [H, K, D] is float, double where sums_double; counts [H, K].
struct StatisticsOut {
  void* sums;
  bool sums_double;
  int64_t* counts;
};
// mask [H, N] or null, zero where there is no vector: index -1 and zeros there. quantized: x's shape and dtype.
// statistics: null, or where to write what code_statistics gives for x and the indices, bit for bit.
QuantizeSums quantize_forward(const Rows& x, const Codes& codes, Metric metric, bool fast, const uint8_t* mask,
                              const Rows& quantized, int64_t* indices, Isa isa, int n_threads, void* packed_memory,
                              const StatisticsOut* statistics);
// grad_x = G + scale (x - c), zero where the index is -1; G is grad_quantized (null: zero), or with rotation
// lambda (g - 2 r (r.g) + 2 x^ (q^.g)), see cpu/lookup/quantize_rows.h.
void quantize_backward(const Rows& x, const Codes& codes, const int64_t* indices, const Rows* grad_quantized,
                       double scale, bool rotation, const Rows& grad_x, Isa isa, int n_threads);

// ---- residual quantization (cpu/lookup/residual.cpp); a level is a head of `levels` [Q, K, D], x has one head ----

struct ResidualOptions {
  Metric metric;
  bool fast;
  const uint8_t* mask;  // [N] or null
};
struct ResidualOutputs {
  int64_t* indices;        // [N, Q], -1 where masked
  double* squares;         // [Q], of (r_q - c_q) over real vectors
  int64_t* n_rows;         // real vectors
  int32_t* finite_levels;  // [N] zeros or null: how many of a row's residuals, from the first, are finite
};
// Residuals are float, or double where x or the codes are.
void residual_quantize(const Rows& x, const Codes& levels, const ResidualOptions& options, const Rows& quantized,
                       const ResidualOutputs& out, Isa isa, int n_threads);
// Sums (float; double where asked, or x or the codes are) and counts of the finite residuals per level and code, added
// in double and in row order. Here and in the backward, levels have the dtype of the residuals.
void residual_statistics(const Rows& x, const Codes& levels, const int64_t* indices, const int32_t* finite_levels,
                         void* sums, bool sums_double, int64_t* counts, int n_threads);
// grad_x = grad_quantized (null: zero) + sum over q of scales[q] (r_q - c_q), zero where masked.
void residual_backward(const Rows& x, const Codes& levels, const int64_t* indices, const Rows* grad_quantized,
                       const double* scales, const Rows& grad_x, int n_threads);

// ---- statistics per code and their moving average (cpu/statistics) ----

// Added in double. Returns -1, or the first h*N + r whose index is neither -1 nor a code; sums and counts are then
// undefined.
int64_t code_statistics(const Rows& x, const int64_t* indices, int64_t n_codes, const StatisticsOut& out, Isa isa,
                        int n_threads);

// indices [n_rows, n_levels]. A row has a code on every level, or -1 on every level.
struct IndexCount {
  int64_t first_bad;  // position of the first index that breaks this; -1: none
  int64_t n_real;     // rows that have codes
};
IndexCount count_indices(const int64_t* indices, int64_t n_rows, int64_t n_levels, int64_t n_codes);

// sums [H, K, D] (float, or double where sums_double) and counts [H, K] (int64) are contiguous.
void ema_update(const EmaBuffers& buffers, const void* sums, bool sums_double, const int64_t* counts,
                const EmaOptions& options, int n_threads);

// ---- masked convolution (cpu/masked_conv); images are float32 or bfloat16 ----
//
// A mask selects taps of the kernel, and at the centre tap it may order channels (channel groups). Kernels get the list of
// those taps, so masked weights are never read into a result.

struct Tap {
  int64_t index;   // position in the kernel, row by row
  int64_t dy, dx;  // input position that the tap reads, relative to the output position
};

// [C_out, C_in, kh, kw] weights and which of them count.
struct MaskedWeight {
  const void* data;  // contiguous
  DType dtype;       // f32 or bf16
  int64_t c_out, c_in, kernel_size;  // kernel_size = kh * kw
  std::vector<Tap> taps;
  int64_t centre;          // index of the centre tap
  int64_t channel_groups;  // 1, or the number of equal groups of channels that are ordered at the centre tap
  bool sees_own_group;     // whether a group sees itself at the centre tap (mask B)

  bool active(int64_t tap, int64_t out, int64_t in) const {
    if (channel_groups == 1 || tap != centre) return true;
    const int64_t group_out = out * channel_groups / c_out, group_in = in * channel_groups / c_in;
    return sees_own_group ? group_in <= group_out : group_in < group_out;
  }
};

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

// ---- one position of a gated PixelCNN (cpu/masked_conv/pixelcnn.cpp, where cache and weights are described) ----

struct PixelCNNShape {
  int64_t batch, height, width, channels, n_codes;
  std::vector<int64_t> kernel_sizes;  // one a layer
};

struct PixelCNNSizes {
  int64_t weights, cache;  // floats
};

struct PixelCNNCall {
  const int64_t* ids;      // [B, H, W]; the call reads those before (row, column)
  const float* weights;    // packed
  const float* embedding;  // [K, C]
  float* cache;
  const float* condition;  // [layers, B, h, w, (vertical a, vertical b, horizontal a, horizontal b), C], or null
  int64_t condition_height, condition_width;
  float* logits;  // [B, K], or null where they are not wanted
  int64_t row, column;
};

PixelCNNSizes pixelcnn_sizes(const PixelCNNShape& shape, Isa isa);
// weights: a layer, weight and bias of vertical [2C, C, k, k], link [2C, C] (its bias with the horizontal's added),
// horizontal [2C, C, k], out [residual C, skip C; C] (the last layer: skip alone; all skip biases in the first);
// then of the two layers of the head, [C, C] and [K, C].
void pixelcnn_pack(const PixelCNNShape& shape, const std::vector<const float*>& weights, float* packed, Isa isa);
// Positions come in raster order, from (0, 0). The call at column 0 also computes the row's vertical stack.
void pixelcnn_step(const PixelCNNShape& shape, const PixelCNNCall& call, Isa isa, int n_threads);

}  // namespace fastvq
