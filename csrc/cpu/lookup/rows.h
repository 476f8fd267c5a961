// The part of the lookup that works on one row: its bounds, and its candidates after a chunk of panels was scored. Shared
// by every filter. The including file names its vectors, kTileVectors, kRounded and kRowSlack first.
#pragma once
#include <cmath>
#include <cstdint>

#include "lookup.h"
#include "candidates.h"

namespace fastvq {
namespace {

constexpr int kWidth = kTileVectors * kLanes;
constexpr int kMaxCandidates = 16;

// Prefetches into the second-level cache.
inline void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Squared norms of a row less the mean, and of its operand's rounding error.
struct Measured {
  double square, lost;
};

// NaN: compares false with every score, so nothing is listed.
constexpr float kNoBound = __builtin_nanf("");

// Bounds of one row (bounds.h has the terms norm, own, lost). upper = score + bound; fast: the score. lost is 0 where the
// filter does not round its operands. After the list overflowed, `lower` still rises, for lookup/relist.h.
struct RowBounds : CandidateList<float, kMaxCandidates> {
  float norm, own, lost;
};

// A chunk of panels, with the largest coefficients of its panels. uneven: the coefficients differ so much that the largest
// would be a poor bound for most panels; each panel is then tested with its own.
struct Chunk {
  int64_t first;
  int n;
  float slope, offset, reach;
  bool uneven;
};

inline Chunk chunk_at(const PackedCodes& packed, int64_t first, int64_t chunk_panels) {
  const int64_t left = packed.n_panels - first;
  Chunk c{first, static_cast<int>(left < chunk_panels ? left : chunk_panels), 0, 0, 0, false};
  float least_slope = HUGE_VALF, least_offset = HUGE_VALF;
  for (int64_t p = first; p < first + c.n; ++p) {
    const float slope = packed.panel_slope[p], offset = packed.panel_offset[p];
    c.slope = slope > c.slope ? slope : c.slope;
    c.offset = offset > c.offset ? offset : c.offset;
    if (kRounded) c.reach = packed.panel_reach[p] > c.reach ? packed.panel_reach[p] : c.reach;
    least_slope = slope < least_slope ? slope : least_slope;
    least_offset = offset < least_offset ? offset : least_offset;
  }
  c.uneven = c.slope > 4 * least_slope || c.offset > 16 * least_offset;
  return c;
}

// Error bound of a score for this row: for a vector of codes, or the maximum over a panel or a chunk.
struct RowBound {
  V norm, own, lost;
  explicit RowBound(const RowBounds& row)
      : norm(broadcast(row.norm)), own(broadcast(row.own)), lost(broadcast(row.lost)) {}
  V operator()(V slope, V offset, V reach) const {
    const V bound = add(fma(norm, slope, offset), own);
    return kRounded ? fma(lost, reach, bound) : bound;
  }
  V of_chunk(const Chunk& c) const { return (*this)(broadcast(c.slope), broadcast(c.offset), broadcast(c.reach)); }
  V of_panel(const PackedCodes& packed, int64_t p) const {
    return (*this)(broadcast(packed.panel_slope[p]), broadcast(packed.panel_offset[p]),
                   broadcast(kRounded ? packed.panel_reach[p] : 0.0f));
  }
  V of_codes(const PackedCodes& packed, int64_t k) const {
    return (*this)(load(packed.slope + k), load(packed.offset + k), kRounded ? load(packed.reach + k) : own);
  }
};

// Step 3 for a chunk that may hold a winner: top >= score of each lane, bound >= bound of each panel. Bounds grow with
// their coefficients and rounding is monotone, so a panel that fails its test holds no code that passes the code's test.
// scores_of(p, buffer) gives the scores of the chunk's panel p: those kept, or recomputed into buffer.
template <class Scores>
__attribute__((noinline)) void search_chunk(RowBounds& row, const PackedCodes& packed, const Chunk& chunk, V top,
                                            V bound, const float* maxima, bool fast, const Scores& scores_of) {
  const RowBound row_bound(row);
  V best = sub(top, bound);
  if (chunk.uneven)
    for (int p = 0; p < chunk.n; ++p)
      best = max(best, sub(load(maxima + p * kLanes), row_bound.of_panel(packed, chunk.first + p)));
  const float lower = max_lanes(best);
  if (lower > row.lower) {
    row.lower = lower;
    if (row.n > 0) prune(row);
  }
  if (row.n < 0) return;
  const V limit = broadcast(row.lower);
  for (int p = 0; p < chunk.n; ++p) {
    if (p % 4 == 0 && p + 4 <= chunk.n) {  // most panels hold no winner: four at a time
      const float* four = maxima + p * kLanes;
      const V top_of_four =
          max(max(load(four), load(four + kLanes)), max(load(four + 2 * kLanes), load(four + 3 * kLanes)));
      if (!at_least(add(top_of_four, bound), limit)) {
        p += 3;
        continue;
      }
    }
    const V panel_top = load(maxima + p * kLanes);
    if (!at_least(add(panel_top, bound), limit)) continue;
    if (chunk.uneven && !at_least(add(panel_top, row_bound.of_panel(packed, chunk.first + p)), limit)) continue;
    const int64_t k0 = (chunk.first + p) * kWidth;
    float again[kWidth], upper[kWidth];
    const float* scores = scores_of(p, again);
    uint64_t mask = 0;
    for (int v = 0; v < kTileVectors && k0 + v * kLanes < packed.n_codes; ++v) {
      const int64_t k = k0 + v * kLanes;
      const V code_bound = row_bound.of_codes(packed, k);
      const V score = load(scores + v * kLanes), code_upper = add(score, code_bound);
      if (chunk.uneven) {  // a code's bound may be much tighter than the panel's
        const float code_lower = max_lanes(sub(score, code_bound));
        row.lower = code_lower > row.lower ? code_lower : row.lower;
      }
      store(upper + v * kLanes, code_upper);
      mask |= static_cast<uint64_t>(at_least(code_upper, limit)) << (v * kLanes);
    }
    for (; mask; mask &= mask - 1) {
      const int j = __builtin_ctzll(mask);
      if (push(row, k0 + j, upper[j])) continue;
      // Fast: the listed codes have the largest score and lower indices; this code ties with them or loses.
      if (!fast) row.n = -1;
      return;
    }
  }
}

// The largest score of each lane over n panels. Two chains of maxima, because one is bound by its latency.
inline V top_of(const float* maxima, int n) {
  V even = load(maxima), odd = even;
  int p = 1;
  for (; p + 4 <= n; p += 4) {
    even = max(even, load(maxima + p * kLanes));
    odd = max(odd, load(maxima + (p + 1) * kLanes));
    even = max(even, load(maxima + (p + 2) * kLanes));
    odd = max(odd, load(maxima + (p + 3) * kLanes));
  }
  for (; p < n; ++p) even = max(even, load(maxima + p * kLanes));
  return max(even, odd);
}

// Starts a row of the filter. norm: of the row less the mean; lost: norm of its operand's rounding error.
inline void start_row(RowBounds& row, const PackedCodes& packed, bool fast, double norm, double lost) {
  const bool inside = norm < packed.row_limit;  // false for NaN
  const bool bounded = inside && !fast;
  row.norm = bounded ? static_cast<float>(norm * kRowSlack) + 0x1p-149f : 0.0f;
  row.lost = bounded && kRounded ? static_cast<float>(lost * kRowSlack + norm * 0x1p-44) : 0.0f;
  row.own = packed.row_part > 0 ? row.norm * row.norm * packed.row_part : 0.0f;
  row.lower = inside ? -HUGE_VALF : kNoBound;
  row.n = inside ? 0 : -1;
}

}  // namespace
}  // namespace fastvq
