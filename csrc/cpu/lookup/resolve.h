// Step 4 of the lookup, shared by every filter. In this order:
//   one candidate                  certified
//   2 to kMaxCandidates            best_of rescores them (exact.h)
//   the list overflowed            relist_candidates runs the filter again (relist.h), best_of rescores
//   still too many                 rescore_rows scores all codes in float64 (rescore_float64.h), best_of rescores
//   still too many                 scan_rows scores all codes by the definition (exact.h)
#pragma once
#include <cstddef>
#include <cstdint>

#include "relist.h"
#include "rescore_float64.h"
#include "rows.h"

namespace fastvq {
namespace {

static_assert(kMaxCandidates <= kMaxExact && kMaxRescoreCandidates <= kMaxExact,
              "best_of takes every list of candidates");

struct SearchWorkspace {
  FilterWorkspace filter;
  RowBounds* rows;
  ScanWorkspace scan;
  RescoreWorkspace rescore;
  RelistWorkspace relist;
};

inline size_t search_layout(int64_t D, char* base, SearchWorkspace* s) {
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += (static_cast<size_t>(bytes) + 63) / 64 * 64;
    return at;
  };
  SearchWorkspace out;
  const int64_t rows = block_rows(D);
  out.filter = filter_workspace(D <= kMaxFilterDim ? D : 1, take);  // wider rows are not filtered
  out.rows = reinterpret_cast<RowBounds*>(take(static_cast<int64_t>(sizeof(RowBounds)) * rows));
  out.scan.pending = reinterpret_cast<int64_t*>(take(8 * rows));
  out.scan.best = reinterpret_cast<double*>(take(8 * rows));
  out.scan.sums = reinterpret_cast<double*>(take(8 * kExactCodes * rows));
  out.scan.codes = reinterpret_cast<double*>(take(8 * kExactCodes * kExactDims));
  out.scan.row = reinterpret_cast<double*>(take(8 * kExactDims));
  out.rescore = rescore_workspace(D, rows, take);
  out.relist = relist_workspace(take);
  if (s) *s = out;
  return used;
}

size_t search_bytes(int64_t dim) { return search_layout(dim, nullptr, nullptr); }

void search(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n, char* workspace,
            LookupCounts& counts) {
  SearchWorkspace s;
  search_layout(packed.dim, workspace, &s);
  const int64_t N = lookup.x->n_rows();
  const uint8_t* mask = lookup.mask ? lookup.mask + h * N + first : nullptr;
  int64_t* indices = lookup.indices + h * N + first;
  if (!packed.skip_filter) filter_block(lookup, packed, h, first, n, s.filter, s.rows);
  int64_t n_pending = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (mask && !mask[i]) {
      indices[i] = -1;
      continue;
    }
    RowBounds& row = s.rows[i];
    if (packed.skip_filter || row.n <= 0) {
      s.scan.pending[n_pending++] = i;
      continue;
    }
    if (lookup.fast) {
      int best = 0;
      for (int j = 1; j < row.n; ++j)
        if (row.upper[j] > row.upper[best]) best = j;
      indices[i] = row.code[best];
      continue;
    }
    prune(row);
    indices[i] = row.code[0];
    if (row.n > 1) {
      indices[i] = best_of(lookup, h, first + i, row.code, row.n, s.filter.doubles);
      ++counts.rescored;
    }
  }
  if (n_pending && !packed.skip_filter && !lookup.fast) {
    const int64_t before = n_pending;
    n_pending =
        relist_candidates(lookup, packed, h, first, n, s.rows, n_pending, s.scan.pending, s.filter, s.relist, indices);
    counts.rescored += before - n_pending;
  }
  if (n_pending) {
    counts.scanned += n_pending;
    if (!packed.skip_filter)
      n_pending =
          rescore_rows(lookup, packed, h, first, n_pending, s.scan.pending, s.rescore, s.filter.doubles, indices);
    scan_rows(lookup, h, first, n_pending, s.scan, indices);
  }
}

}  // namespace
}  // namespace fastvq
