// What an instruction set provides for code_statistics.
#pragma once
#include <cstdint>

#include "../../fastvq_cpu.h"

namespace fastvq {

struct StatisticsKernels {
  // table[slots[i] + d] += x[offsets[i] + d], i = 0 ... n-1 in that order, d = 0 ... width-1; x holds float or double.
  using AddRows = void (*)(const void* x, const int64_t* offsets, const int64_t* slots, int64_t n, int64_t width,
                           double* table);
  AddRows add_f32, add_f64;
  // out[i*width + d] = x[offsets[i] + d*stride_d], widened without rounding to float (double for f64).
  void (*stage)(const void* x, DType dtype, const int64_t* offsets, int64_t n, int64_t width, int64_t stride_d,
                void* out);
};

extern const StatisticsKernels statistics_kernels_generic;
#if defined(__x86_64__)
extern const StatisticsKernels statistics_kernels_avx2, statistics_kernels_avx512;
#endif
const StatisticsKernels& statistics_kernels(Isa isa);

}  // namespace fastvq
