// simd/amx.h with tiles in plain vectors, as Intel's manual describes TDPBF16PS: float32 fused multiply-adds in two
// chains, even and odd elements, from zero; then their sum; then the sum with the accumulator. Rounded to nearest even,
// small numbers flushed to zero in operands and results, for any MXCSR. For tests; slow.
#pragma once
#include <cstring>

#include "../../simd/avx512.h"

namespace fastvq {
namespace {
namespace tile {

struct Register {
  alignas(64) uint8_t rows[16][64];
};
inline Register* registers() {
  static thread_local Register all[8];
  return all;
}

class Scope {
 public:
  Scope() { std::memset(registers(), 0, 8 * sizeof(Register)); }
  ~Scope() { std::memset(registers(), 0xff, 8 * sizeof(Register)); }  // NaN, in case a kernel reads them later
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

template <int T>
inline void load(const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(registers()[T].rows[i], static_cast<const char*>(from) + i * stride, 64);
}

template <int T>
inline void clear() {
  std::memset(&registers()[T], 0, sizeof(Register));
}

template <int T>
inline void store(void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, registers()[T].rows[i], 64);
}

// A function that is not inlined, so that no arithmetic moves across the change of MXCSR.
__attribute__((noinline)) void multiply_flushed(Register& sums, const Register& a, const Register& b) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int m = 0; m < 16; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < 16; ++k) {
      uint32_t pair;
      std::memcpy(&pair, a.rows[m] + 4 * k, 4);
      const __m512i left = _mm512_set1_epi32(static_cast<int>(pair)), right = _mm512_loadu_si512(b.rows[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, high)),
                            _mm512_castsi512_ps(_mm512_and_si512(right, high)), odd);
    }
    float* out = reinterpret_cast<float*>(sums.rows[m]);
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), _mm512_add_ps(even, odd)));
  }
}

template <int I, int J>
inline void multiply() {
  constexpr unsigned kFlushing = 0x9fc0;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kFlushing);
  multiply_flushed(registers()[2 * I + J], registers()[4 + I], registers()[6 + J]);
  _mm_setcsr(before);
}

}  // namespace tile
}  // namespace
}  // namespace fastvq
