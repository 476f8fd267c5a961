// Elements of the four input types as the numbers they hold, by run-time type: for the parts of a kernel that read or
// write each element once. Rows and Codes are those of fastvq_types.h.
#pragma once

#include "../fastvq_types.h"
#include "primitives.cuh"

namespace fastvq::cuda {

// Pointers into device memory stay with the element's offset: 64-bit everywhere.
__device__ __forceinline__ int64_t row_offset(const Rows& x, int64_t h, int64_t r) {
  if (x.n_outer == 1) return h * x.stride_head + r * x.stride_inner;  // divisions are dear
  return h * x.stride_head + (r / x.n_inner) * x.stride_outer + (r % x.n_inner) * x.stride_inner;
}
__device__ __forceinline__ int64_t code_offset(const Codes& c, int64_t h, int64_t k) {
  return h * c.stride_head + k * c.stride_k;
}

__device__ __forceinline__ float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

// Exact for f32, f16 and bf16; f64 is rounded.
__device__ __forceinline__ float load_float(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[at];
    case DType::f64:
      return static_cast<float>(static_cast<const double*>(data)[at]);
    case DType::f16:
      return half_to_float(static_cast<const uint16_t*>(data)[at]);
    default:
      return bits_as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16);
  }
}
__device__ __forceinline__ double load_double(const void* data, DType dtype, int64_t at) {
  return dtype == DType::f64 ? static_cast<const double*>(data)[at] : static_cast<double>(load_float(data, dtype, at));
}

// Rounded once.
__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t at, float v) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[at] = v;
      break;
    case DType::f64:
      static_cast<double*>(data)[at] = v;
      break;
    case DType::f16:
      static_cast<uint16_t*>(data)[at] = float_to_half(v);
      break;
    default: {
      const uint32_t bits = __float_as_uint(v), even = bits >> 16 & 1;
      static_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(v == v ? (bits + 0x7fff + even) >> 16 : 0x7fc0);
    }
  }
}

// Values beyond the largest finite number of Real become that number. NaN stays NaN.
template <class Real>
__device__ __forceinline__ Real saturated(double v) {
  constexpr double most = sizeof(Real) == sizeof(float) ? 0x1.fffffep127 : 0x1.fffffffffffffp1023;
  v = v > most ? most : v;
  v = v < -most ? -most : v;
  return static_cast<Real>(v);
}

__device__ __forceinline__ bool is_finite(double v) { return v - v == 0; }

}  // namespace fastvq::cuda
