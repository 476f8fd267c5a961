// The moving average of the statistics per code, and the codebook it gives.
//
//   codebook, embed_sum  [H, K, D]    cluster_size  [H, K]     float or double, any strides, in place
//   sums  [H, K, D] float or double   counts  [H, K] int64     contiguous
//
//   1. per head: cluster_size, and the sum of all sizes over k in order; a head without counted rows does not change
//   2. per code, in parallel: embed_sum and codebook, each element read once and written once
//
// Arithmetic is float64 and each stored value is rounded once, so neither threads nor compilers change a bit.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../../fastvq_cpu.h"
#include "../common/fp_environment.h"
#include "../common/parallel.h"
#include "saturate.h"

namespace fastvq {
namespace {

constexpr int64_t kElementsPerChunk = 1 << 15;

template <class Real, class Sum>
void update(const EmaBuffers& b, const Sum* sums, const int64_t* counts, const EmaOptions& o, int n_threads) {
  Real* const codebook = static_cast<Real*>(b.codebook);
  Real* const embed_sum = static_cast<Real*>(b.embed_sum);
  Real* const cluster_size = static_cast<Real*>(b.cluster_size);
  std::vector<double> divisors(b.n_codes);
  std::vector<double> kept(b.n_codes);  // share of the old embed_sum that stays
  const int64_t codes_per_chunk = std::max<int64_t>(1, kElementsPerChunk / b.dim);
  const int64_t n_chunks = (b.n_codes + codes_per_chunk - 1) / codes_per_chunk;
  for (int64_t h = 0; h < b.n_heads; ++h) {
    {
      const int64_t* count = counts + h * b.n_codes;
      if (std::all_of(count, count + b.n_codes, [](int64_t n) { return n == 0; })) continue;
      double total = 0;
      for (int64_t k = 0; k < b.n_codes; ++k) {
        Real& size = cluster_size[h * b.cluster_size_head + k * b.cluster_size_k];
        kept[k] = o.debias && size == 0 ? 0.0 : o.decay;
        size = static_cast<Real>(o.decay * size + (1 - o.decay) * static_cast<double>(count[k]));
        divisors[k] = size;
        total += size;
      }
      for (int64_t k = 0; k < b.n_codes; ++k) {
        const double size = divisors[k];
        // A divisor of -1: the code does not change.
        if ((o.debias && size == 0) || total == 0)
          divisors[k] = -1;
        else if (o.laplace)
          divisors[k] = (size + o.eps) / (total + static_cast<double>(b.n_codes) * o.eps) * total;
        else
          divisors[k] = std::max(size, o.eps);
      }
    }
    parallel_chunks(n_chunks, n_threads, [&](int64_t chunk, int) {
      const int64_t end = std::min((chunk + 1) * codes_per_chunk, b.n_codes);
      for (int64_t k = chunk * codes_per_chunk; k < end; ++k) {
        const Sum* sum = sums + (h * b.n_codes + k) * b.dim;
        Real* average = embed_sum + h * b.embed_sum_head + k * b.embed_sum_k;
        Real* code = codebook + h * b.codebook_head + k * b.codebook_k;
        const double divisor = divisors[k], keep = kept[k], take = 1 - o.decay;
        for (int64_t d = 0; d < b.dim; ++d) {
          // The product with 0 would keep a NaN.
          const double old = keep == 0 ? 0.0 : keep * average[d * b.embed_sum_d];
          const Real now =
              saturated<Real>(old + take * static_cast<double>(saturated<Sum>(static_cast<double>(sum[d]))));
          average[d * b.embed_sum_d] = now;
          if (divisor >= 0) code[d * b.codebook_d] = saturated<Real>(static_cast<double>(now) / divisor);
        }
      }
    });
  }
}

}  // namespace

void ema_update(const EmaBuffers& b, const void* sums, bool sums_double, const int64_t* counts, const EmaOptions& o,
                int n_threads) {
  const DefaultFloatingPoint environment;
  const Uninterrupted whole;  // an interrupted update would leave buffers that do not agree
  if (b.dtype == DType::f64 && sums_double)
    update<double>(b, static_cast<const double*>(sums), counts, o, n_threads);
  else if (b.dtype == DType::f64)
    update<double>(b, static_cast<const float*>(sums), counts, o, n_threads);
  else if (sums_double)
    update<float>(b, static_cast<const double*>(sums), counts, o, n_threads);
  else
    update<float>(b, static_cast<const float*>(sums), counts, o, n_threads);
}

}  // namespace fastvq
