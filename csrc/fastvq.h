// Types shared by every kernel of fastvq. Kernels take raw pointers, sizes and a thread count:
// no torch header appears anywhere in csrc, so one build serves every torch.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace fastvq {

// Numbers are part of the binding: fastvq/_native.py holds the same table.
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };
enum class Metric : int { euclidean = 0, cosine = 1, dot = 2 };
enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

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
// Instruction sets that were compiled in and that this processor and operating system run, weakest first.
std::vector<Isa> available_isas();
std::string compiler();

// Counts and sums per code (statistics.cpp). sums [H, K, D] is float, double where x is f64; counts [H, K].
// Returns -1, or the first h*N + r whose index is neither -1 nor a code; sums and counts then hold nothing of use.
int64_t code_statistics(const Rows& x, const int64_t* indices, int64_t n_codes, void* sums, int64_t* counts, Isa isa,
                        int n_threads);

}  // namespace fastvq
