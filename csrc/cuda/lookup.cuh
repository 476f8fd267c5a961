// The launch of the filtered lookup; nearest.cu decides when it serves.
#pragma once
#include "filter.cuh"
#include "scan.cuh"

namespace fastvq::cuda {

struct LookupCall {
  Rows x;
  Codes codes;
  Metric metric;
  bool fast;
  const uint8_t* mask;  // [H, N] or null
  int64_t* indices;     // [H, N]
  Gather gather = {};
};
int64_t lookup_blocks(const Rows& x, const PackedCodebook& packed);
// indices: as nearest, but kUnresolved where the exhaustive scan must decide.
int filtered_lookup(const LookupCall& a, const PackedCodebook& packed, void* stream);

}  // namespace fastvq::cuda
