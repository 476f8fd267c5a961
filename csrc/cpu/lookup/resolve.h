// Step 4 of the lookup, shared by every filter: rows with one code noted are proved, a few are told apart
// by best_of; of the others the filter lists the codes once more (lookup/relist.h), those left then meet every code in
// double (lookup/rescore_float64.h), and the definition decides the rest.
#pragma once
#include <cstddef>
#include <cstdint>

#include "relist.h"
#include "rescore_float64.h"
#include "rows.h"

namespace fastvq {
namespace {

static_assert(kMaxNoted <= kMaxExact && kMaxQuick <= kMaxExact, "best_of takes all codes that are noted");

struct SearchScratch {
  FilterScratch filter;
  RowState* rows;
  ExactScratch exact;
  QuickScratch quick;
  AgainScratch again;
};

inline size_t search_layout(int64_t D, char* base, SearchScratch* s) {
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += (static_cast<size_t>(bytes) + 63) / 64 * 64;
    return at;
  };
  SearchScratch out;
  const int64_t rows = block_rows(D);
  out.filter = filter_scratch(D <= kMaxFilterDim ? D : 1, take);  // wider rows are not filtered
  out.rows = reinterpret_cast<RowState*>(take(static_cast<int64_t>(sizeof(RowState)) * rows));
  out.exact.pending = reinterpret_cast<int64_t*>(take(8 * rows));
  out.exact.best = reinterpret_cast<double*>(take(8 * rows));
  out.exact.sums = reinterpret_cast<double*>(take(8 * kExactCodes * rows));
  out.exact.codes = reinterpret_cast<double*>(take(8 * kExactCodes * kExactDims));
  out.exact.row = reinterpret_cast<double*>(take(8 * kExactDims));
  out.quick = quick_scratch(D, rows, take);
  out.again = again_scratch(take);
  if (s) *s = out;
  return used;
}

size_t search_bytes(int64_t dim) { return search_layout(dim, nullptr, nullptr); }

void search(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n, char* scratch,
            LookupCounts& counts) {
  SearchScratch s;
  search_layout(packed.dim, scratch, &s);
  const int64_t N = lookup.x->n_rows();
  const uint8_t* mask = lookup.mask ? lookup.mask + h * N + first : nullptr;
  int64_t* indices = lookup.indices + h * N + first;
  if (!packed.only_exact) filter_block(lookup, packed, h, first, n, s.filter, s.rows);
  int64_t n_pending = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (mask && !mask[i]) {
      indices[i] = -1;
      continue;
    }
    RowState& row = s.rows[i];
    if (packed.only_exact || row.n <= 0) {
      s.exact.pending[n_pending++] = i;
      continue;
    }
    if (lookup.fast) {
      int best = 0;
      for (int j = 1; j < row.n; ++j)
        if (row.upper[j] > row.upper[best]) best = j;
      indices[i] = row.code[best];
      continue;
    }
    drop_beaten(row);
    indices[i] = row.code[0];
    if (row.n > 1) {
      indices[i] = best_of(lookup, h, first + i, row.code, row.n, s.filter.room);
      ++counts.rescored;
    }
  }
  if (n_pending && !packed.only_exact && !lookup.fast) {
    const int64_t before = n_pending;
    n_pending = look_again(lookup, packed, h, first, n, s.rows, n_pending, s.exact.pending, s.filter, s.again, indices);
    counts.rescored += before - n_pending;
  }
  if (n_pending) {
    counts.scanned += n_pending;
    if (!packed.only_exact)
      n_pending = quick_scan(lookup, packed, h, first, n_pending, s.exact.pending, s.quick, s.filter.room, indices);
    scan_rows(lookup, h, first, n_pending, s.exact, indices);
  }
}

}  // namespace
}  // namespace fastvq
