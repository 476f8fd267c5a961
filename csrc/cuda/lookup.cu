// The filtered lookup: a block of rows against all codes on the tensor cores, near-ties decided in place.
//
//   x [H, N, D], packed codes -> indices [H, N]
//
// 1. the first codes are sent for; 2. rows are placed in shared memory as fp16, one warp a row; 3. the search streams
// the codes past them (search.cuh); 4. rows with several candidates are scored by the definition (choose.cuh);
// 5. indices are written, and the rows gathered where that is asked for. What cannot be resolved here is left to scan.cu.
#include "choose.cuh"
#include "gather.cuh"
#include "lookup.cuh"
#include "shapes.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kGatherRows = 4;  // rows that a lane has under way

template <class S>
__global__ void __launch_bounds__(kSearchThreads, S::kBlocks)
    lookup_kernel(LookupCall a, PackedCodebook p, int64_t n_blocks) {
  const int64_t h = blockIdx.x / n_blocks, first = blockIdx.x % n_blocks * S::kRows, N = a.x.n_outer * a.x.n_inner;
  const int tid = threadIdx.x, width = p.n_steps * 16;
  const SearchMemory<S> m(shared_memory(), width);
  const PackedHead head(p, h);
  Stream<S> stream(head, m.stages);
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) stream.copy_stage();

  const HeadInfo info = p.heads[h];
#pragma unroll 1
  for (int i = tid / 32; i < S::kRows; i += kSearchThreads / 32) {
    const int64_t r = first + i;
    const bool real = r < N, skipped = real && a.mask && !a.mask[h * N + r];
    const int64_t at = row_offset(a.x, h, real ? r : 0);
    const RowStatus state = place_row<S::kPart>(
        [&](int d, float (&v)[4]) { load_four(a.x.data, a.x.dtype, at, a.x.stride_d, d, p.dim, v); }, real && !skipped,
        a.metric, a.fast, info, p.means + h * width, p.dim, width, i % 16, m.operand + i / 16 * p.n_steps * 512,
        m.info[i]);
    if (tid % 32 == 0) m.state[i] = skipped ? masked : state;
  }
  __syncthreads();
  search_codes(head, m, stream, a.fast);
  choose_codes(head, m, a.fast, [&](int i, int64_t k) { return exact_score(a.x, a.codes, a.metric, h, first + i, k); });
  __syncthreads();
  if (tid < S::kRows && first + tid < N) a.indices[h * N + first + tid] = m.chosen[tid];
  if (!a.gather.partial) return;
  const int n = static_cast<int>(N - first < S::kRows ? N - first : S::kRows);
  const double squares = gather_rows<kSearchThreads, kGatherRows, float>(
      a.gather, a.x, a.codes, h, n, m.chosen, [&](int i) { return first + i; },
      [&](int i) { return m.state[i] != -not_finite; });
  // The stages are free: every copy has arrived and been read.
  finish_gather<kSearchThreads>(a.gather, squares, tid < n && m.chosen[tid] != -1, reinterpret_cast<double*>(m.stages));
}

template <class S>
int launch_shape(const LookupCall& a, const PackedCodebook& p, void* stream) {
  const int64_t n_blocks = (a.x.n_rows() + S::kRows - 1) / S::kRows;
  return launch(lookup_kernel<S>, a.x.n_heads * n_blocks, kSearchThreads, SearchMemory<S>::bytes(p.n_steps * 16),
                stream, a, p, n_blocks);
}

template <class F>
auto with_lookup_shape(const PackedCodebook& p, const F& f) {
  return with_shape<Rows16>(p, shared_limit(), 0, f);
}

}  // namespace

int64_t lookup_blocks(const Rows& x, const PackedCodebook& p) {
  const int rows = with_lookup_shape(p, [](auto shape) { return decltype(shape)::kRows; });
  return x.n_heads * ((x.n_rows() + rows - 1) / rows);
}

int filtered_lookup(const LookupCall& a, const PackedCodebook& p, void* stream) {
  return with_lookup_shape(p, [&](auto shape) { return launch_shape<decltype(shape)>(a, p, stream); });
}

}  // namespace fastvq::cuda
