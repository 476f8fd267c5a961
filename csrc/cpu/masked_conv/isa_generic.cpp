// Kernels of the masked convolution for any machine: 4-lane compiler vectors, a product and a sum rounded apart.
#include <cstdint>

#include "../../masked_conv.h"

namespace fastvq {
namespace {

constexpr int Lanes = 4, MaxVectors = 2, MaxRows = 4, TransposeTile = 4;
typedef float F __attribute__((vector_size(16)));
typedef int I __attribute__((vector_size(16)));
inline F fma(F a, F b, F c) { return a * b + c; }
inline void transpose_tile(const float* src, int64_t src_row, float* dst, int64_t dst_row) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) dst[j * dst_row + i] = src[i * src_row + j];
}
#include "kernels.inl"

}  // namespace

const ConvKernels& conv_kernels_generic() { return kernels; }

}  // namespace fastvq
