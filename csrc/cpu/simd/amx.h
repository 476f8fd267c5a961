// AVX-512, and matrix tiles of bfloat16: 8 registers of 16 rows of 64 bytes. testing/emulated_tiles/emulated.h is the same
// in plain vectors.
#pragma once
#include "avx512.h"

namespace fastvq {
namespace {
namespace tile {

// Configures all eight registers at full size within a scope. A thread that left them configured would pay at every
// switch of threads.
class Scope {
 public:
  Scope() {
    alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 64;  // bytes of a row
      config[48 + t] = 16;  // rows
    }
    // GCC 12 does not know that the instruction reads the configuration, and would drop the stores that fill it.
    asm volatile("" ::"r"(config) : "memory");
    _tile_loadconfig(config);
    asm volatile("" ::: "memory");
  }
  ~Scope() { _tile_release(); }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

// The intrinsics take register numbers as literals.
template <int T>
inline void load(const void* from, int64_t stride) {
  static_assert(T >= 0 && T < 8, "a tile register");
  if constexpr (T == 0) _tile_loadd(0, from, stride);
  if constexpr (T == 1) _tile_loadd(1, from, stride);
  if constexpr (T == 2) _tile_loadd(2, from, stride);
  if constexpr (T == 3) _tile_loadd(3, from, stride);
  if constexpr (T == 4) _tile_loadd(4, from, stride);
  if constexpr (T == 5) _tile_loadd(5, from, stride);
  if constexpr (T == 6) _tile_loadd(6, from, stride);
  if constexpr (T == 7) _tile_loadd(7, from, stride);
}

template <int T>
inline void clear() {
  static_assert(T >= 0 && T < 4, "an accumulator");
  if constexpr (T == 0) _tile_zero(0);
  if constexpr (T == 1) _tile_zero(1);
  if constexpr (T == 2) _tile_zero(2);
  if constexpr (T == 3) _tile_zero(3);
}

template <int T>
inline void store(void* to, int64_t stride) {
  static_assert(T >= 0 && T < 4, "an accumulator");
  if constexpr (T == 0) _tile_stored(0, to, stride);
  if constexpr (T == 1) _tile_stored(1, to, stride);
  if constexpr (T == 2) _tile_stored(2, to, stride);
  if constexpr (T == 3) _tile_stored(3, to, stride);
}

// Accumulator 2 * I + J += rows (register 4 + I) times codes (register 6 + J).
template <int I, int J>
inline void multiply() {
  static_assert(I >= 0 && I < 2 && J >= 0 && J < 2, "two by two accumulators");
  if constexpr (I == 0 && J == 0) _tile_dpbf16ps(0, 4, 6);
  if constexpr (I == 0 && J == 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (I == 1 && J == 0) _tile_dpbf16ps(2, 5, 6);
  if constexpr (I == 1 && J == 1) _tile_dpbf16ps(3, 5, 7);
}

}  // namespace tile
}  // namespace
}  // namespace fastvq
