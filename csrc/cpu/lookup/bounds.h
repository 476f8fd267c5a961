// Packing the codebook for the filter, with the coefficients of its error bound.
//
// u = 2^-24. Codes are c' = c - m (cosine: c / |c|), rows x' = x - m (dot, cosine: x), held as float32 c^ and x^:
//   |c' - c^| <= u |c^| + sqrt(D) 2^-150, the same for x'   one rounding each; double's own rounding is in the slack
//   chain of D multiply-adds from the bias b:  <= (D+2) u (|x^||c^| + |b|), fused or not, D <= 2^14
//   bias, -|c^|^2/2 rounded once, stands for -|c'|^2/2:  <= 3 u |b| + sqrt(D) 2^-149 |c^|
//   comparing score +- bound in float32:  <= 2 u (|x^||c^| + |b|)
//   the definition's own rounding in double:  euclidean (D+3) 2^-53 (|x'|^2 + |c'|^2), dot D 2^-53 |x||c|,
//   cosine (2D+8) 2^-53 |x|
//   underflow:  (2D+10) 2^-149, as gradual underflow is on
// Collected: bound(row, code) = |x'| slope + offset + own (+ lost reach), each times 1 + 2^-10, with
//   slope, offset  of the code          own    of the row: row_part |x'|^2
//   reach          of the code: |c^|    lost   of the row: |x' - x^|, where the filter rounds its operands further
#pragma once
#include <cmath>
#include <cstdint>

#include "lookup.h"
#include "../simd/vectors.h"

namespace fastvq {
namespace {

constexpr double kSlack = 1 + 0x1p-10;
constexpr double kLargeCode = 0x1p60;  // euclidean: see finish in lookup/packed_codebook.h

// The mean of up to kSampledCodes codes, evenly spaced, is near enough to the mean of all.
constexpr int64_t kSampledCodes = 128;

template <class E>
void centre_codes(const Codes& codes, int64_t h, double* sums, PackedCodes& packed) {
  const int64_t D = packed.dim;
  for (int64_t d = 0; d < D; ++d) sums[d] = 0;
  double squares = 0;
  int64_t n = 0;
  const int64_t stride = (codes.n_codes + kSampledCodes - 1) / kSampledCodes;
  for (int64_t k = 0; k < codes.n_codes; k += stride) {
    const auto* c = contiguous(code_at<E>(codes, h, k), codes.stride_d, D, sums + D);
    D8 lanes = {};
    double rest = 0;
    int64_t d = 0;
    for (; d + 8 <= D; d += 8) {
      const D8 v = widen(load(E{}, c + d));
      lanes += v * v;
    }
    for (; d < D; ++d) rest += static_cast<double>(E::get(c[d])) * static_cast<double>(E::get(c[d]));
    const double square = sum_lanes(lanes) + rest;
    if (!(square <= 0x1p200)) continue;
    squares += square;
    ++n;
    d = 0;
    for (; d + 8 <= D; d += 8) store_as(sums + d, load_as<D8>(sums + d) + widen(load(E{}, c + d)));
    for (; d < D; ++d) sums[d] += E::get(c[d]);
  }
  double square = 0;
  for (int64_t d = 0; d < D; ++d) {
    packed.mean[d] = n ? static_cast<float>(sums[d] / static_cast<double>(n)) : 0;
    square += static_cast<double>(packed.mean[d]) * static_cast<double>(packed.mean[d]);
  }
  // sum |c - m|^2 = sum |c|^2 - n |m|^2: subtract the mean where that at least halves it. Any m is right.
  packed.centred = square < 0x1p120 && static_cast<double>(n) * square >= 0.5 * squares && square > 0;
  packed.mean_norm = packed.centred ? std::sqrt(square) : 0;
  if (!packed.centred)
    for (int64_t d = 0; d < D; ++d) packed.mean[d] = 0;
}

// Writes one code as the filter holds it into out [D]. Returns the sum of squares of out.
template <class E>
double place_code(const typename E::Stored* c, int64_t D, const float* mean, double scale, float* out) {
  D8 lanes = {};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8) {
    const auto v = load(E{}, c + d);
    F8 placed;
    if (scale != 0)
      placed = narrow(widen(v) * scale);
    else if constexpr (sizeof(typename E::Real) == 4)
      placed = v - load_as<F8>(mean + d);
    else
      placed = narrow(v - widen(load_as<F8>(mean + d)));
    store_as(out + d, placed);
    lanes += widen(placed) * widen(placed);
  }
  double sum = sum_lanes(lanes);
  for (; d < D; ++d) {
    const auto v = E::get(c[d]);
    out[d] = static_cast<float>(scale != 0 ? v * scale : v - static_cast<typename E::Real>(mean[d]));
    sum += static_cast<double>(out[d]) * static_cast<double>(out[d]);
  }
  return sum;
}

template <class E>
double sum_of_squares(const typename E::Stored* c, int64_t D) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double v = E::get(c[d]);
    sum += v * v;
  }
  return sum;
}

inline float rounded_up(double v) { return static_cast<float>(v * kSlack); }

// Layout says how a filter holds its operands:
//   chain(D)        most multiply-adds in the sum of a product
//   underflow(D)    most that flushing small numbers to zero takes from a score
//   put(packed, panel, j, code, norm, eight)   writes code j of a panel
//     code   float32 [D]: row j % 8 of eight
//     norm   of the code
//     eight  [8][D]; put may have overwritten the rows before
//     returns slope, the norm of the code's rounding error, which is added to the slope of its bound, and
//             reach, at least the norm of the code as held; 0 where the filter does not round rows
struct Placed {
  double slope, reach;
};

template <class E, class Layout>
LookupKernels::Found pack_codes(const Codes& codes, int64_t h, Metric metric, int64_t first, int64_t last,
                                double* workspace, PackedCodes& packed) {
  const int64_t D = packed.dim, W = packed.width;
  const double n = static_cast<double>(D), root = std::sqrt(n) * 0x1p-148, u = 0x1p-24;
  const double chain = Layout::chain(D), underflow = Layout::underflow(D);
  float* eight = reinterpret_cast<float*>(workspace + D);
  LookupKernels::Found found{false, false, false, 0, HUGE_VAL};
  for (int64_t p = first; p < last; ++p) {
    float panel_slope = 0, panel_offset = 0, panel_reach = 0;
    for (int64_t j = 0; j < W; ++j) {
      const int64_t k = p * W + j;
      float* out = eight + (j & 7) * D;
      bool usable = false;
      double norm = 0;
      if (k < packed.n_codes) {
        const auto* c = contiguous(code_at<E>(codes, h, k), codes.stride_d, D, workspace);
        double scale = 0;
        bool regular = true;
        if (metric == Metric::cosine) {
          const double square = sum_of_squares<E>(c, D);
          scale = square > 0 ? 1 / std::sqrt(square) : 1;
          usable = square > 0;
          regular = square == 0 || (square >= 0x1p-900 && square <= 0x1p900);
        } else {
          usable = true;
        }
        norm = std::sqrt(place_code<E>(c, D, packed.mean, scale, out));
        if (metric == Metric::euclidean ? !(norm <= kLargeCode) : !(norm <= 0x1p120 && regular)) {
          usable = false;
          if (all_finite<E>(c, 1, D)) (metric == Metric::euclidean ? found.excluded_large : found.irregular) = true;
        }
      }
      if (!usable)
        for (int64_t d = 0; d < D; ++d) out[d] = 0;
      const Placed placed = Layout::put(packed, p, static_cast<int>(j), out, usable ? norm : 0, eight);
      float bias = kUnreachable, slope = 0, offset = 0, reach = 0;
      if (usable) {
        found.usable = true;
        found.largest = norm > found.largest ? norm : found.largest;
        found.smallest = norm < found.smallest ? norm : found.smallest;
        bias = metric == Metric::euclidean ? static_cast<float>(-0.5 * norm * norm) : 0.0f;
        const double own = metric == Metric::euclidean ? 0
                           : metric == Metric::dot     ? (n + 3) * 0x1p-53 * (norm + packed.mean_norm)
                                                       : (2 * n + 8) * 0x1p-53;
        const double own_square = metric == Metric::euclidean ? (n + 3) * 0x1p-53 * norm * norm : 0;
        slope = rounded_up((chain + 4) * u * norm + own + root + placed.slope);
        offset = rounded_up((chain + 6) * u * -static_cast<double>(bias) + own_square + root * norm + underflow);
        reach = rounded_up(placed.reach);
        panel_slope = slope > panel_slope ? slope : panel_slope;
        panel_offset = offset > panel_offset ? offset : panel_offset;
        panel_reach = reach > panel_reach ? reach : panel_reach;
      }
      packed.bias[k] = bias;
      packed.slope[k] = slope;
      packed.offset[k] = offset;
      if (packed.reach) packed.reach[k] = reach;
    }
    packed.panel_slope[p] = panel_slope;
    packed.panel_offset[p] = panel_offset;
    if (packed.reach) packed.panel_reach[p] = panel_reach;
  }
  return found;
}

}  // namespace
}  // namespace fastvq
