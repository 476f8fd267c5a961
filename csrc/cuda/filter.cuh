// The filter of the nearest-code lookup: what the packed codebook holds, and the bound on the error of a score.
//
// A score is the tensor core's product of fp16 operands and a bias:  v_k = inverse (x^ . c^_k) + b_k,  which stands for
// t_k = x'.c'_k - |c'_k|^2 / 2 (euclidean; d_k = |x'|^2 - 2 t_k) or t_k = x'.c'_k (dot, cosine; d_k = -t_k). Codes are
// c' = (c - m) 2^lift (cosine: c/|c| 2^lift), one power of two for the whole codebook; rows x' = x - m (dot, cosine: x),
// each times its own power of two, so that neither overflows fp16. For one code k and one row:
//
//   |v_k - t_k| <= rho_x |c^_k| + |x'| rho_k             operands rounded to fp16: measured, not assumed
//                + (gamma + u) |x^||c^_k|                the sums, and the multiply-add that adds the bias
//                + 2 u |b_k|                             that multiply-add again; the bias rounded
//                + the definition's own rounding in double: euclidean (D+3) 2^-53 (|x'|^2 + |c'|^2),
//                  dot (D+3) 2^-53 |x||c|, cosine (2D+8) 2^-53 |x|
//   gamma = (1.25 D16 + 16) 2^-23: a step aligns 17 addends to the largest and cuts them; u = 2^-24
//
// A step aligns a product by the exponents of its operands, and that of a subnormal half is -14. So gamma holds for the
// sum of max(|x^_d|, 2^-14) max(|c^_kd|, 2^-14), which is at most (|x^| + e)(|c^_k| + e) with e = 2^-14 sqrt(D16): both
// norms are raised by kSubnormal.
//
// Collected, with room for rounding of these numbers themselves and of v +- bound, as
//   bound(row, k) = rho reach_k + norm slope_k + offset_k + own
// A code whose operand does not fit fp16 gets a zero operand: rho_k is then |c'_k|, and the bound is Cauchy's. So one
// huge code costs the others nothing. A tile of 64 codes also has the largest reach, slope and offset of its codes.
//
// Up to 8 dims leave most of a step's sixteen free. There both sides are split in two fp16 numbers, v = hi + lo + rest, and
// the bias goes in as three, each against w, a power of two that gives them the row's lift. With P = 4 or 8 dims a part
// this is one step of 16 or two:
//
//   row  [x hi | x lo | x hi | w w w 0 ...]     code  [c hi | c hi | c lo | b1 b2 b3 0 ...]     v_k = inverse (row . code)
//
// Then rho_x and rho_k are measured against hi + lo, some 2^-22 of the operands, and
//
//   |v_k - t_k| <= rho_x |c^_k| + |x'| rho_k
//                + |x lo||c lo|                          the one product that is left out. A half's rounding is at most
//                                                       2^-11 of it or 2^-25: |x lo| <= 2^-11 |x'| + 2^-25 sqrt 8
//                + gamma (|x hi||c hi| + |x lo||c hi| + |x hi||c lo|)     <= gamma (1 + 2^-9) |x'| (|c hi| + |c lo|)
//                + gamma w (|b1| + |b2| + |b3|) inverse + |b1 + b2 + b3 + |c'|^2 / 2|     what the pieces lose: measured
//                + the definition's own rounding
//
// so that reach is |c hi| + |c lo|, and the 2^-25 sqrt 8 are part of rho. A code whose bias does not fit three halves, or
// that cannot win, has zeros in these places; its bias is added after the product, and its tile is flagged
// kSeparateBias. In all other tiles the product is the complete score, and the epilogue is a maximum alone.
//
// Operands lie in memory as the lanes of m16n8k16 take them, so that a warp's load is 512 consecutive bytes. The order
// of the sixteen dims of a step is free as long as both sides agree: lane l holds dims 4 (l%4) ... 4 (l%4) + 3.
//   codes: [tile of 64][step of 16 dims][pair of eights: 4][lane: 32][2 eights x 4 dims] halves, 2 KiB ("slab") a step
//   rows:  [16 rows][step][lane][2 pairs of dims][2 eights] pairs of halves, 512 bytes a step
#pragma once
#include "../fastvq_types.h"
#include "elements.cuh"

namespace fastvq::cuda {

constexpr int kTileCodes = 64;
constexpr int kSlabBytes = 2048;
constexpr float kUnreachable = -0x1p120f;  // bias of a code that cannot win
constexpr float kLowestScore = -0x1p90f;  // below the score of any winner: see largest_code in pack.cu
constexpr int kRowExponent = 14;  // rows are lifted so that their largest element has this exponent
// Rows further than this above the codes (in powers of two) are left to the exhaustive scan, euclidean only.
constexpr int kMaxRowExponent = 36, kMinRowExponent = -60;
// Operands of two parts have bits to spare: codes and rows are lifted less, so that bias and w fit fp16 for all rows.
constexpr int kSplitDims = 8, kMaxSplitRowExponent = 7;
constexpr int kBiasExponent = 12;  // b1 + b2 + b3 = bias 2^-this
constexpr int64_t kMaxFilterDim = 4096;
constexpr float kSubnormal = 0x1p-7f;  // 2 x 2^-14 sqrt(kMaxFilterDim); twice, as operands may have two parts

// Written by the survey of a head's codes.
struct HeadInfo {
  int lift;  // log2 of what codes are multiplied by
  int centred;  // whether a mean was subtracted
  int skip_filter;  // no code could be sampled: every row goes to the exhaustive scan
  float mean_norm;  // |m| 2^lift, rounded up
};

// A code's part of the bound.
struct __align__(16) CodeBound {
  float reach, slope, offset, unused;
};

struct TileInfo {
  float reach, slope, offset;  // the largest of the tile's codes
  int flags;
};
constexpr int kIrregular = 1;  // error bounds vary too much inside this tile: test each code with its own bound
constexpr int kSeparateBias =
    2;  // split operands: the bias of some code does not fit the operand columns and is added separately

// The packed codebook of all heads: pointers into the workspace.
struct PackedCodebook {
  int64_t n_heads, n_codes, n_tiles;
  int dim, n_steps;  // steps of 16 dims, a multiple of `unit`
  int unit;  // steps multiplied between two checks for the end of a tile: 1, 2 or 4
  int part;  // dims of a part where operands have two, 4 or 8; else 0
  HeadInfo* heads;  // [H]
  float* means;  // [H, n_steps * 16]
  unsigned char* slabs;  // [H, n_tiles, n_steps] slabs
  float* bias;  // [H, n_tiles * 64]
  CodeBound* bounds;  // [H, n_tiles * 64]
  TileInfo* tiles;  // [H, n_tiles]
};

// base null: the number of bytes alone.
size_t packed_layout(const Codes& codes, unsigned char* base, PackedCodebook* packed);
// Whether the filter can serve these tensors; otherwise every row goes to the exhaustive scan.
bool filter_serves(const Rows& x, const Codes& codes);
int pack_codes(const Codes& codes, Metric metric, bool fast, const PackedCodebook& packed, void* stream);

__device__ __forceinline__ float power_of_two(int exponent) {  // -126 ... 127
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}
// v 2^exponent for any exponent that a lift may have; exact unless it underflows.
__device__ __forceinline__ float lifted(float v, int exponent) {
  const int half = exponent / 2;
  return v * power_of_two(half) * power_of_two(exponent - half);
}
__device__ __forceinline__ double lifted(double v, int exponent) {
  return v * static_cast<double>(power_of_two(exponent / 2)) *
         static_cast<double>(power_of_two(exponent - exponent / 2));
}
// The exponent that the typical code is lifted to: the middle of fp16's range.
__device__ __forceinline__ int typical_exponent(int part) { return part ? 4 : 8; }
// floor(log2 v) of a positive float, also of a subnormal one.
__device__ __forceinline__ int exponent_of(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (bits < 0x00800000u) return static_cast<int>(__float_as_uint(v * 0x1p64f) >> 23) - 127 - 64;
  return static_cast<int>(bits >> 23) - 127;
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kWarp, v, lanes);
  return v;
}
__device__ __forceinline__ double warp_sum(double v) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v += __shfl_xor_sync(kWarp, v, lanes);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int lanes = 16; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(kWarp, v, lanes));
  return v;
}

// Four consecutive dims of a row or a code, zero beyond the last.
__device__ __forceinline__ void load_four(const void* data, DType dtype, int64_t at, int64_t stride, int d, int dim,
                                          float (&out)[4]) {
  if (stride == 1 && d + 4 <= dim) {  // one load, where the address lets it
    if (dtype == DType::f32) {
      const float* from = static_cast<const float*>(data) + at + d;
      if (reinterpret_cast<uintptr_t>(from) % sizeof(float4) == 0) {
        const float4 v = *reinterpret_cast<const float4*>(from);
        out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
        return;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = d + i < dim ? load_float(data, dtype, at + (d + i) * stride) : 0;
}

// v rounded to fp16, and what that leaves, rounded. Returns their sum.
__device__ __forceinline__ float split(float v, float& high, float& low) {
  high = half_to_float(float_to_half(v));
  low = half_to_float(float_to_half(v - high));
  return high + low;
}

__device__ __forceinline__ uint2 as_halves(const float (&v)[4]) {
  const uint32_t a = float_to_half(v[0]), b = float_to_half(v[1]), c = float_to_half(v[2]), d = float_to_half(v[3]);
  return {a | b << 16, c | d << 16};
}

// Bytes from the start of a step to dims 4t ... 4t+3 of code i of sixteen; to dims 4t, 4t+1 of row i, two dims more being
// 8 bytes further.
__device__ __forceinline__ int code_operand(int i, int t) { return ((i % 8) * 4 + t) * 16 + i / 8 * 8; }
__device__ __forceinline__ int row_operand(int i, int t) { return ((i % 8) * 4 + t) * 16 + i / 8 * 4; }

}  // namespace fastvq::cuda
