// Rows as the filter reads them: lifted to fp16 in shared memory, with what the bound needs of each.
#pragma once
#include "filter.cuh"

namespace fastvq::cuda {

// What the filter makes of a row.
enum RowStatus : int { searched = 0, absent = 1, masked = 2, not_finite = 3, unresolved = 4 };

// A row's part of the bound, and what its products are multiplied by to be in units of the codes.
struct __align__(16) RowInfo {
  float inverse, rho, norm, own;
};

// One warp lays out one row as row i of sixteen, the operand's steps 512 bytes apart. `load(d, out)` gives elements d ...
// d + 3, zero beyond the last. kPart: dims of a part where operands have two, else 0.
template <int kPart, class Load>
__device__ __forceinline__ RowStatus place_row(const Load& load, bool there, Metric metric, bool fast,
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
  RowStatus state = !there ? absent : odd ? not_finite : head.skip_filter ? unresolved : searched;
  const int typical =
      metric == Metric::euclidean ? typical_exponent(kPart) - head.lift : -300;  // dot, cosine: a row's size is free
  int exponent = largest > 0 ? exponent_of(largest) : -300;
  constexpr int kNear = kPart ? kMaxSplitRowExponent : kMinRowExponent;
  const int least = metric == Metric::euclidean && typical + kNear > -130 ? typical + kNear : -130;
  if (exponent < least) exponent = least;
  const bool far = largest > 3e38f || (metric == Metric::euclidean && exponent > typical + kMaxRowExponent);
  if (state == searched && far) state = unresolved;
  const int up = kRowExponent - exponent;
  constexpr int kDims = kPart ? kPart : 1;
  float kept = 0, lost = 0;
  for (int at = 4 * lane; at < width; at += 128) {
    float v[4] = {0, 0, 0, 0};
    const int part = kPart ? at / kDims : 0, d = kPart ? at % kDims : at;
    if (state == searched && d < dim && part < 3) {
      load(d, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (shifted) v[e] -= mean[d + e];
        v[e] = lifted(v[e], up);
        float high = half_to_float(float_to_half(v[e])), low = 0, held = high;
        if (kPart) held = split(v[e], high, low);
        if (part == 0) {
          kept = fmaf(v[e], v[e], kept);
          lost = fmaf(v[e] - held, v[e] - held, lost);
        }
        if (kPart) v[e] = part == 1 ? low : high;
      }
    }
    if (kPart && state == searched && at == 3 * kPart && metric == Metric::euclidean)
      v[0] = v[1] = v[2] = power_of_two(kBiasExponent + up - head.lift);
    uint32_t* to = reinterpret_cast<uint32_t*>(operand + at / 16 * 512 + row_operand(i, at % 16 / 4));
    const uint2 halves = as_halves(v);
    to[0] = halves.x;
    to[2] = halves.y;
  }
  kept = warp_sum(kept);
  lost = warp_sum(lost);
  constexpr float kSlack = 1 + 0x1p-9f;
  const float inverse = state != searched ? 0 : metric == Metric::euclidean ? power_of_two(head.lift - up) : 1;
  const float size = sqrtf(kept);
  // The subtraction of the mean was rounded; squares may have been lost to underflow; halves in two parts stop at 2^-25.
  const float rho = (sqrtf(lost) + (shifted ? 0x1p-24f * size : 0) + (kPart ? 0x1p-22f : 0x1p-60f)) * kSlack;
  if (lane == 0) {
    const float norm = fast ? 0 : (size * kSlack + rho + kSubnormal) * inverse;
    const bool rounds = metric == Metric::euclidean;
    info = {inverse, fast ? 0 : rho * inverse, norm,
            rounds ? norm * norm * (static_cast<float>(dim + 3) * 0x1p-53f * kSlack) : 0};
  }
  return state;
}

}  // namespace fastvq::cuda
