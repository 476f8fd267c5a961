// The functions of one instruction set, gathered for testing.cpp. The including file names its ceiling first
// (peak_float32.h, peak_int16.h, peak_bf16_tiles.h), which names its filter.
#pragma once
#include "bound_check.h"

namespace fastvq {

const TestingKernels FASTVQ_TABLE(testing_kernels) = {workspace_bytes, check_bound, peak_fma};

}  // namespace fastvq
