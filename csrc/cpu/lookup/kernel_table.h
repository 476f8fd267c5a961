// The functions of one instruction set, gathered for lookup/driver.cpp. The including file names its filter first
// (filter_float32.h, filter_int16.h, filter_bf16_tiles.h).
#pragma once
#include "resolve.h"
#include "quantize_rows.h"

namespace fastvq {
namespace {

void centre(const Codes& codes, int64_t h, Metric metric, double* workspace, PackedCodes& packed) {
  packed.centred = false;
  packed.mean_norm = 0;
  for (int64_t d = 0; d < 2 * packed.dim; ++d) packed.mean[d] = 0;
  if (metric != Metric::cosine)
    with_element(codes.dtype, [&](auto e) { centre_codes<decltype(e)>(codes, h, workspace, packed); });
}

LookupKernels::Found pack(const Codes& codes, int64_t h, Metric metric, int64_t first, int64_t last, double* workspace,
                          PackedCodes& packed) {
  return with_element(codes.dtype, [&](auto e) {
    return pack_codes<decltype(e), CodeLayout>(codes, h, metric, first, last, workspace, packed);
  });
}

}  // namespace

const LookupKernels FASTVQ_TABLE(lookup_kernels) = {kWidth,       kRounded, panel_bytes, centre,  pack,
                                                    search_bytes, search,   gather,      backward};

}  // namespace fastvq
