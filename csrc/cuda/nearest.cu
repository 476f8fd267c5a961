// The launcher of the nearest-code lookup: pack the codes, filter, then scan the unresolved rows exhaustively. All on one
// stream, without host synchronisation.
#include "../fastvq_cuda.h"
#include "lookup.cuh"
#include "scan.cuh"
#include "shapes.cuh"

namespace fastvq::cuda {

bool filter_serves(const Rows& x, const Codes& codes) {
  if (x.dtype == DType::f64 || codes.dtype == DType::f64 || codes.dim > kMaxFilterDim) return false;
  if (codes.n_codes > 0xffffffff - kTileCodes) return false;  // candidates hold a code in 32 bits
  return shape_fits<Rows16>(static_cast<int>((codes.dim + 63) / 64 * 64), 0);
}

size_t nearest_workspace(const Rows& x, const Codes& codes) {
  return filter_serves(x, codes) ? packed_layout(codes, nullptr, nullptr) : 0;
}

int nearest(const Rows& x, const Codes& codes, Metric metric, bool fast, const uint8_t* mask, int64_t* indices,
            void* workspace, void* stream) {
  const bool filter = filter_serves(x, codes);
  if (filter) {
    PackedCodebook packed;
    packed_layout(codes, static_cast<unsigned char*>(workspace), &packed);
    if (const int error = pack_codes(codes, metric, fast, packed, stream)) return error;
    if (const int error = filtered_lookup({x, codes, metric, fast, mask, indices}, packed, stream)) return error;
  }
  return scan({x, codes, metric, mask, indices, filter}, stream);
}

}  // namespace fastvq::cuda
