// Vectors of eight elements of any input type, in the compiler's own vectors, with the names of simd/<name>.h. Included by
// files compiled per instruction set, so everything has internal linkage.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/elements.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // passing wide vectors: only between functions of one file
#endif

namespace fastvq {
namespace {

#if defined(__AVX512F__)
typedef double D8 __attribute__((vector_size(64)));
#else
// Two halves by hand: compilers keep a vector that is wider than the machine's in memory between operations.
typedef double D4 __attribute__((vector_size(32)));
struct D8 {
  D4 low, high;
  double operator[](int i) const { return i < 4 ? low[i] : high[i - 4]; }
  D8& operator+=(const D8& o) { return low += o.low, high += o.high, *this; }
};
inline D8 operator+(const D8& a, const D8& b) { return {a.low + b.low, a.high + b.high}; }
inline D8 operator-(const D8& a, const D8& b) { return {a.low - b.low, a.high - b.high}; }
inline D8 operator*(const D8& a, const D8& b) { return {a.low * b.low, a.high * b.high}; }
inline D8 operator*(const D8& a, double b) { return {a.low * b, a.high * b}; }
inline D8 operator*(double a, const D8& b) { return {a * b.low, a * b.high}; }
inline D8 operator-(double a, const D8& b) { return {a - b.low, a - b.high}; }
#endif
typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint16_t H8 __attribute__((vector_size(16)));

template <class T>
inline T load_as(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store_as(void* p, const T& v) {
  std::memcpy(p, &v, sizeof v);
}

#if defined(__AVX512F__)
inline D8 widen(F8 v) { return __builtin_convertvector(v, D8); }
inline F8 narrow(D8 v) { return __builtin_convertvector(v, F8); }
#elif defined(__AVX__)
inline D8 widen(F8 v) {
  const __m256 f = (__m256)v;
  return {(D4)_mm256_cvtps_pd(_mm256_castps256_ps128(f)), (D4)_mm256_cvtps_pd(_mm256_extractf128_ps(f, 1))};
}
inline F8 narrow(const D8& v) {
  return (F8)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)v.high), _mm256_cvtpd_ps((__m256d)v.low));
}
#else
inline D8 widen(const F8& v) { return {D4{v[0], v[1], v[2], v[3]}, D4{v[4], v[5], v[6], v[7]}}; }
inline F8 narrow(const D8& v) {
  F8 f;
  for (int i = 0; i < 8; ++i) f[i] = static_cast<float>(v[i]);
  return f;
}
#endif
#if defined(__AVX512F__)
inline D8 fma(double a, const D8& b, const D8& c) {
  return (D8)_mm512_fmadd_pd(_mm512_set1_pd(a), (__m512d)b, (__m512d)c);
}
#elif defined(__FMA__)
inline D8 fma(double a, const D8& b, const D8& c) {
  const __m256d s = _mm256_set1_pd(a);
  return {(D4)_mm256_fmadd_pd(s, (__m256d)b.low, (__m256d)c.low),
          (D4)_mm256_fmadd_pd(s, (__m256d)b.high, (__m256d)c.high)};
}
#else
// Two roundings, not one: error bounds allow for it.
inline D8 fma(double a, const D8& b, const D8& c) { return c + a * b; }
#endif

inline const D8& widen(const D8& v) { return v; }
inline const F8& narrow(const F8& v) { return v; }

inline F8 load(Element<DType::f32>, const float* p) { return load_as<F8>(p); }
inline D8 load(Element<DType::f64>, const double* p) { return load_as<D8>(p); }
inline F8 load(Element<DType::bf16>, const uint16_t* p) {
  return (F8)(__builtin_convertvector(load_as<H8>(p), U8) << 16);
}
inline F8 load(Element<DType::f16>, const uint16_t* p) {
  const U8 half = __builtin_convertvector(load_as<H8>(p), U8);
  const U8 magnitude = (half & 0x7fff) << 13;
  const F8 finite = (F8)magnitude * 0x1p112f;
  const U8 special = (U8)(magnitude >= 0x0f800000u);
  const U8 value = (special & (magnitude | 0x7f800000u)) | (~special & (U8)finite);
  return (F8)(value | ((half & 0x8000) << 16));
}

inline void store(Element<DType::f32>, float* p, const F8& v) { store_as(p, v); }
inline void store(Element<DType::f32>, float* p, const D8& v) { store_as(p, narrow(v)); }
inline void store(Element<DType::f64>, double* p, const F8& v) { store_as(p, widen(v)); }
inline void store(Element<DType::f64>, double* p, const D8& v) { store_as(p, v); }
template <class E, class W>
inline void store(E, uint16_t* p, const W& v) {
  const F8 f = narrow(v);
  for (int i = 0; i < 8; ++i) p[i] = E::put(f[i]);
}

// One fixed order, so that the sum does not depend on the instruction set.
inline double sum_lanes(const D8& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// Returns the row where it is contiguous, else a contiguous copy of it in buffer.
template <class T>
inline const T* contiguous(const T* p, int64_t stride, int64_t n, void* buffer) {
  if (stride == 1) return p;
  T* out = static_cast<T*>(buffer);
  for (int64_t d = 0; d < n; ++d) out[d] = p[d * stride];
  return out;
}

template <class E>
inline bool all_finite(const typename E::Stored* p, int64_t stride, int64_t n) {
  bool finite = true;
  for (int64_t d = 0; d < n; ++d) {
    const auto v = E::get(p[d * stride]);
    finite &= v - v == 0;
  }
  return finite;
}

}  // namespace
}  // namespace fastvq
