// AVX-512 kernels of the masked convolution: 8 pixels x 48 channels a tile.
#include <cstdint>

#include <immintrin.h>

#include "../../masked_conv.h"

namespace fastvq {
namespace {

constexpr int Lanes = 16, MaxVectors = 3, MaxRows = 8;
typedef float F __attribute__((vector_size(64)));
typedef int I __attribute__((vector_size(64)));
inline F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#include "../simd/transpose_8x8.inl"
#include "kernels.inl"

}  // namespace

const ConvKernels& conv_kernels_avx512() { return kernels; }

}  // namespace fastvq
