// Lookup and quantization over heads, blocks of rows and threads. The work on one block is lookup/filter.h and
// lookup/quantize_rows.h, compiled per instruction set.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "driver.h"
#include "../statistics/table.h"

namespace fastvq {

// Narrower vectors leave so few multiply-adds a score that halving them saves nothing, and a step of a tile half empty.
constexpr int64_t kLeastRoundedDim = 32;

const NearestKernels& nearest_kernels(Isa isa, int64_t dim) {
#if defined(__x86_64__)
#if defined(FASTVQ_AMX)
  if (isa == Isa::amx && dim >= kLeastRoundedDim) return nearest_amx;
#endif
#if defined(FASTVQ_EMULATED)
  if (isa == Isa::emulated && dim >= kLeastRoundedDim) return nearest_emulated;
#endif
#if defined(FASTVQ_VNNI)
  if (isa == Isa::avx512_vnni && dim >= kLeastRoundedDim) return nearest_avx512_vnni;
#endif
  if (isa >= Isa::avx512) return nearest_avx512;
  if (isa == Isa::avx2) return nearest_avx2;
#endif
  (void)isa;
  (void)dim;
  return nearest_generic;
}

int64_t packed_bytes(const Codes& codes, Isa isa) {
  return PackedHeads::kept_bytes(nearest_kernels(isa, codes.dim), codes);
}

int64_t said_bytes(const void* kept) { return PackedHeads::said_bytes(kept); }

void pack_codebook(const Codes& codes, Metric metric, Isa isa, int n_threads, void* kept) {
  PackedHeads::keep(nearest_kernels(isa, codes.dim), codes, isa, metric, n_threads, kept);
}

LookupCounts nearest(const Rows& x, const Codes& codes, Metric metric, bool fast, int64_t* indices, Isa isa,
                     int n_threads, void* kept) {
  check(x, codes);
  if (x.n_heads * x.n_rows() == 0) return {};
  const NearestKernels& kernels = nearest_kernels(isa, x.dim);
  const PackedHeads packed = kept && PackedHeads::is_for(kept, isa)
                                 ? PackedHeads(kernels, codes, isa, metric, fast, kept)
                                 : PackedHeads(kernels, codes, metric, fast, n_threads);
  const Lookup lookup{&x, &codes, metric, fast, nullptr, indices};
  std::atomic<int64_t> rescored{0}, scanned{0};
  n_threads = useful_threads(filter_work(x, codes), n_threads);
  for_blocks(x, n_threads, kernels.search_bytes(x.dim),
             [&](int64_t h, int64_t first, int64_t n, int64_t, char* scratch) {
               LookupCounts counts;
               kernels.search(lookup, packed[h], h, first, n, scratch, counts);
               rescored += counts.rescored;
               scanned += counts.scanned;
             });
  return {rescored, scanned};
}

QuantizeSums quantize_forward(const Rows& x, const Codes& codes, Metric metric, bool fast, const uint8_t* mask,
                              const Rows& quantized, int64_t* indices, Isa isa, int n_threads, void* kept,
                              const StatisticsOut* statistics) {
  check(x, codes);
  check_output(x, quantized);
  if (x.n_heads * x.n_rows() == 0) {
    if (statistics) code_statistics(x, indices, codes.n_codes, *statistics, isa, 1);
    return {0, 0};
  }
  const NearestKernels& kernels = nearest_kernels(isa, x.dim);
  const PackedHeads packed = kept && PackedHeads::is_for(kept, isa)
                                 ? PackedHeads(kernels, codes, isa, metric, fast, kept)
                                 : PackedHeads(kernels, codes, metric, fast, n_threads);
  const Lookup lookup{&x, &codes, metric, fast, mask, indices};
  const int64_t n_blocks = (x.n_rows() + block_rows(x.dim) - 1) / block_rows(x.dim);
  // One sum a block, added in order: the loss does not depend on which thread had which block.
  std::vector<double> sums(static_cast<size_t>(x.n_heads * n_blocks));
  std::atomic<int64_t> n_real{0};
  const size_t search_bytes = padded(static_cast<int64_t>(kernels.search_bytes(x.dim)));
  const int n_lookup = useful_threads(filter_work(x, codes), n_threads);
  // One thread meets the blocks in row order, so it can add each while it is in cache. Several do not, and sums in
  // another order would be other sums: they read x again, all of them at once.
  std::optional<BlockStatistics> in_blocks;
  if (statistics && n_lookup == 1) in_blocks.emplace(x, codes.n_codes, *statistics, isa);
  for_blocks(x, n_lookup, search_bytes + padded(3 * 8 * x.dim),
             [&](int64_t h, int64_t first, int64_t n, int64_t block, char* scratch) {
               LookupCounts counts;
               kernels.search(lookup, packed[h], h, first, n, scratch, counts);
               int64_t here = 0;
               sums[static_cast<size_t>(block)] = kernels.gather(lookup, quantized, h, first, n, here,
                                                                 reinterpret_cast<double*>(scratch + search_bytes));
               n_real += here;
               if (in_blocks) in_blocks->add(h, first, first + n, indices);
             });
  const DefaultFloatingPoint environment;
  if (statistics && (!in_blocks || !in_blocks->finish()))
    code_statistics(x, indices, codes.n_codes, *statistics, isa, n_threads);
  double total = 0;
  for (double s : sums) total += s;
  return {total, n_real};
}

void quantize_backward(const Rows& x, const Codes& codes, const int64_t* indices, const Rows* grad_quantized,
                       double scale, bool rotation, const Rows& grad_x, Isa isa, int n_threads) {
  check(x, codes);
  check_output(x, grad_x);
  if (grad_quantized) check_output(x, *grad_quantized);
  const NearestKernels& kernels = nearest_kernels(isa, x.dim);
  // Memory sets the pace here: about as long per element as 16 multiply-adds.
  n_threads =
      useful_threads(16.0 * static_cast<double>(x.n_heads * x.n_rows()) * static_cast<double>(x.dim), n_threads);
  for_blocks(x, n_threads, padded(4 * 8 * x.dim), [&](int64_t h, int64_t first, int64_t n, int64_t, char* scratch) {
    kernels.backward(x, codes, indices, grad_quantized, scale, rotation, grad_x, h, first, n,
                     reinterpret_cast<double*>(scratch));
  });
}

}  // namespace fastvq
