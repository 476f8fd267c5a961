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

// Narrower vectors have so few multiply-adds a score that halving them saves nothing, and they half fill a step of a tile.
constexpr int64_t kLeastRoundedDim = 32;

const LookupKernels& lookup_kernels(Isa isa, int64_t dim) {
#if defined(__x86_64__)
#if defined(FASTVQ_AMX)
  if (isa == Isa::amx && dim >= kLeastRoundedDim) return lookup_kernels_amx;
#endif
#if defined(FASTVQ_EMULATED)
  if (isa == Isa::emulated && dim >= kLeastRoundedDim) return lookup_kernels_emulated;
#endif
#if defined(FASTVQ_VNNI)
  if (isa == Isa::avx512_vnni && dim >= kLeastRoundedDim) return lookup_kernels_avx512_vnni;
#endif
  if (isa >= Isa::avx512) return lookup_kernels_avx512;
  if (isa == Isa::avx2) return lookup_kernels_avx2;
#endif
  (void)isa;
  (void)dim;
  return lookup_kernels_generic;
}

int64_t packed_bytes(const Codes& codes, Isa isa) {
  return PackedCodebook::kept_bytes(lookup_kernels(isa, codes.dim), codes);
}

int64_t recorded_bytes(const void* packed_memory) { return PackedCodebook::recorded_bytes(packed_memory); }

void pack_codebook(const Codes& codes, Metric metric, Isa isa, int n_threads, void* packed_memory) {
  PackedCodebook::keep(lookup_kernels(isa, codes.dim), codes, isa, metric, n_threads, packed_memory);
}

LookupCounts nearest(const Rows& x, const Codes& codes, Metric metric, bool fast, int64_t* indices, Isa isa,
                     int n_threads, void* packed_memory) {
  check(x, codes);
  if (x.n_heads * x.n_rows() == 0) return {};
  const LookupKernels& kernels = lookup_kernels(isa, x.dim);
  const PackedCodebook packed = packed_memory && PackedCodebook::is_for(packed_memory, isa)
                                    ? PackedCodebook(kernels, codes, isa, metric, fast, packed_memory)
                                    : PackedCodebook(kernels, codes, metric, fast, n_threads);
  const LookupCall lookup{&x, &codes, metric, fast, nullptr, indices};
  std::atomic<int64_t> rescored{0}, scanned{0};
  n_threads = useful_threads(filter_work(x, codes), n_threads);
  for_blocks(x, n_threads, kernels.search_bytes(x.dim),
             [&](int64_t h, int64_t first, int64_t n, int64_t, char* workspace) {
               LookupCounts counts;
               kernels.search(lookup, packed[h], h, first, n, workspace, counts);
               rescored += counts.rescored;
               scanned += counts.scanned;
             });
  return {rescored, scanned};
}

QuantizeSums quantize_forward(const Rows& x, const Codes& codes, Metric metric, bool fast, const uint8_t* mask,
                              const Rows& quantized, int64_t* indices, Isa isa, int n_threads, void* packed_memory,
                              const StatisticsOut* statistics) {
  check(x, codes);
  check_output(x, quantized);
  if (x.n_heads * x.n_rows() == 0) {
    if (statistics) code_statistics(x, indices, codes.n_codes, *statistics, isa, 1);
    return {0, 0};
  }
  const LookupKernels& kernels = lookup_kernels(isa, x.dim);
  const PackedCodebook packed = packed_memory && PackedCodebook::is_for(packed_memory, isa)
                                    ? PackedCodebook(kernels, codes, isa, metric, fast, packed_memory)
                                    : PackedCodebook(kernels, codes, metric, fast, n_threads);
  const LookupCall lookup{&x, &codes, metric, fast, mask, indices};
  const int64_t n_blocks = (x.n_rows() + block_rows(x.dim) - 1) / block_rows(x.dim);
  // One sum a block, added in order: the loss does not depend on which thread had which block.
  std::vector<double> sums(static_cast<size_t>(x.n_heads * n_blocks));
  std::atomic<int64_t> n_real{0};
  const size_t search_bytes = padded(static_cast<int64_t>(kernels.search_bytes(x.dim)));
  const int n_lookup = useful_threads(filter_work(x, codes), n_threads);
  // One thread takes the blocks in row order, so it adds each block while the block is in cache. Several threads take them
  // in another order, which would change the sums: they read x again afterwards.
  std::optional<BlockStatistics> in_blocks;
  if (statistics && n_lookup == 1) in_blocks.emplace(x, codes.n_codes, *statistics, isa);
  for_blocks(x, n_lookup, search_bytes + padded(3 * 8 * x.dim),
             [&](int64_t h, int64_t first, int64_t n, int64_t block, char* workspace) {
               LookupCounts counts;
               kernels.search(lookup, packed[h], h, first, n, workspace, counts);
               int64_t here = 0;
               sums[static_cast<size_t>(block)] = kernels.gather(lookup, quantized, h, first, n, here,
                                                                 reinterpret_cast<double*>(workspace + search_bytes));
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
  const LookupKernels& kernels = lookup_kernels(isa, x.dim);
  // Bound by memory: an element takes as long as about 16 multiply-adds.
  n_threads =
      useful_threads(16.0 * static_cast<double>(x.n_heads * x.n_rows()) * static_cast<double>(x.dim), n_threads);
  for_blocks(x, n_threads, padded(4 * 8 * x.dim), [&](int64_t h, int64_t first, int64_t n, int64_t, char* workspace) {
    kernels.backward(x, codes, indices, grad_quantized, scale, rotation, grad_x, h, first, n,
                     reinterpret_cast<double*>(workspace));
  });
}

}  // namespace fastvq
