// The exhaustive scan: rows scored against every code by the definition, in double. It serves float64 tensors, and after the
// filter the rows that the filter left unresolved. See scan.cu.
#pragma once
#include "../fastvq_types.h"

namespace fastvq::cuda {

// Index of a row that the filter could not resolve; the exhaustive scan replaces it.
constexpr int64_t kUnresolved = -2;

// Outputs of quantization besides the index: see gather.cuh.
struct Gather {
  Rows quantized;  // as x
  double* partial;  // [blocks, 2] squared distances and real rows; null: the indices alone are wanted
  uint32_t* keys;  // [H, N] or null: what statistics.cuh adds rows by
  void* sums;  // [H, K, D] or null: rows are added with atomics; double where sums_double, else float
  bool sums_double;
  int64_t* counts;  // [H, K]
};

struct Scan {
  Rows x;
  Codes codes;
  Metric metric;
  const uint8_t* mask;  // [H, N] or null
  int64_t* indices;  // [H, N]
  bool unresolved_only;
  Gather gather = {};
};
int64_t scan_blocks(const Rows& x, bool unresolved_only);
int scan(const Scan& s, void* stream);

}  // namespace fastvq::cuda
