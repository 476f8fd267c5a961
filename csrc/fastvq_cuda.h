// The launchers of the CUDA kernels. They take device pointers, sizes, workspace and a stream; they allocate nothing and
// wait for nothing. Each returns the CUDA runtime's error number, 0 where the launch went well.
// No header of CUDA is needed to call them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "fastvq_types.h"

namespace fastvq::cuda {

// 0, or why no kernel can run on this machine: the runtime's error number (35: no driver, or one that is too old).
int device_error();
std::string error_text(int error);
std::string compiler();
std::string architectures();

// ---- nearest code (cuda/nearest*.cu) ----

// Bytes of workspace that nearest takes, for its packed codebook: they depend on the codes, not on the rows.
size_t nearest_workspace(const Rows& x, const Codes& codes);
// indices [H, N]: as fastvq::nearest. mask [H, N] or null, zero where there is no vector: index -1 there.
int nearest(const Rows& x, const Codes& codes, Metric metric, bool fast, const uint8_t* mask, int64_t* indices,
            void* workspace, void* stream);

// ---- quantization (cuda/quantize*.cu) ----

struct QuantizeOptions {
  Metric metric;
  bool fast;
  const uint8_t* mask;  // [H, N] or null
  double beta;
  bool deterministic;  // of the sums
};
// Losses and sums are double where x is, else float.
struct QuantizeOutputs {
  Rows quantized;  // x's shape and dtype
  int64_t* indices;
  void *commitment_loss, *codebook_loss;
  void* sums;  // [H, K, D] or null: no statistics
  int64_t* counts;  // [H, K]
};
// statistics: whether deterministic ones are wanted, of at most kMostStatisticsRows rows and codes.
size_t quantize_workspace(const Rows& x, const Codes& codes, bool statistics);
int quantize_forward(const Rows& x, const Codes& codes, const QuantizeOptions& options, const QuantizeOutputs& out,
                     void* workspace, void* stream);

// A loss that is a mean over n_real rows, on the device: the gradient that comes in at it, times `factor`.
struct LossWeight {
  const void* weight;  // a scalar, or null: none
  DType dtype;
  const int64_t* n_real;
  double factor;
};
struct RowsGradient {
  Rows x, g, grad_x;  // g.data null: none comes in
  Codes codes;
  const int64_t* indices;  // [H, N]
  bool rotation;
  LossWeight loss;
};
struct CodesGradient {
  Codes codes, grad_codes;
  const double* sums;  // [H, K, D]
  const int64_t* counts;  // [H, K]
  LossWeight loss;
};
int quantize_rows_gradient(const RowsGradient& gradient, void* stream);
int quantize_codes_gradient(const CodesGradient& gradient, void* stream);

// ---- residual quantization (cuda/residual*.cu); levels [Q, K, D] are a codebook's heads ----

// Whether one launch takes all levels: float levels, an x that is float or narrower, and a block of 32 residuals that
// fits into shared memory beside its search (D to 768 on a card of 227 KiB a block, to 384 on one of 163).
bool residual_fits(const Rows& x, const Codes& levels);
size_t residual_workspace(const Codes& levels);
// In how many parts the squares of a level come.
int64_t residual_parts(const Rows& x, const Codes& levels);
// r = x; for each level the index of nearest for r, then r -= its code. Residuals, and the sum of the codes until it is
// written to quantized (of any type but double), are float. mask [N] or null: where it is zero, index -1 and a sum of
// zero. indices [N, Q]; squares [Q, parts]: of r - c, added in double, in an order that depends on N alone.
int residual_quantize(const Rows& x, const Codes& levels, Metric metric, bool fast, const uint8_t* mask,
                      const Rows& quantized, int64_t* indices, double* squares, void* workspace, void* stream);
// grad_x = g + sum of weights[q] r_{q+1}; g, weights [Q] and total [N, D], which receives the sum of the codes, may each
// be null. weights, total and every sum are of the type of levels, float or double. Zero where masked.
int residual_backward(const Rows& x, const Codes& levels, const int64_t* indices, const void* weights, const Rows* g,
                      const Rows& grad_x, void* total, void* stream);

// ---- statistics per code and their moving average (cuda/statistics*.cu, cuda/ema.cu) ----

// Rows and codes of all heads together that the sorted statistics can number.
constexpr int64_t kMostStatisticsRows = 0xfffffffe;
size_t code_statistics_workspace(const Rows& x, int64_t n_codes, bool deterministic);
// As fastvq::code_statistics, but that an index out of range counts as -1, and that rows are added in another, fixed
// order; with atomics, in any order and in the type of sums. sums [H, K, D] and counts [H, K] are written in full.
int code_statistics(const Rows& x, const int64_t* indices, int64_t n_codes, bool deterministic, void* sums,
                    bool sums_double, int64_t* counts, void* workspace, void* stream);

size_t ema_update_workspace(const EmaBuffers& buffers);
// As fastvq::ema_update, but that the sizes of a head are added up in another, fixed order.
int ema_update(const EmaBuffers& buffers, const void* sums, bool sums_double, const int64_t* counts,
               const EmaOptions& options, void* workspace, void* stream);

// Dead codes and what they draw from (cuda/replace.cu). All are contiguous: rows up to each row that are usable, dead codes
// up to each code, both counting it.
struct Replacement {
  const int64_t* rank;  // [H, N]
  const uint8_t* dead;  // [H, K]
  const int64_t* slots;  // [H, K]
  const double* uniforms;  // [H, K]
  double threshold;
};
// usable [H, N]: 1 where a row holds neither NaN nor infinity.
int usable_rows(const Rows& x, uint8_t* usable, void* stream);
// x has rows.
int replace_dead_codes(const EmaBuffers& buffers, const Rows& x, const Replacement& replacement, void* stream);

// ---- masked convolution (cuda/masked_conv*.cu); tensors are float32, or all float16, or all bfloat16 ----

// [C_out, C_in, kh, kw] weights, contiguous. Only a range of places of the kernel is walked; within it one counts where
// `used` (or null: all) says so, and where the order of channel groups at the centre tap lets it.
struct ConvWeight {
  const void* data;
  DType dtype;
  int64_t c_out, c_in, kh, kw, first_tap, n_taps;
  const uint8_t* used;  // [kh, kw]
  int64_t channel_groups;
  bool sees_own_group;
};

// Bytes of workspace for the packed weights; swapped: of the input gradient, whose channels change places.
size_t masked_conv_workspace(const ConvWeight& weight, bool gated, bool swapped);
// bias [C_out], of x's type, or null. Sums are float.
int masked_conv_forward(const Image& x, const ConvWeight& weight, const void* bias, const Image& out, void* workspace,
                        void* stream);
int gated_masked_conv_forward(const Image& x, const ConvWeight& weight, const void* bias, const Gate& gate,
                              const Image& out, void* workspace, void* stream);
int masked_conv_input_grad(const Image& grad_out, const ConvWeight& weight, const Image& grad_x, void* workspace,
                           void* stream);
size_t masked_conv_weight_grad_workspace(const Image& x, const ConvWeight& weight);
// grad_weight, as weight, and grad_bias [C_out] of its type, each may be null: written in full.
int masked_conv_weight_grad(const Image& x, const Image& grad_out, const ConvWeight& weight, void* grad_weight,
                            void* grad_bias, void* workspace, void* stream);
// The gradient at the pre-activations, grad_ab [B, 2C, H, W], from the saved factors.
int gate_backward(const Image& grad, const Image& tanh_a, const Image& sigmoid_b, const Image& grad_ab, void* stream);

// ---- positions of a gated PixelCNN (cuda/pixelcnn.cu, where weights, cache and table are described), float32 ----

// How an id is drawn (cuda/sample_ids.cuh). temperature 0: the likeliest; top_k 0 and top_p 0: all ids.
struct SamplerChoice {
  double temperature;
  int64_t top_k;
  double top_p;
};
struct SamplerCall {
  int64_t* ids;  // [B, H, W]; those before a position are read, at it written where it is wanted
  int64_t batch, height, width;
  const float* embedding;  // [K, C]
  int64_t n_codes, channels;
  const float* weights;  // packed
  const int64_t* table;  // on the device, as weights and all else
  int64_t n_layers;
  float* cache;  // aligned to 8 bytes
  int64_t cache_per_image;  // floats, an even number
  const float* condition;  // [n_layers, B, h, w, 4C] or null
  int64_t condition_height, condition_width;
  int64_t first, n_positions;  // row * W + column
  unsigned* arrived;  // [B], zero
  float* logits;  // [B, K], for one position, and no id is drawn; or null, and then:
  const double* uniforms;  // [B, H, W]
  const uint8_t* wanted;  // [B, H, W]: where an id is drawn
  SamplerChoice choice;
  unsigned team_size;  // set by the launcher
};
// Positions come in raster order, from 0; the one that begins a row also does the row's vertical stack.
int pixelcnn_positions(const SamplerCall& call, void* stream);

}  // namespace fastvq::cuda
