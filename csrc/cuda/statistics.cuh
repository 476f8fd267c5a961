// What the ways to add up the rows of each code have in common. A row's key is h*K + code, or H*K for one that is left
// out: index -1 or out of range, NaN or infinity in it.
#pragma once
#include "elements.cuh"

namespace fastvq::cuda {

constexpr int kStatisticsThreads = 256;

struct Statistics {
  Rows x;
  const int64_t* indices;  // [H, N]
  int64_t n_codes;
  void* sums;  // [H, K, D], double where sums_double, else float
  bool sums_double;
  int64_t* counts;  // [H, K]
  int64_t n_rows;   // N
  int64_t n_total;  // H N
  int64_t n_keys;   // H K
};

__device__ __forceinline__ int64_t row_of_all(const Rows& x, int64_t n_rows, int64_t row) {
  if (x.n_heads == 1) return row_offset(x, 0, row);
  return row_offset(x, row / n_rows, row % n_rows);
}
__device__ __forceinline__ void store_sum(const Statistics& s, int64_t at, double v) {
  if (s.sums_double)
    static_cast<double*>(s.sums)[at] = saturated<double>(v);
  else
    static_cast<float*>(s.sums)[at] = saturated<float>(v);
}

Statistics statistics_of(const Rows& x, int64_t n_codes);
// Makes sums and counts zero: for who adds with atomics.
int clear_statistics(const Statistics& s, void* stream);
// The deterministic ways, of keys [H, N] that lie at the start of the workspace.
size_t keyed_statistics_workspace(const Statistics& s);
int add_keyed(const Statistics& s, void* workspace, void* stream);
// The key of every row. Where read_x is false, rows that are not finite keep their key: whoever adds them looks.
int statistics_keys(const Statistics& s, bool read_x, uint32_t* keys, void* stream);

// Column owners (statistics_owner.cu), where the sums of a few columns of all codes fit in shared memory.
bool owners_fit(const Statistics& s);
size_t owners_workspace(const Statistics& s);
int owners_add(const Statistics& s, const uint32_t* keys, void* workspace, void* stream);

// Stable radix sort of (key, row) (statistics_sort.cu). pairs [2, 2, n_total]: keys come in pairs[0], and go, with the
// rows beside them, to pairs[sorted_place].
size_t sort_workspace(int64_t n_total);
int sort_place(int64_t n_keys);
int sort_keys(uint32_t* pairs, int64_t n_total, int64_t n_keys, void* workspace, void* stream);

// Sums of the sorted rows (statistics_segments.cu).
bool segments_check_rows(const Statistics& s);
size_t segments_workspace(const Statistics& s);
int segments_add(const Statistics& s, const uint32_t* sorted, void* workspace, void* stream);

}  // namespace fastvq::cuda
