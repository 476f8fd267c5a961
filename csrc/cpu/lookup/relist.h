// Second pass of the filter, for rows whose list of candidates overflowed. The final lower bound of such a row is known
// now, so listing the codes above it usually gives a short list: clusters of codes that differ in last bits end here. It
// costs the filter's time again and some tens of cycles a candidate. Lists that are still too long go to
// lookup/rescore_float64.h.
#pragma once
#include <cmath>
#include <cstdint>

#include "exact.h"
#include "rows.h"

namespace fastvq {
namespace {

struct RelistWorkspace {
  RowBounds* rows;  // [kRelistRows]
  int64_t* codes;  // [kRelistRows][kMaxExact]
};

template <class Take>
RelistWorkspace relist_workspace(const Take& take) {
  RelistWorkspace s;
  s.rows = reinterpret_cast<RowBounds*>(take(static_cast<int64_t>(sizeof(RowBounds)) * kRelistRows));
  s.codes = reinterpret_cast<int64_t*>(take(8 * kRelistRows * kMaxExact));
  return s;
}

// Appends the codes of one panel that reach the row's lower bound. Returns the new length of the list, -1: too long.
inline int list_panel(const RowBounds& row, const PackedCodes& packed, int64_t k0, const float* scores, int64_t* codes,
                      int n) {
  const RowBound bound(row);
  const V limit = broadcast(row.lower);
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

// Decides pending rows (ascending, counted from row `first`) where it can. Keeps the others in `pending` and returns their
// number. states: of all rows, as the filter left them.
template <class Filter>
int64_t relist_candidates(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n_rows,
                          const RowBounds* states, int64_t n_pending, int64_t* pending, Filter& filter,
                          RelistWorkspace& s, int64_t* indices) {
  int64_t left = 0;
  for (int64_t i = 0; i < n_pending;) {
    checkpoint();
    const int64_t group = pending[i] / kRelistRows * kRelistRows;
    int n[kRelistRows];
    bool any = false;
    for (int64_t j = 0; j < kRelistRows; ++j) n[j] = -1;
    for (int64_t p = i; p < n_pending && pending[p] < group + kRelistRows; ++p)
      if (states[pending[p]].lower > -HUGE_VALF) {  // false for rows that the filter could not bound
        n[pending[p] - group] = 0;
        any = true;
      }
    if (any)
      score_block(lookup, packed, h, first + group, n_rows - group < kRelistRows ? n_rows - group : kRelistRows, filter,
                  s.rows, [&](int64_t r, int64_t k0, const float* scores) {
                    if (n[r] >= 0)
                      n[r] = list_panel(states[group + r], packed, k0, scores, s.codes + r * kMaxExact, n[r]);
                  });
    for (; i < n_pending && pending[i] < group + kRelistRows; ++i) {
      const int64_t r = pending[i] - group;
      if (n[r] > 0)
        indices[pending[i]] = best_of(lookup, h, first + pending[i], s.codes + r * kMaxExact, n[r], filter.doubles);
      else
        pending[left++] = pending[i];
    }
  }
  return left;
}

}  // namespace
}  // namespace fastvq
