// Rows that had too many codes noted, once more: the filter has followed their lower bound to its end, so a second look at
// their scores lists only codes that reach it. Clusters of codes that differ in last bits end here, at the price of the
// filter's own time again and some tens of cycles a code; what is still too much is lookup/rescore_float64.h's.
#pragma once
#include <cmath>
#include <cstdint>

#include "exact.h"
#include "rows.h"

namespace fastvq {
namespace {

struct AgainScratch {
  RowState* rows;  // [kAgainRows]
  int64_t* codes;  // [kAgainRows][kMaxExact]
};

template <class Take>
AgainScratch again_scratch(const Take& take) {
  AgainScratch s;
  s.rows = reinterpret_cast<RowState*>(take(static_cast<int64_t>(sizeof(RowState)) * kAgainRows));
  s.codes = reinterpret_cast<int64_t*>(take(8 * kAgainRows * kMaxExact));
  return s;
}

// Appends the codes of one panel that reach the row's lower bound; returns how many there are now, -1: too many.
inline int list_panel(const RowState& row, const PackedCodes& packed, int64_t k0, const float* scores, int64_t* codes,
                      int n) {
  const RowBound bound(row);
  const V limit = spread(row.lower);
  for (int v = 0; v < kTileVectors && k0 + v * kLanes < packed.n_codes; ++v) {
    const int64_t k = k0 + v * kLanes;
    for (unsigned mask = at_least(add(load(scores + v * kLanes), bound.of_codes(packed, k)), limit); mask;
         mask &= mask - 1) {
      if (n == kMaxExact) return -1;
      codes[n++] = k + __builtin_ctz(mask);
    }
  }
  return n;
}

// Decides what it can of the pending rows (in order, counted from row `first`); the others stay pending, their number is
// returned. states are those that the filter left.
template <class Filter>
int64_t look_again(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n_rows,
                   const RowState* states, int64_t n_pending, int64_t* pending, Filter& filter, AgainScratch& s,
                   int64_t* indices) {
  int64_t left = 0;
  for (int64_t i = 0; i < n_pending;) {
    checkpoint();
    const int64_t group = pending[i] / kAgainRows * kAgainRows;
    int n[kAgainRows];
    bool any = false;
    for (int64_t j = 0; j < kAgainRows; ++j) n[j] = -1;
    for (int64_t p = i; p < n_pending && pending[p] < group + kAgainRows; ++p)
      if (states[pending[p]].lower > -HUGE_VALF) {  // false for rows that the filter did not take
        n[pending[p] - group] = 0;
        any = true;
      }
    if (any)
      score_block(lookup, packed, h, first + group, n_rows - group < kAgainRows ? n_rows - group : kAgainRows, filter,
                  s.rows, [&](int64_t r, int64_t k0, const float* scores) {
                    if (n[r] >= 0)
                      n[r] = list_panel(states[group + r], packed, k0, scores, s.codes + r * kMaxExact, n[r]);
                  });
    for (; i < n_pending && pending[i] < group + kAgainRows; ++i) {
      const int64_t r = pending[i] - group;
      if (n[r] > 0)
        indices[pending[i]] = best_of(lookup, h, first + pending[i], s.codes + r * kMaxExact, n[r], filter.room);
      else
        pending[left++] = pending[i];
    }
  }
  return left;
}

}  // namespace
}  // namespace fastvq
