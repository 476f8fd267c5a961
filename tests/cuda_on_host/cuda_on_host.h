// csrc/cuda/primitives.cuh for the processor: see fibers.h for how threads run.
//   - shared memory is NaN until written, and exactly as large as asked for
//   - an asynchronous copy makes its destination NaN at once and arrives when it is waited for
//   - the tensor core truncates: addends of a step are aligned to the largest and cut at its 24th bit
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../../csrc/cpu/common/elements.h"
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
};
#define threadIdx (dim3{on_host::machine.current->thread, 0, 0})
#define blockIdx (dim3{on_host::machine.current->block->index, 0, 0})
#define blockDim (dim3{on_host::machine.n_threads, 1, 1})
#define gridDim (dim3{on_host::machine.n_blocks, 1, 1})

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace on_host {

constexpr unsigned kAll = 0xffffffffu;

template <class T>
uint64_t as_bits(T v) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T v;
  __builtin_memcpy(&v, &bits, sizeof(T));
  return v;
}

ON_HOST_HIDDEN inline uint64_t* hand_over(uint64_t bits, unsigned mask, const char* where) {
  if (mask != kAll) fail("warp operations are written for the whole warp");
  const unsigned thread = machine.current->thread;
  Block& block = *machine.current->block;
  if (block.warps[thread / kLanes].size != kLanes) fail("a warp operation in a block that is no multiple of 32");
  Exchange* exchange = block.exchange[thread / kLanes];
  exchange[machine.current->meetings[1] & 1].value[thread % kLanes] = bits;
  const unsigned turn = meet(1, where);
  return exchange[turn].value;
}
inline unsigned lane() { return machine.current->thread % kLanes; }

ON_HOST_HIDDEN inline uint64_t lane_value(uint64_t bits, unsigned mask, unsigned source, const char* where) {
  return hand_over(bits, mask, where)[source % kLanes];
}

ON_HOST_HIDDEN inline void remember_copy(void* to, const void* from) {
  Fiber& me = *machine.current;
  if (me.n_copies == kMostCopies) fail("more asynchronous copies under way than cuda_on_host keeps");
  me.copies[me.n_copies++] = {to, from, me.copy_group};
}
// The oldest copy of all but the last n groups.
ON_HOST_HIDDEN inline bool next_copy(unsigned n, PendingCopy& copy) {
  Fiber& me = *machine.current;
  if (me.n_copies == 0 || me.copies[0].group + n >= me.copy_group) return false;
  copy = me.copies[0];
  for (unsigned i = 1; i < me.n_copies; ++i) me.copies[i - 1] = me.copies[i];
  --me.n_copies;
  return true;
}

}  // namespace on_host

inline void __syncthreads() { on_host::meet(0, "__syncthreads"); }
inline void __syncwarp() { on_host::hand_over(0, on_host::kAll, "__syncwarp"); }
template <class T>
T __shfl_sync(unsigned mask, T v, int source) {
  return on_host::from_bits<T>(
      on_host::lane_value(on_host::as_bits(v), mask, static_cast<unsigned>(source), "__shfl_sync"));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes) {
  return on_host::from_bits<T>(on_host::lane_value(on_host::as_bits(v), mask,
                                                   on_host::lane() ^ static_cast<unsigned>(lanes), "__shfl_xor_sync"));
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned lanes) {
  const unsigned me = on_host::lane();
  return on_host::from_bits<T>(
      on_host::lane_value(on_host::as_bits(v), mask, me >= lanes ? me - lanes : me, "__shfl_up_sync"));
}
ON_HOST_HIDDEN inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* votes = on_host::hand_over(predicate != 0, mask, "__ballot_sync");
  unsigned result = 0;
  for (int i = 0; i < on_host::kLanes; ++i) result |= static_cast<unsigned>(votes[i]) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <class T>
T atomicAdd(T* p, T v) {
  T before;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  for (T after = before + v; !__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);)
    after = before + v;
  return before;
}
inline int atomicOr(int* p, int v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
inline int atomicMax(int* p, int v) {
  int before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (before < v && !__atomic_compare_exchange_n(p, &before, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}

// Built with -ffp-contract=off: an operator rounds once.
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double rsqrt(double a) { return 1 / std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint_as_float(uint32_t bits) { return on_host::from_bits<float>(bits); }
inline uint32_t __float_as_uint(float f) { return static_cast<uint32_t>(on_host::as_bits(f)); }
inline int64_t __double_as_longlong(double v) { return static_cast<int64_t>(on_host::as_bits(v)); }
inline double __longlong_as_double(int64_t bits) { return on_host::from_bits<double>(static_cast<uint64_t>(bits)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::fabs;
using std::fmaxf;
using std::fminf;
using std::sqrt;

namespace fastvq::cuda {

constexpr unsigned kWarp = on_host::kAll;

// What a test may change, to meet the limits of another card.
inline size_t shared_limit_here = size_t{227} << 10;
inline size_t shared_limit() { return shared_limit_here; }
inline int multiprocessors() { return 3; }

// Of a kernel at a time; 0 is a card that cannot keep blocks together.
inline int64_t resident_here = 5;
template <class Kernel>
int64_t resident_blocks(Kernel, int, size_t) {
  return resident_here;
}

template <class... P, class... A>
int launch_as(bool together, void (*kernel)(P...), int64_t grid, int block, size_t shared, A... args) {
  if (grid <= 0) return 0;
  if (grid > 0x7fffffff || shared > shared_limit() || (together && grid > resident_here))
    on_host::fail("a launch beyond the limits of the card");
  auto call = [&] { kernel(args...); };
  on_host::run_grid(
      static_cast<unsigned>(grid), static_cast<unsigned>(block), shared, together,
      [](void* p) { (*static_cast<decltype(call)*>(p))(); }, &call);
  return 0;
}
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t grid, int block, size_t shared, void*, A... args) {
  return launch_as(false, kernel, grid, block, shared, args...);
}
template <class... P, class... A>
int launch_together(void (*kernel)(P...), int64_t grid, int block, size_t shared, void*, A... args) {
  return launch_as(true, kernel, grid, block, shared, args...);
}

inline void add_release(unsigned* p, unsigned v) { __atomic_fetch_add(p, v, __ATOMIC_RELEASE); }
inline unsigned load_acquire(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void relax() { on_host::relax(); }

inline unsigned char* shared_memory() { return on_host::machine.current->block->shared; }

inline void copy_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    on_host::fail("an asynchronous copy that is not aligned to 16 bytes");
  *static_cast<uint4*>(shared) = {~0u, ~0u, ~0u, ~0u};
  on_host::remember_copy(shared, global);
}
ON_HOST_HIDDEN inline void copy_commit() { ++on_host::machine.current->copy_group; }
template <int N>
void copy_wait() {
  on_host::PendingCopy copy;
  while (on_host::next_copy(N, copy)) *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
}

inline float half_to_float(uint16_t h) { return Element<DType::f16>::get(h); }
inline uint16_t float_to_half(float f) { return Element<DType::f16>::put(f); }

}  // namespace fastvq::cuda

namespace on_host {

inline int exponent_of(double v) { return static_cast<int>(as_bits(v) >> 52 & 0x7ff); }
inline double power(int biased) { return from_bits<double>(static_cast<uint64_t>(biased) << 52); }

// Towards zero, to 24 bits: as cutting the low 29 of a double's 52.
inline float cut(double v) { return static_cast<float>(from_bits<double>(as_bits(v) & ~uint64_t{0x1fffffff})); }

ON_HOST_HIDDEN inline float multiply_add_step(float sum, const float* a, const float* b) {
  double addends[17];
  int top = 0;
  for (int i = 0; i < 16; ++i) addends[i] = static_cast<double>(a[i]) * static_cast<double>(b[i]);
  addends[16] = sum;
  for (double v : addends) top = exponent_of(v) > top ? exponent_of(v) : top;
  if (top == 0) return 0;
  if (top == 0x7ff) return NAN;
  const double up = power(1023 + 1046 - top), down = power(top - 23);  // the largest gets 24 bits before the point
  double total = 0;
  for (double v : addends) total += static_cast<double>(static_cast<int64_t>(v * up));
  return cut(total * down);
}

template <fastvq::DType kType>
ON_HOST_HIDDEN void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned thread = machine.current->thread, row = lane() / 4, pair = lane() % 4;
  Exchange* exchange = machine.current->block->exchange[thread / kLanes];
  Exchange& mine = exchange[machine.current->meetings[1] & 1];
  for (unsigned i = 0; i < 2; ++i)
    for (unsigned k = 0; k < 2; ++k)
      for (unsigned half = 0; half < 2; ++half)
        mine.a[row + 8 * i][2 * pair + 8 * k + half] =
            fastvq::Element<kType>::get(static_cast<uint16_t>(a[2 * k + i] >> (16 * half)));
  for (unsigned k = 0; k < 2; ++k)
    for (unsigned half = 0; half < 2; ++half)
      mine.b[row][2 * pair + 8 * k + half] = fastvq::Element<kType>::get(static_cast<uint16_t>(b[k] >> (16 * half)));
  const Exchange& all = exchange[meet(1, "multiply_add_tile")];
  for (unsigned i = 0; i < 4; ++i) d[i] = multiply_add_step(d[i], all.a[row + 8 * (i / 2)], all.b[2 * pair + i % 2]);
}

}  // namespace on_host

namespace fastvq::cuda {
inline void multiply_add_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_host::multiply_add<fastvq::DType::f16>(d, a, {b0, b1});
}
inline void multiply_add_tile_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_host::multiply_add<fastvq::DType::bf16>(d, a, {b0, b1});
}
}  // namespace fastvq::cuda
