// Types shared by every kernel of fastvq. Kernels take raw pointers, sizes and a thread count:
// no torch header appears anywhere in csrc, so one build serves every torch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastvq {

// Numbers are part of the binding: fastvq/backends/views.py and cpu.py hold the same tables.
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };
// Static: of an inline function the linker might keep the copy that was compiled for the widest instruction set.
static inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
enum class Metric : int { euclidean = 0, cosine = 1, dot = 2 };
// avx512_vnni is avx512 with the lookup's filter in 16-bit integers, amx with the lookup on matrix tiles; emulated the
// same with tiles in plain vectors, in test builds alone.
enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2, avx512_vnni = 3, amx = 4, emulated = 5 };

// [H, N, D] vectors, N split in two levels so that a channel-first image [B, D, H', W'] needs no copy:
// row r of head h starts at data + h*stride_head + (r / n_inner)*stride_outer + (r % n_inner)*stride_inner,
// its element d lies stride_d further each. Strides count elements and may be zero.
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

const char* isa_name(Isa isa);
// Instruction sets that were compiled in and that this processor and operating system run, weakest first. Asking for
// amx is asking the operating system for its tiles, once a process.
std::vector<Isa> available_isas();
// Why amx is not among them; empty where it is.
std::string amx_unavailable();
std::string compiler();

// ---- nearest code and quantization (cpu/lookup/driver.cpp) ----

struct LookupCounts {
  int64_t rescored = 0;  // rows whose few survivors of the filter were scored by the definition
  int64_t scanned = 0;   // rows scored against every code by the definition
};
// indices [H, N]: for every row the lexicographic minimum of (d_k, k), d_k in float64 in the order of the definition.
// fast: the winner of the float32 filter instead. x and codes have as many heads (a shared codebook: stride_head 0).
// kept: null, or what pack_codebook wrote for these codes, this metric and instruction set; it is only read.
LookupCounts nearest(const Rows& x, const Codes& codes, Metric metric, bool fast, int64_t* indices, Isa isa,
                     int n_threads, void* kept);

// Packs a codebook into packed_bytes bytes at kept, aligned to 64.
int64_t packed_bytes(const Codes& codes, Isa isa);
// The bytes that memory, at least 64 of it, says it takes; -1 where pack_codebook did not write it.
int64_t said_bytes(const void* kept);
void pack_codebook(const Codes& codes, Metric metric, Isa isa, int n_threads, void* kept);

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
// statistics: null, or where to put what code_statistics gives for x and the indices, bit for bit.
QuantizeSums quantize_forward(const Rows& x, const Codes& codes, Metric metric, bool fast, const uint8_t* mask,
                              const Rows& quantized, int64_t* indices, Isa isa, int n_threads, void* kept,
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
// up in double and in row order. Here and in the backward the levels hold what residuals are kept in.
void residual_statistics(const Rows& x, const Codes& levels, const int64_t* indices, const int32_t* finite_levels,
                         void* sums, bool sums_double, int64_t* counts, int n_threads);
// grad_x = grad_quantized (null: zero) + sum over q of scales[q] (r_q - c_q), zero where masked.
void residual_backward(const Rows& x, const Codes& levels, const int64_t* indices, const Rows* grad_quantized,
                       const double* scales, const Rows& grad_x, int n_threads);

// ---- statistics per code and their moving average (cpu/statistics/statistics.cpp, cpu/statistics/ema.cpp) ----

// Added up in double. Returns -1, or the first h*N + r whose index is neither -1 nor a code; the statistics then hold
// nothing of use.
int64_t code_statistics(const Rows& x, const int64_t* indices, int64_t n_codes, const StatisticsOut& out, Isa isa,
                        int n_threads);

// The vectors that have a code, and the place of the first index that is neither -1 nor a code, or differs from its row's
// first level in being -1; -1 where there is none. indices [n_rows, n_levels].
struct IndexCount {
  int64_t first_bad, n_real;
};
IndexCount count_indices(const int64_t* indices, int64_t n_rows, int64_t n_levels, int64_t n_codes);

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
// sums [H, K, D] (float, or double where sums_double) and counts [H, K] (int64) are contiguous.
void ema_update(const EmaBuffers& buffers, const void* sums, bool sums_double, const int64_t* counts,
                const EmaOptions& options, int n_threads);

}  // namespace fastvq
