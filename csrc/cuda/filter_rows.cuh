// Rows as the filter reads them: lifted to fp16 in shared memory, with what the bound needs of each.
#pragma once
#include "filter.cuh"

namespace fastvq::cuda {

// What the filter makes of a row.
enum RowState : int { searched = 0, absent = 1, masked = 2, not_finite = 3, unresolved = 4 };

// A row's part of the bound, and what its products are multiplied by to be in units of the codes.
struct __align__(16) RowInfo {
  float inverse, rho, norm, own;
};

// One warp lays out one row as row i of sixteen, the operand's steps 512 bytes apart. `load(d, out)` gives elements d ...
// d + 3, zero beyond the last.
template <class Load>
__device__ __forceinline__ RowState place_row(const Load& load, bool there, Metric metric, bool fast,
                                              const HeadInfo& head, const float* mean, int dim, int width, int i,
                                              unsigned char* operand, RowInfo& info) {
  const int lane = threadIdx.x % 32;
  const bool shifted = metric == Metric::euclidean && head.centred;
  float largest = 0;
  bool odd = false;
  if (there)
    for (int d = 4 * lane; d < dim; d += 128) {
      float v[4];
      load(d, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        odd |= !(v[e] - v[e] == 0);
        if (shifted) v[e] -= mean[d + e];
        largest = fmaxf(largest, fabs(v[e]));
      }
    }
  largest = warp_max(largest);
  odd = __any_sync(kWarp, odd);
  RowState state = !there ? absent : odd ? not_finite : head.only_exact ? unresolved : searched;
  const int typical = metric == Metric::euclidean ? 8 - head.lift : -300;  // dot, cosine: a row's size is free
  int exponent = largest > 0 ? exponent_of(largest) : -300;
  const int least = metric == Metric::euclidean && typical + kNearRow > -130 ? typical + kNearRow : -130;
  if (exponent < least) exponent = least;
  const bool far = largest > 3e38f || (metric == Metric::euclidean && exponent > typical + kFarRow);
  if (state == searched && far) state = unresolved;
  const int up = kRowExponent - exponent;
  float kept = 0, lost = 0;
  for (int d = 4 * lane; d < width; d += 128) {
    float v[4] = {0, 0, 0, 0};
    if (state == searched && d < dim) {
      load(d, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (shifted) v[e] -= mean[d + e];
        v[e] = lifted(v[e], up);
        const float held = half_to_float(float_to_half(v[e]));
        kept = fmaf(v[e], v[e], kept);
        lost = fmaf(v[e] - held, v[e] - held, lost);
      }
    }
    *reinterpret_cast<uint2*>(operand + d / 16 * 512 + operand_offset(i, d % 16 / 4)) = as_halves(v);
  }
  kept = warp_sum(kept);
  lost = warp_sum(lost);
  constexpr float kSlack = 1 + 0x1p-9f;
  const float inverse = state != searched ? 0 : metric == Metric::euclidean ? power_of_two(head.lift - up) : 1;
  const float size = sqrtf(kept);
  // The subtraction of the mean was rounded; squares may have been lost to underflow.
  const float rho = (sqrtf(lost) + (shifted ? 0x1p-24f * size : 0) + 0x1p-60f) * kSlack;
  if (lane == 0) {
    const float norm = fast ? 0 : (size * kSlack + rho) * inverse;
    const bool rounds = metric == Metric::euclidean;
    info = {inverse, fast ? 0 : rho * inverse, norm,
            rounds ? norm * norm * (static_cast<float>(dim + 3) * 0x1p-53f * kSlack) : 0};
  }
  return state;
}

}  // namespace fastvq::cuda
