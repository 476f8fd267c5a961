// The full scan: rows scored against every code by the definition, in double. It serves float64 tensors, and after the
// filter the rows that the filter left unresolved. See scan.cu.
#pragma once
#include "../fastvq.h"

namespace fastvq::cuda {

// What the filter writes for a row that it could not resolve.
constexpr int64_t kUnresolved = -2;

struct Scan {
  Rows x;
  Codes codes;
  Metric metric;
  const uint8_t* mask;  // [H, N] or null
  int64_t* indices;     // [H, N]
  bool unresolved_only;
};
int scan(const Scan& s, void* stream);

}  // namespace fastvq::cuda
