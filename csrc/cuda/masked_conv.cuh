// The tile of the masked convolution's products: sums [128, 64] += a [128, depth] b [depth, 64], 64 bytes of depth a
// step. Blocks have 256 threads; a thread holds 32 sums, and with the sum of column c that of column c + 32, so that a
// gate finds both of its pre-activations.
//
//   16-bit types  tensor core, float sums: warp w has rows 16 w ... 16 w + 15. a and b in shared memory as [row][40],
//                 whose fragments meet no bank twice
//   float         fused multiply-adds: thread (x, y) has rows 8 y ... 8 y + 7 and columns 2x, 2x + 1, and those + 32.
//                 a as [depth][132], b as [depth][64]
#pragma once
#include "../fastvq_cuda.h"
#include "elements.cuh"

namespace fastvq::cuda {

constexpr int kConvThreads = 256, kConvRows = 128, kConvColumns = 64, kConvSums = 32;
constexpr int kChunksPerRow = 4, kChunk = 16;  // bytes

template <DType kType>
struct ConvTile {
  using Element = uint16_t;
  static constexpr int kPerChunk = 8, kDepth = 32, kPitch = kDepth + 8;
  static constexpr int kThreadRows = 2, kThreadColumns = 16;
  static constexpr size_t kBytes = sizeof(Element) * kPitch * (kConvRows + kConvColumns);

  Element* a;
  Element* b;
  __device__ explicit ConvTile(unsigned char* memory)
      : a(reinterpret_cast<Element*>(memory)), b(a + kPitch * kConvRows) {}

  // Chunk `part` of a row of a, of a column of b.
  __device__ void store_a(int row, int part, const uint4& v) {
    *reinterpret_cast<uint4*>(a + row * kPitch + part * kPerChunk) = v;
  }
  __device__ void store_b(int column, int part, const uint4& v) {
    *reinterpret_cast<uint4*>(b + column * kPitch + part * kPerChunk) = v;
  }
  // Chunk q of packed weights, which lie [64][depth].
  __device__ void store_packed(int q, const uint4& v) { store_b(q / kChunksPerRow, q % kChunksPerRow, v); }
  __host__ __device__ static constexpr int packed_at(int depth, int column) { return column * kDepth + depth; }

  __device__ void multiply(float (&sums)[kConvSums]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Element* rows = a + (warp * 16 + lane / 4) * kPitch + 2 * (lane % 4);
    const Element* columns = b + lane / 4 * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      const uint32_t of_a[4] = {pair(rows + k), pair(rows + 8 * kPitch + k), pair(rows + k + 8),
                                pair(rows + 8 * kPitch + k + 8)};
#pragma unroll
      for (int j = 0; j < kConvColumns / 8; ++j) {
        const uint32_t b0 = pair(columns + 8 * j * kPitch + k), b1 = pair(columns + 8 * j * kPitch + k + 8);
        float (&d)[4] = *reinterpret_cast<float (*)[4]>(sums + 4 * j);
        if (kType == DType::bf16)
          multiply_add_tile_bf16(d, of_a, b0, b1);
        else
          multiply_add_tile(d, of_a, b0, b1);
      }
    }
  }
  __device__ static int row(int r) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r; }
  __device__ static int column(int c) { return c / 2 * 8 + 2 * (threadIdx.x % 4) + c % 2; }
  __device__ static constexpr int sum(int r, int c) { return c / 2 * 4 + 2 * r + c % 2; }

 private:
  __device__ static uint32_t pair(const Element* p) { return *reinterpret_cast<const uint32_t*>(p); }
};

template <>
struct ConvTile<DType::f32> {
  using Element = float;
  static constexpr int kPerChunk = 4, kDepth = 16, kPitch = kConvRows + 4;
  static constexpr int kThreadRows = 8, kThreadColumns = 4;
  static constexpr size_t kBytes = sizeof(float) * kDepth * (kPitch + kConvColumns);

  float* a;
  float* b;
  __device__ explicit ConvTile(unsigned char* memory) : a(reinterpret_cast<float*>(memory)), b(a + kPitch * kDepth) {}

  __device__ void store_a(int row, int part, const uint4& v) {
    store_turned(a + part * kPerChunk * kPitch + row, kPitch, v);
  }
  __device__ void store_b(int column, int part, const uint4& v) {
    store_turned(b + part * kPerChunk * kConvColumns + column, kConvColumns, v);
  }
  __device__ void store_packed(int q, const uint4& v) { *reinterpret_cast<uint4*>(b + q * kPerChunk) = v; }
  __host__ __device__ static constexpr int packed_at(int depth, int column) { return depth * kConvColumns + column; }

  __device__ void multiply(float (&sums)[kConvSums]) const {
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const float4 low = *reinterpret_cast<const float4*>(a + k * kPitch + 8 * y);
      const float4 high = *reinterpret_cast<const float4*>(a + k * kPitch + 8 * y + 4);
      const float2 left = *reinterpret_cast<const float2*>(b + k * kConvColumns + 2 * x);
      const float2 right = *reinterpret_cast<const float2*>(b + k * kConvColumns + 32 + 2 * x);
      const float rows[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const float columns[4] = {left.x, left.y, right.x, right.y};
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int r = 0; r < 8; ++r) sums[8 * c + r] = __fmaf_rn(rows[r], columns[c], sums[8 * c + r]);
    }
  }
  __device__ static int row(int r) { return threadIdx.x / 16 * 8 + r; }
  __device__ static int column(int c) { return c / 2 * 32 + 2 * (threadIdx.x % 16) + c % 2; }
  __device__ static constexpr int sum(int r, int c) { return 8 * c + r; }

 private:
  __device__ static void store_turned(float* to, int pitch, const uint4& v) {
    to[0] = __uint_as_float(v.x);
    to[pitch] = __uint_as_float(v.y);
    to[2 * pitch] = __uint_as_float(v.z);
    to[3 * pitch] = __uint_as_float(v.w);
  }
};

// Eight 16-bit or four 32-bit elements as the 16 bytes they make, by a function of their number.
template <class Element, class Get>
__device__ __forceinline__ uint4 make_chunk(const Get& get) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 2) {
      const uint32_t low = get(2 * i), high = get(2 * i + 1);
      words[i] = low | high << 16;
    } else {
      words[i] = __float_as_uint(get(i));
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// One position of every image after another, in raster order.
struct Position {
  int64_t image, y, x;
  __device__ Position(const Image& i, int64_t p) : image(p / (i.height * i.width)) {
    p -= image * (i.height * i.width);
    y = p / i.width;
    x = p - y * i.width;
  }
  __device__ void advance(const Image& i) {
    if (++x < i.width) return;
    x = 0;
    if (++y < i.height) return;
    y = 0;
    ++image;
  }
};
__device__ __forceinline__ int64_t image_offset(const Image& i, const Position& at) {
  return at.image * i.stride_b + at.y * i.stride_h + at.x * i.stride_w;
}
__host__ __device__ inline int64_t positions(const Image& i) { return i.batch * i.height * i.width; }

__device__ __forceinline__ bool is_active(const ConvWeight& w, int64_t tap, int64_t out, int64_t in) {
  if (tap < w.first_tap || tap >= w.first_tap + w.n_taps || (w.used && !w.used[tap])) return false;
  if (w.channel_groups == 1 || tap != w.kh / 2 * w.kw + w.kw / 2) return true;
  const int64_t group_out = out * w.channel_groups / w.c_out, group_in = in * w.channel_groups / w.c_in;
  return w.sees_own_group ? group_in <= group_out : group_in < group_out;
}

}  // namespace fastvq::cuda
