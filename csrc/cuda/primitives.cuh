// The hardware interface of the kernels: launch, shared memory, asynchronous copies, the tensor core, conversions.
// With FASTVQ_ON_HOST the kernels are compiled for the processor, and tests/cuda_on_host implements this interface. So
// kernels may use only this file, __syncthreads, __syncwarp, __shfl_*_sync, __any_sync, __ballot_sync (all over the
// whole warp), atomicAdd, atomicOr and the single-rounding intrinsics __d*_rn. Shared memory is always dynamic, so that
// the host build can check its exact size.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef FASTVQ_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fastvq::cuda {

constexpr unsigned kWarp = 0xffffffffu;  // the mask of every warp-wide operation

// Launches kernel<<<grid, block, shared bytes, stream>>>(args...).
template <class... P, class... A>
int launch(void (*kernel)(P...), int64_t grid, int block, size_t shared, void* stream, A... args) {
  if (grid <= 0) return 0;
  if (grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (shared > (48 << 10)) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(grid), static_cast<unsigned>(block), shared, static_cast<cudaStream_t>(stream)>>>(
      args...);
  return cudaGetLastError();
}

// Blocks of the kernel that the current device runs at a time; 0 where it cannot launch them together.
template <class Kernel>
int64_t resident_blocks(Kernel kernel, int block, size_t shared) {
  int device = 0, together = 0, n = 1, each = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device);
  cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block, shared) != cudaSuccess) return 0;
  return together ? static_cast<int64_t>(n) * each : 0;
}

// Cooperative launch: all blocks are resident at the same time, so they may wait for one another. Returns an error where
// they do not fit.
template <class... P, class... A>
int launch_together(void (*kernel)(P...), int64_t grid, int block, size_t shared, void* stream, A... args) {
  if (grid <= 0) return 0;
  if (grid > 0x7fffffff) return cudaErrorInvalidConfiguration;
  void* arguments[] = {&args...};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(grid)),
                                     dim3(static_cast<unsigned>(block)), arguments, shared,
                                     static_cast<cudaStream_t>(stream));
}

// Bytes of shared memory that one block may ask for on the current device.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 48 << 10;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 48 << 10;
  return static_cast<size_t>(bytes);
}
inline int multiprocessors() {
  int device = 0, n = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  return n;
}

#ifdef __CUDACC__
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastvq_shared[];
  return fastvq_shared;
}

// Release: writes made by this block before the add are visible to any thread that reads the new value with load_acquire.
__device__ __forceinline__ void add_release(unsigned* p, unsigned v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(p)), "r"(v) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
  return v;
}
// Called in a spin loop. A no-op on the GPU; yields to other threads in the host build.
__device__ __forceinline__ void relax() {}

// Copies 16 bytes from global to shared memory without registers; both addresses are aligned to 16. A group of copies has
// arrived after copy_wait<n> and a barrier, where at most n groups were committed after it.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], fp16 or bf16 operands, float sums. Lane l holds rows l/4 and l/4 + 8 of a and d, column
// l/4 of b; columns 2 (l%4) and the next one of d.
__device__ __forceinline__ void multiply_add_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add_tile_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float half_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
__device__ __forceinline__ uint16_t float_to_half(float f) { return __half_as_ushort(__float2half_rn(f)); }
#endif

}  // namespace fastvq::cuda
#endif
