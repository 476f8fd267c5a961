// Codes that repeat an earlier one bit for bit never win, so the lookup leaves them out. Otherwise a codebook that mostly
// repeats one code (early in a training) would leave many candidates.
// For sources compiled for the baseline instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lookup.h"

namespace fastvq {

// Best effort: a repeat that is not found within kProbes slots of the table is scored like any code, which is also right.
inline void leave_out_duplicates(const Codes& codes, int64_t head, PackedCodes& packed) {
  constexpr int64_t kSamples = 4, kProbes = 8;
  const int64_t K = packed.n_codes, D = packed.dim;
  if (K < 2 || K > INT32_MAX / 2) return;
  const int64_t size = codes.dtype == DType::f64 ? 8 : codes.dtype == DType::f32 ? 4 : 2;
  const char* base = static_cast<const char*>(codes.data) + head * codes.stride_head * size;
  const auto element = [&](int64_t k, int64_t d) { return base + (k * codes.stride_k + d * codes.stride_d) * size; };
  const auto same = [&](int64_t a, int64_t b) {
    if (codes.stride_d == 1) return std::memcmp(element(a, 0), element(b, 0), static_cast<size_t>(D * size)) == 0;
    for (int64_t d = 0; d < D; ++d)
      if (std::memcmp(element(a, d), element(b, d), static_cast<size_t>(size)) != 0) return false;
    return true;
  };
  int64_t slots = 16;
  while (slots < 2 * K) slots *= 2;
  std::vector<int32_t> table(static_cast<size_t>(slots), -1);
  const int64_t step = D < kSamples ? 1 : D / kSamples, samples = D < kSamples ? D : kSamples;
  for (int64_t k = 0; k < K; ++k) {
    if (k % 4096 == 0) checkpoint();
    if (packed.bias[k] == kUnreachable) continue;
    uint64_t hash = 0;
    std::memcpy(&hash, packed.bias + k, 4);
    for (int64_t i = 0; i < samples; ++i) {
      uint64_t bits = 0;
      std::memcpy(&bits, element(k, i * step), static_cast<size_t>(size));
      hash = (hash ^ bits) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
    for (int64_t probe = 0; probe < kProbes; ++probe) {
      int32_t& slot = table[(hash + static_cast<uint64_t>(probe)) & static_cast<uint64_t>(slots - 1)];
      if (slot < 0) {
        slot = static_cast<int32_t>(k);
        break;
      }
      if (same(slot, k)) {
        packed.bias[k] = kDuplicate;
        packed.slope[k] = packed.offset[k] = 0;
        if (packed.reach) packed.reach[k] = 0;
        break;
      }
    }
  }
}

}  // namespace fastvq
