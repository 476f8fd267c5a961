// From the candidate lists to one code a row: a single candidate is certified, several are rescored by the definition. See
// search.cuh.
#pragma once
#include "scan.cuh"
#include "search.cuh"

namespace fastvq::cuda {

// Runs the search of all warps: rows are placed, `stream` has its first kStages - 1 stages under way.
template <class S>
__device__ __forceinline__ void search_codes(const PackedHead& head, const SearchMemory<S>& m, Stream<S>& stream,
                                             bool fast) {
  WarpSearch<S> search(head, m, fast);
  const int64_t columns = (head.n_tiles + S::kCodeWarps - 1) / S::kCodeWarps * head.n_steps;
  const int64_t n_stages = (columns + kStageSlabs - 1) / kStageSlabs;
  int64_t tile = search.group;
  int step = 0, stage = 0;
  for (int64_t i = 0; i < n_stages; ++i) {
    copy_wait<S::kStages - 2>();
    __syncthreads();  // the stage is there, and the one before it is free
    stream.copy_stage();
    const unsigned char* slabs = m.stages + stage * S::kStageBytes + search.group * kStageSlabs * kStagedSlab;
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
#pragma unroll 1
    for (int u = 0; u < kStageSlabs && search.active && tile < head.n_tiles; u += S::kUnit) {
      search.multiply(step, slabs + u * kStagedSlab);
      step += S::kUnit;
      if (step == head.n_steps) {
        search.finish_tile(tile, slabs + (u + S::kUnit - 1) * kStagedSlab);
        tile += S::kCodeWarps;
        step = 0;
      }
    }
  }
  copy_wait<0>();
  __syncthreads();
}

// Leaves in m.chosen of each row its code, -1 where masked, 0 where not finite, kUnresolved where the exhaustive scan must
// decide. `score_of(i, k)` is the definition's d_k of row i of the block.
template <class S, class Score>
__device__ __forceinline__ void choose_codes(const PackedHead& head, const SearchMemory<S>& m, bool fast,
                                             const Score& score_of) {
  const int tid = threadIdx.x;
  if (tid < S::kRows) {
    const int state = m.state[tid];
    int n = -state;  // 0 where searched
    int64_t chosen = state == masked ? -1 : state == not_finite ? 0 : kUnresolved;
    if (state == searched) {
      Candidate* list = m.listed + tid * S::kCodeWarps * kListed;
      float limit = kLowestScore;
      bool full = false;
#pragma unroll
      for (int g = 0; g < S::kCodeWarps; ++g) {
        limit = fmaxf(limit, m.limit[g * S::kRows + tid]);
        full |= m.count[g * S::kRows + tid] > kListed;
      }
      if (!full)
#pragma unroll 1
        for (int g = 0; g < S::kCodeWarps; ++g)
#pragma unroll 1
          for (int i = 0; i < m.count[g * S::kRows + tid]; ++i) {
            const Candidate c = list[g * kListed + i];
            if (!(c.score + head.bound(m.info[tid], c.code) < limit)) list[n++] = c;
          }
      if (n > 0) chosen = list[0].code;
      if (fast) {
        for (int i = 1; i < n; ++i)
          if (list[i].code < chosen) chosen = list[i].code;
        n = 0;
      }
    }
    m.chosen[tid] = chosen;
    m.state[tid] = n;
  }
  __syncthreads();
  // Eight lanes a row, a candidate each.
  const int lane = tid % 32, base = tid / 32 * 32;
  if (base >= S::kRows) return;
  constexpr int kHere = S::kRows < 32 ? S::kRows : 32;
  unsigned several = __ballot_sync(kWarp, lane < kHere && m.state[base + lane % kHere] > 1);
  while (several) {
    int mine = -1;
    for (int g = 0; g < 4 && several; ++g) {
      const int next = __ffs(static_cast<int>(several)) - 1;
      several &= several - 1;
      if (lane / 8 == g) mine = base + next;
    }
    double best = HUGE_VAL;
    int64_t code = kUnresolved;
    if (mine >= 0)
      for (int i = lane % 8; i < m.state[mine]; i += 8) {
        const int64_t k = m.listed[mine * S::kCodeWarps * kListed + i].code;
        const double d = score_of(mine, k);
        if (d < best || (d == best && k < code)) {
          best = d;
          code = k;
        }
      }
    // Where no distance is below infinity, kUnresolved is the smallest code, and the exhaustive scan decides.
    group_minimum(best, code, 8);
    if (mine >= 0 && lane % 8 == 0) m.chosen[mine] = code;
  }
}

}  // namespace fastvq::cuda
