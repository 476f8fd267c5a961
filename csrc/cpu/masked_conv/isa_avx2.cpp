// AVX2 kernels of the masked convolution: 4 pixels x 24 channels a tile (12 of 16 registers hold sums).
#include <cstdint>

#include <immintrin.h>

#include "../../masked_conv.h"

namespace fastvq {
namespace {

constexpr int Lanes = 8, MaxVectors = 3, MaxRows = 4;
typedef float F __attribute__((vector_size(32)));
typedef int I __attribute__((vector_size(32)));
inline F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#include "../simd/transpose_8x8.inl"
#include "kernels.inl"

}  // namespace

const ConvKernels& conv_kernels_avx2() { return kernels; }

}  // namespace fastvq
