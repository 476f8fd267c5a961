// The functions of one instruction set, gathered for testing.cpp. The including file names its vectors first (simd/), then
// its ceiling, which names its filter, and defines FASTVQ_TESTING_TABLE.
#pragma once
#include "bound_check.h"

namespace fastvq {

const TestingKernels FASTVQ_TESTING_TABLE = {workspace_bytes, check_bound, peak_fma};

}  // namespace fastvq
