// The filter's scores and the bounds on their errors, row by row and code by code: what no launcher gives out.
#pragma once
#include "../../csrc/cuda/shapes.cuh"

namespace fastvq::cuda {

struct Scores {
  Rows x;
  Metric metric;
  float *scores, *bounds;  // [N, K]; NaN for a row that is not searched and a code that cannot win
  int* lift;               // [1], of the codes
  float* mean;             // [D], of the codes
};

// One block of rows, one head, a shape whose warps see all codes.
template <class S>
__global__ void scores_kernel(Scores a, PackedCodebook p) {
  static_assert(S::kCodeWarps == 1, "");
  const int tid = threadIdx.x, width = p.n_steps * 16;
  const int64_t N = a.x.n_rows();
  const SearchMemory<S> m(shared_memory(), width);
  const PackedHead head(p, 0);
  for (int i = tid / 32; i < S::kRows; i += kSearchThreads / 32) {
    const int64_t at = row_offset(a.x, 0, i < N ? i : 0);
    const RowStatus state = place_row<S::kPart>(
        [&](int d, float (&v)[4]) { load_four(a.x.data, a.x.dtype, at, a.x.stride_d, d, p.dim, v); }, i < N, a.metric,
        false, p.heads[0], p.means, p.dim, width, i % 16, m.operand + i / 16 * p.n_steps * 512, m.info[i]);
    if (tid % 32 == 0) m.state[i] = state;
  }
  if (tid == 0) *a.lift = p.heads[0].lift;
  for (int d = tid; d < p.dim; d += kSearchThreads) a.mean[d] = p.means[d];
  __syncthreads();
  WarpSearch<S> search(head, m, false);
  for (int64_t tile = 0; tile < p.n_tiles; ++tile) {
    for (int step = 0; step < p.n_steps; step += S::kUnit) {
      __syncthreads();
      for (int at = tid * 16; at < S::kUnit * kSlabBytes; at += kSearchThreads * 16)
        *reinterpret_cast<uint4*>(m.stages + at / kSlabBytes * kStagedSlab + at % kSlabBytes) =
            *reinterpret_cast<const uint4*>(head.slabs + (tile * p.n_steps + step) * kSlabBytes + at);
      __syncthreads();
      if (search.active) search.multiply(step, m.stages);
    }
    for (int s = 0; s < S::kSlots; ++s)
      for (int i = 0; i < 16; ++i) {
        const int64_t row = search.row_of(s), k = tile * kTileCodes + search.lane % 4 * 2 + i / 2 * 8 + i % 2;
        if (row >= N || k >= p.n_codes || m.state[row] != searched || head.bias[k] == kUnreachable) continue;
        const RowInfo& info = m.info[row];
        a.scores[row * p.n_codes + k] = fmaf(search.score[s / 2][i / 2][s % 2 * 2 + i % 2], info.inverse, head.bias[k]);
        a.bounds[row * p.n_codes + k] = head.bound(info, k);
      }
    search.clear();
  }
}

template <class S>
int launch_scores(const Scores& a, const PackedCodebook& p) {
  return launch(scores_kernel<S>, 1, kSearchThreads, SearchMemory<S>::bytes(p.n_steps * 16), nullptr, a, p);
}

// At most 128 rows.
inline int filter_scores(const Codes& codes, const Scores& a, void* workspace) {
  PackedCodebook p;
  packed_layout(codes, static_cast<unsigned char*>(workspace), &p);
  if (const int error = pack_codes(codes, a.metric, false, p, nullptr)) return error;
  if (p.part == 4) return launch_scores<Rows128Of4>(a, p);
  if (p.part == 8) return launch_scores<Rows128Of8>(a, p);
  if (p.unit == 1) return launch_scores<Rows128By16>(a, p);
  return p.unit == 2 ? launch_scores<Rows128By32>(a, p) : launch_scores<Rows128>(a, p);
}

}  // namespace fastvq::cuda
