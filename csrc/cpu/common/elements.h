// Elements of the four input types as the real numbers they hold, and back.
// Included by files compiled per instruction set, so everything has internal linkage.
#pragma once
#include <cstdint>
#include <cstring>

#include "../../fastvq_types.h"

namespace fastvq {
namespace {

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

// Real is the narrowest of float and double that holds every value of the type.
template <DType T>
struct Element;

template <>
struct Element<DType::f32> {
  using Stored = float;
  using Real = float;
  static float get(float v) { return v; }
  static float put(float v) { return v; }
  static float put(double v) { return static_cast<float>(v); }
};
template <>
struct Element<DType::f64> {
  using Stored = double;
  using Real = double;
  static double get(double v) { return v; }
  static double put(double v) { return v; }
};
template <>
struct Element<DType::f16> {
  using Stored = uint16_t;
  using Real = float;
  static float get(uint16_t h) {
    // The half's exponent and mantissa, moved into place, are off by a factor 2^112: also for subnormals.
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    const uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
    const uint32_t value = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : finite;
    return bits_to_float(value | (static_cast<uint32_t>(h & 0x8000) << 16));
  }
  static uint16_t put(float f) {
    const uint32_t bits = float_to_bits(f), sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude >= 0x47800000u) {  // 65536 and above, infinity, NaN
      half = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
    } else if (magnitude < 0x38800000u) {  // below the smallest normal half: let an addition round at 2^-24
      half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    } else {  // round to nearest even; a carry into the exponent is right, up to infinity
      half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return static_cast<uint16_t>(half | sign);
  }
  static uint16_t put(double v) { return put(static_cast<float>(v)); }
};
template <>
struct Element<DType::bf16> {
  using Stored = uint16_t;
  using Real = float;
  static float get(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
  static uint16_t put(float f) {
    const uint32_t bits = float_to_bits(f);
    if ((bits & 0x7fffffff) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static uint16_t put(double v) { return put(static_cast<float>(v)); }
};

// Calls f with a value whose type is Element<dtype>.
template <class F>
inline auto with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(Element<DType::f64>{});
    case DType::f16:
      return f(Element<DType::f16>{});
    case DType::bf16:
      return f(Element<DType::bf16>{});
    default:
      return f(Element<DType::f32>{});
  }
}

template <class E>
inline const typename E::Stored* row_at(const Rows& x, int64_t h, int64_t r) {
  return static_cast<const typename E::Stored*>(x.data) + x.offset(h, r);
}
template <class E>
inline const typename E::Stored* code_at(const Codes& c, int64_t h, int64_t k) {
  return static_cast<const typename E::Stored*>(c.data) + h * c.stride_head + k * c.stride_k;
}

template <class E>
inline void to_double(const typename E::Stored* p, int64_t stride, int64_t n, double* out) {
  if (stride == 1)
    for (int64_t d = 0; d < n; ++d) out[d] = E::get(p[d]);
  else
    for (int64_t d = 0; d < n; ++d) out[d] = E::get(p[d * stride]);
}

}  // namespace
}  // namespace fastvq
