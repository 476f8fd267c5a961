// AVX-512 and VNNI: products of pairs of 16-bit integers, added in 32 bits.
#pragma once
#include <cstring>

#include "avx512.h"

namespace fastvq {
namespace {

// sums + pairs of rows times pairs of codes. In assembly, because gcc 12 copies the sums of its intrinsic.
inline __m512i multiply_pairs(__m512i sums, __m512i rows, __m512i codes) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(rows), "v"(codes));
  return sums;
}
inline __m512i load_pairs(const float* from) { return _mm512_loadu_si512(from); }
inline __m512i broadcast_pair(const float* from) {
  int32_t pair;
  std::memcpy(&pair, from, 4);
  return _mm512_set1_epi32(pair);
}

}  // namespace
}  // namespace fastvq
