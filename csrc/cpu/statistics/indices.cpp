// Checks indices that come from the caller, before the kernels of a gradient read codes by them.
#include <cstdint>

#include "../../fastvq_cpu.h"

namespace fastvq {
namespace {

// A row has a code on every level, or -1 on every level.
bool is_bad(int64_t first, int64_t k, int64_t n_codes) {
  return first < 0 ? k != -1 : static_cast<uint64_t>(k) >= static_cast<uint64_t>(n_codes);
}

}  // namespace

IndexCount count_indices(const int64_t* indices, int64_t n_rows, int64_t n_levels, int64_t n_codes) {
  int64_t n_bad = 0, n_real = 0;
  if (n_levels == 1) {
    for (int64_t r = 0; r < n_rows; ++r) {  // without a branch, so that compilers vectorise it
      n_bad += static_cast<uint64_t>(indices[r]) + 1 > static_cast<uint64_t>(n_codes);
      n_real += indices[r] >= 0;
    }
  } else {
    for (int64_t r = 0; r < n_rows; ++r) {
      const int64_t* row = indices + r * n_levels;
      for (int64_t q = 0; q < n_levels; ++q) n_bad += is_bad(row[0], row[q], n_codes);
      n_real += row[0] >= 0;
    }
  }
  if (n_bad == 0) return {-1, n_real};
  int64_t i = 0;
  while (!is_bad(indices[i / n_levels * n_levels], indices[i], n_codes)) ++i;
  return {i, n_real};
}

}  // namespace fastvq
