// Types shared by the CPU and the CUDA kernels. Kernels take raw pointers, sizes and a thread count or a stream: no torch
// header appears anywhere in csrc, so one build serves every torch.
#pragma once
#include <cstdint>

namespace fastvq {

// The numbers are part of the binding: fastvq/backends/views.py holds the same tables.
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };
// Static: of an inline function the linker might keep the copy that was compiled for the widest instruction set.
static inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
enum class Metric : int { euclidean = 0, cosine = 1, dot = 2 };

// [H, N, D] vectors. N is split in two levels, so that a channel-first image [B, D, H', W'] needs no copy:
// row r of head h starts at data + h*stride_head + (r / n_inner)*stride_outer + (r % n_inner)*stride_inner,
// and its elements are stride_d apart. Strides count elements and may be zero.
struct Rows {
  const void* data;
  DType dtype;
  int64_t n_heads, n_outer, n_inner, dim;
  int64_t stride_head, stride_outer, stride_inner, stride_d;

  int64_t n_rows() const { return n_outer * n_inner; }
  int64_t offset(int64_t h, int64_t r) const {
    return h * stride_head + (r / n_inner) * stride_outer + (r % n_inner) * stride_inner;
  }
};

// [H, K, D] codes.
struct Codes {
  const void* data;
  DType dtype;
  int64_t n_heads, n_codes, dim;
  int64_t stride_head, stride_k, stride_d;
};

// What ema_update_ writes: [H, K, D] and [H, K], float or double (all three the same), strides in elements.
struct EmaBuffers {
  DType dtype;
  int64_t n_heads, n_codes, dim;
  void *codebook, *embed_sum, *cluster_size;
  int64_t codebook_head, codebook_k, codebook_d;
  int64_t embed_sum_head, embed_sum_k, embed_sum_d;
  int64_t cluster_size_head, cluster_size_k;
};
struct EmaOptions {
  double decay, eps;
  bool laplace, debias;
};

// [B, C, H, W] with any strides, counted in elements.
struct Image {
  void* data;
  DType dtype;
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

// Operands of a gated convolution, which gives tanh(a) * sigmoid(b) of its pre-activations (a, b).
struct Gate {
  Image condition;  // [B, 2C, H, W], added to (a, b); a stride is zero where it is broadcast; data null: none
  Image tanh_a, sigmoid_b;  // written where `saved` is true, for the backward
  bool saved;
};

}  // namespace fastvq
