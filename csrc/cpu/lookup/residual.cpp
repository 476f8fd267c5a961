// Residual quantization: some blocks of rows stay in cache while every level quantizes the residual of the levels before.
//
//   r = x;  for each level:  i = nearest(r, codes);  quantized += c_i;  r -= c_i      (r, quantized: float, or double)
//
// Statistics of the residuals take a second pass, over columns: a column of every residual follows from that column
// of x and the codes. Each task adds its columns of every level, rows in order, for any number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../common/elements.h"
#include "../statistics/saturate.h"
#include "driver.h"

namespace fastvq {
namespace {

// Blocks that go through a level together: its codes are read once for all of them from beyond the second-level cache.
constexpr int64_t kBlocks = 4;
constexpr int64_t kRowsBetweenCheckpoints = 4096;
constexpr int64_t kColumns = 16;  // of a row, for one task of the statistics: a cache line of float

Codes level_of(const Codes& levels, int64_t q) {
  Codes one = levels;
  one.data = static_cast<const char*>(levels.data) + q * levels.stride_head * element_size(levels.dtype);
  one.n_heads = 1;
  return one;
}

template <class Real>
constexpr DType dtype_of() {
  return sizeof(Real) == 8 ? DType::f64 : DType::f32;
}
template <class Real>
Rows block_view(const Real* data, int64_t n, int64_t D) {
  return {data, dtype_of<Real>(), 1, 1, n, D, 0, 0, D, 1};
}

template <class Real>
bool is_finite(const Real* row, int64_t D) {
  Real odd = 0;
  for (int64_t d = 0; d < D; ++d) odd += row[d] * 0;  // NaN once an element is not finite
  return odd == 0;
}

// A code of levels that hold Real, as those of the statistics and the backward do.
template <class Real>
const Real* level_code(const Codes& levels, int64_t q, int64_t k) {
  return static_cast<const Real*>(levels.data) + q * levels.stride_head + k * levels.stride_k;
}

// The arrays of kBlocks blocks. total is [n, D] like the residual, chosen that of one block.
template <class Real>
struct ResidualBlock {
  Real *residual, *chosen, *total;
  int64_t* indices;  // of one level and block
  double* doubles;  // [3 D]
  char* search;
};

template <class Real>
size_t block_layout(int64_t D, size_t search_bytes, char* base, ResidualBlock<Real>* out) {
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += padded(bytes);
    return at;
  };
  const int64_t n = block_rows(D), matrix = n * D * static_cast<int64_t>(sizeof(Real));  // of one block
  ResidualBlock<Real> b;
  b.residual = reinterpret_cast<Real*>(take(kBlocks * matrix));
  b.chosen = reinterpret_cast<Real*>(take(matrix));
  b.total = reinterpret_cast<Real*>(take(kBlocks * matrix));
  b.indices = reinterpret_cast<int64_t*>(take(8 * n));
  b.doubles = reinterpret_cast<double*>(take(3 * 8 * D));
  b.search = take(static_cast<int64_t>(search_bytes));
  if (out) *out = b;
  return used;
}

// One level of one block, rows [first, first + n): its indices, total += the codes, residual -= the codes.
// Returns how many of the rows are real; square is the sum of (residual - code)^2 over them.
template <class Real>
int64_t quantize_level(const LookupKernels& kernels, const PackedCodes& packed, const Codes& level,
                       const ResidualOptions& options, int64_t q, int64_t first, int64_t n, Real* residual, Real* total,
                       const ResidualBlock<Real>& b, const ResidualOutputs& out, int64_t Q, double& square) {
  const int64_t D = level.dim;
  const Rows rows = block_view(residual, n, D), chosen = block_view(b.chosen, n, D);
  const LookupCall lookup{&rows,    &level, options.metric, options.fast, options.mask ? options.mask + first : nullptr,
                          b.indices};
  LookupCounts counts;
  kernels.search(lookup, packed, 0, 0, n, b.search, counts);
  int64_t n_real = 0;
  square = kernels.gather(lookup, chosen, 0, 0, n, n_real, b.doubles);
  for (int64_t i = 0; i < n; ++i) {
    out.indices[(first + i) * Q + q] = b.indices[i];
    if (out.finite_levels && is_finite(residual + i * D, D)) out.finite_levels[first + i] = static_cast<int32_t>(q + 1);
  }
  for (int64_t j = 0; j < n * D; ++j) {
    total[j] += b.chosen[j];
    residual[j] -= b.chosen[j];
  }
  return n_real;
}

template <class Real>
void forward(const Rows& x, const Codes& levels, const ResidualOptions& options, const Rows& quantized,
             const ResidualOutputs& out, Isa isa, int n_threads) {
  const LookupKernels& kernels = lookup_kernels(isa, x.dim);
  const int64_t D = x.dim, N = x.n_rows(), Q = levels.n_heads, rows = block_rows(D), n_blocks = (N + rows - 1) / rows;
  const PackedCodebook packed(kernels, levels, options.metric, options.fast, n_threads);
  std::vector<double> squares(static_cast<size_t>(Q * n_blocks));
  std::atomic<int64_t> n_real{0};
  const size_t search_bytes = kernels.search_bytes(D);
  n_threads = useful_threads(filter_work(x, levels) * static_cast<double>(Q), n_threads);
  for_blocks(
      x, n_threads, block_layout<Real>(D, search_bytes, nullptr, nullptr),
      [&](int64_t, int64_t first, int64_t n, int64_t, char* workspace) {
        ResidualBlock<Real> b;
        block_layout<Real>(D, search_bytes, workspace, &b);
        with_element(x.dtype, [&](auto e) {
          using E = decltype(e);
          for (int64_t i = 0; i < n; ++i) {
            const auto* row = row_at<E>(x, 0, first + i);
            for (int64_t d = 0; d < D; ++d) b.residual[i * D + d] = static_cast<Real>(E::get(row[d * x.stride_d]));
          }
        });
        std::fill(b.total, b.total + n * D, Real(0));
        for (int64_t q = 0; q < Q; ++q) {
          int64_t here = 0;
          for (int64_t i = 0; i < n; i += rows) {
            const int64_t in_block = std::min(rows, n - i);
            here += quantize_level<Real>(kernels, packed[q], level_of(levels, q), options, q, first + i, in_block,
                                         b.residual + i * D, b.total + i * D, b, out, Q,
                                         squares[static_cast<size_t>(q * n_blocks + (first + i) / rows)]);
          }
          if (q == 0) n_real += here;
        }
        with_element(quantized.dtype, [&](auto e) {
          using E = decltype(e);
          auto* to = static_cast<typename E::Stored*>(const_cast<void*>(quantized.data));
          for (int64_t i = 0; i < n; ++i) {
            auto* row = to + quantized.offset(0, first + i);
            for (int64_t d = 0; d < D; ++d) row[d * quantized.stride_d] = E::put(b.total[i * D + d]);
          }
        });
      },
      kBlocks * rows);
  const DefaultFloatingPoint environment;
  for (int64_t q = 0; q < Q; ++q) {
    out.squares[q] = 0;
    for (int64_t block = 0; block < n_blocks; ++block)
      out.squares[q] += squares[static_cast<size_t>(q * n_blocks + block)];
  }
  *out.n_rows = n_real;
}

// Columns [d0, d0 + width) of every level's sums.
template <class Real, class EX, class Sum>
void add_columns(const Rows& x, const Codes& levels, const int64_t* indices, const int32_t* finite_levels, Sum* sums,
                 std::vector<double>& table, int64_t d0, int64_t width) {
  const int64_t N = x.n_rows(), Q = levels.n_heads, K = levels.n_codes, D = x.dim;
  table.assign(static_cast<size_t>(Q * K * width), 0.0);
  Real residual[kColumns];
  for (int64_t r = 0; r < N; ++r) {
    if (r % kRowsBetweenCheckpoints == 0) checkpoint();
    const auto* row = row_at<EX>(x, 0, r) + d0 * x.stride_d;
    for (int64_t d = 0; d < width; ++d) residual[d] = static_cast<Real>(EX::get(row[d * x.stride_d]));
    for (int64_t q = 0; q < finite_levels[r]; ++q) {
      const int64_t k = indices[r * Q + q];
      if (k < 0) break;
      double* to = table.data() + (q * K + k) * width;
      const Real* code = level_code<Real>(levels, q, k) + d0 * levels.stride_d;
      for (int64_t d = 0; d < width; ++d) {
        to[d] += residual[d];
        residual[d] -= code[d * levels.stride_d];
      }
    }
  }
  for (int64_t i = 0; i < Q * K; ++i)
    for (int64_t d = 0; d < width; ++d)
      sums[i * D + d0 + d] = saturated<Sum>(table[static_cast<size_t>(i * width + d)]);
}

template <class Real, class Sum>
void statistics(const Rows& x, const Codes& levels, const int64_t* indices, const int32_t* finite_levels, Sum* sums,
                int64_t* counts, int n_threads) {
  const int64_t N = x.n_rows(), Q = levels.n_heads, K = levels.n_codes, D = x.dim;
  std::fill(counts, counts + Q * K, int64_t{0});
  for (int64_t r = 0; r < N; ++r) {
    if (r % kRowsBetweenCheckpoints == 0) checkpoint();
    for (int64_t q = 0; q < finite_levels[r]; ++q)
      if (const int64_t k = indices[r * Q + q]; k >= 0) ++counts[q * K + k];
  }
  // An element of a level takes as long as about 16 multiply-adds of the filter.
  n_threads = useful_threads(16.0 * static_cast<double>(N * Q) * static_cast<double>(D), n_threads);
  std::vector<std::vector<double>> tables(static_cast<size_t>(std::max(1, n_threads)));
  parallel_chunks((D + kColumns - 1) / kColumns, n_threads, [&](int64_t chunk, int thread) {
    const int64_t d0 = chunk * kColumns, width = std::min(kColumns, D - d0);
    with_element(x.dtype, [&](auto ex) {
      add_columns<Real, decltype(ex)>(x, levels, indices, finite_levels, sums, tables[static_cast<size_t>(thread)], d0,
                                      width);
    });
  });
}

// grad_x = g + sum over levels of scale_q (r_q - c_q), and zero where a row has no codes.
template <class Real>
void backward(const Rows& x, const Codes& levels, const int64_t* indices, const Rows* grad_quantized,
              const double* scales, const Rows& grad_x, int n_threads) {
  const int64_t D = x.dim, Q = levels.n_heads;
  n_threads = useful_threads(16.0 * static_cast<double>(x.n_rows() * Q) * static_cast<double>(D), n_threads);
  const size_t row_bytes = padded(D * static_cast<int64_t>(sizeof(Real)));
  for_blocks(x, n_threads, 2 * row_bytes, [&](int64_t, int64_t first, int64_t n, int64_t, char* workspace) {
    Real* residual = reinterpret_cast<Real*>(workspace);
    Real* total = reinterpret_cast<Real*>(workspace + row_bytes);
    with_element(x.dtype, [&](auto ex) {
      using EX = decltype(ex);
      using Stored = typename EX::Stored;
      for (int64_t i = first; i < first + n; ++i) {
        const int64_t* chosen = indices + i * Q;
        Stored* out = static_cast<Stored*>(const_cast<void*>(grad_x.data)) + grad_x.offset(0, i);
        if (chosen[0] < 0) {
          for (int64_t d = 0; d < D; ++d) out[d * grad_x.stride_d] = EX::put(0.0f);
          continue;
        }
        const Stored* row = row_at<EX>(x, 0, i);
        const Stored* g = grad_quantized ? row_at<EX>(*grad_quantized, 0, i) : nullptr;
        for (int64_t d = 0; d < D; ++d) {
          residual[d] = static_cast<Real>(EX::get(row[d * x.stride_d]));
          total[d] = g ? static_cast<Real>(EX::get(g[d * grad_quantized->stride_d])) : Real(0);
        }
        for (int64_t q = 0; q < Q; ++q) {
          const Real* code = level_code<Real>(levels, q, chosen[q]);
          const Real scale = static_cast<Real>(scales[q]);
          if (scale == 0) {  // also where the residual is not finite
            for (int64_t d = 0; d < D; ++d) residual[d] -= code[d * levels.stride_d];
            continue;
          }
          for (int64_t d = 0; d < D; ++d) {
            residual[d] -= code[d * levels.stride_d];
            total[d] += scale * residual[d];
          }
        }
        for (int64_t d = 0; d < D; ++d) out[d * grad_x.stride_d] = EX::put(total[d]);
      }
    });
  });
}

bool uses_double(const Rows& x, const Codes& levels) { return x.dtype == DType::f64 || levels.dtype == DType::f64; }

void check_real(const Rows& x, const Codes& levels) {
  if (levels.dtype != (uses_double(x, levels) ? DType::f64 : DType::f32))
    throw std::invalid_argument("fastvq: residual levels must have the dtype of the residuals");
}

void check_levels(const Rows& x, const Codes& levels) {
  if (x.n_heads != 1 || x.dim < 1 || levels.n_codes < 1 || levels.n_heads < 1 || x.dim != levels.dim)
    throw std::invalid_argument("fastvq: residual levels must be [Q, K, D] with x's D");
}

}  // namespace

void residual_quantize(const Rows& x, const Codes& levels, const ResidualOptions& options, const Rows& quantized,
                       const ResidualOutputs& out, Isa isa, int n_threads) {
  check_levels(x, levels);
  check_output(x, quantized);
  *out.n_rows = 0;
  std::fill(out.squares, out.squares + levels.n_heads, 0.0);
  if (x.n_rows() == 0) return;
  uses_double(x, levels) ? forward<double>(x, levels, options, quantized, out, isa, n_threads)
                         : forward<float>(x, levels, options, quantized, out, isa, n_threads);
}

void residual_statistics(const Rows& x, const Codes& levels, const int64_t* indices, const int32_t* finite_levels,
                         void* sums, bool sums_double, int64_t* counts, int n_threads) {
  check_levels(x, levels);
  check_real(x, levels);
  if (uses_double(x, levels))
    statistics<double>(x, levels, indices, finite_levels, static_cast<double*>(sums), counts, n_threads);
  else if (sums_double)
    statistics<float>(x, levels, indices, finite_levels, static_cast<double*>(sums), counts, n_threads);
  else
    statistics<float>(x, levels, indices, finite_levels, static_cast<float*>(sums), counts, n_threads);
}

void residual_backward(const Rows& x, const Codes& levels, const int64_t* indices, const Rows* grad_quantized,
                       const double* scales, const Rows& grad_x, int n_threads) {
  check_levels(x, levels);
  check_real(x, levels);
  check_output(x, grad_x);
  if (grad_quantized) check_output(x, *grad_quantized);
  uses_double(x, levels) ? backward<double>(x, levels, indices, grad_quantized, scales, grad_x, n_threads)
                         : backward<float>(x, levels, indices, grad_quantized, scales, grad_x, n_threads);
}

}  // namespace fastvq
