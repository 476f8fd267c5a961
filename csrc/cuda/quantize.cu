// Quantization, and the statistics that learn the codebook: the launches of the lookup, whose kernels gather the rows that
// they settle (gather.cuh), then the losses, then the statistics of the keys that were written on the way.
//
//   x [H, N, D], codes [H, K, D] -> quantized [H, N, D], indices [H, N], two losses; sums [H, K, D], counts [H, K]
//   workspace: the packed codes | partial [blocks of the filter + blocks of the scan, 2] double | keys and what adds by them
//
// 1. clear the sums, where atomics add them; 2. pack the codes, filter, scan what is left: nearest.cu; 3. one block adds up
//    the blocks' parts, thread t the parts t, t + 256, ..., and writes both losses; 4. sums by key: statistics.cu.
//
// x is read for the lookup and, while the second-level cache has it, for the gather; only deterministic sums read it again.
#include "../fastvq_cuda.h"
#include "gather.cuh"
#include "lookup.cuh"
#include "statistics.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = 256;

struct Losses {
  void *commitment, *codebook;  // double where x is
  double beta;
};

__global__ void __launch_bounds__(kThreads)
    losses_kernel(const double* partial, int64_t n_blocks, int64_t dim, bool wide, Losses losses) {
  double* workspace = reinterpret_cast<double*>(shared_memory());
  double squares = 0, real = 0;
  for (int64_t i = threadIdx.x; i < n_blocks; i += kThreads) {
    squares += partial[2 * i];
    real += partial[2 * i + 1];
  }
  squares = block_sum<kThreads>(squares, workspace);
  real = block_sum<kThreads>(real, workspace);
  if (threadIdx.x != 0) return;
  const double mean = real > 0 ? squares / (real * static_cast<double>(dim)) : 0;
  if (wide) {
    *static_cast<double*>(losses.commitment) = losses.beta * mean;
    *static_cast<double*>(losses.codebook) = mean;
  } else {
    *static_cast<float*>(losses.commitment) = static_cast<float>(losses.beta * mean);
    *static_cast<float*>(losses.codebook) = static_cast<float>(mean);
  }
}

constexpr size_t round_up(size_t n) { return (n + 255) / 256 * 256; }

// Where things lie in the workspace.
struct Workspace {
  PackedCodebook packed;
  bool filter;
  int64_t n_filter, n_scan;  // blocks
  size_t packed_bytes, partial_bytes;
};
Workspace workspace_of(const Rows& x, const Codes& codes, unsigned char* base) {
  Workspace workspace{};
  workspace.filter = filter_serves(x, codes);
  if (workspace.filter) {
    workspace.packed_bytes = packed_layout(codes, base, &workspace.packed);
    workspace.n_filter = lookup_blocks(x, workspace.packed);
  }
  workspace.n_scan = scan_blocks(x, workspace.filter);
  workspace.partial_bytes = round_up(2 * sizeof(double) * static_cast<size_t>(workspace.n_filter + workspace.n_scan));
  return workspace;
}

}  // namespace

size_t quantize_workspace(const Rows& x, const Codes& codes, bool statistics) {
  const Workspace workspace = workspace_of(x, codes, nullptr);
  const Statistics s = statistics_of(x, codes.n_codes);
  return workspace.packed_bytes + workspace.partial_bytes +
         (statistics && s.n_total > 0 ? keyed_statistics_workspace(s) : 0);
}

int quantize_forward(const Rows& x, const Codes& codes, const QuantizeOptions& o, const QuantizeOutputs& out,
                     void* workspace, void* stream) {
  unsigned char* memory = static_cast<unsigned char*>(workspace);
  const Workspace layout = workspace_of(x, codes, memory);
  Statistics s = statistics_of(x, codes.n_codes);
  s.sums = out.sums;
  s.sums_double = x.dtype == DType::f64;
  s.counts = out.counts;
  double* partial = reinterpret_cast<double*>(memory + layout.packed_bytes);
  unsigned char* keys = memory + layout.packed_bytes + layout.partial_bytes;
  const bool atomics = out.sums && (!o.deterministic || s.n_total == 0);
  Gather gather{out.quantized, partial, nullptr, nullptr, s.sums_double, s.counts};
  if (out.sums && !atomics) gather.keys = reinterpret_cast<uint32_t*>(keys);
  if (atomics) {
    gather.sums = s.sums;
    if (const int error = clear_statistics(s, stream)) return error;
  }
  if (layout.filter) {
    if (const int error = pack_codes(codes, o.metric, o.fast, layout.packed, stream)) return error;
    if (const int error =
            filtered_lookup({x, codes, o.metric, o.fast, o.mask, out.indices, gather}, layout.packed, stream))
      return error;
    gather.partial += 2 * layout.n_filter;
  }
  if (const int error = scan({x, codes, o.metric, o.mask, out.indices, layout.filter, gather}, stream)) return error;
  if (const int error = launch(losses_kernel, 1, kThreads, sizeof(double) * (kThreads / 32), stream,
                               static_cast<const double*>(partial), layout.n_filter + layout.n_scan, x.dim,
                               x.dtype == DType::f64, Losses{out.commitment_loss, out.codebook_loss, o.beta}))
    return error;
  return gather.keys ? add_keyed(s, keys, stream) : 0;
}

}  // namespace fastvq::cuda
