// Packing the codebook for the filter: see filter.cuh.
//
//   codes [H, K, D] -> PackedCodebook
//
// 1. survey: one block a head; of at most 128 codes, evenly spread, the mean and the typical size. Any mean and any
//    power of two are right; these make the bound small.
// 2. pack: one block a tile of 64 codes, one warp a code, 4 dims a lane.
#include "filter.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kSamples = 128, kSurveyThreads = 256, kSurveyWarps = kSurveyThreads / 32;
constexpr int kPackThreads = 128, kPackWarps = kPackThreads / 32;
constexpr double kSlack = 1 + 0x1p-9;

// A code of norm above this is left out under the euclidean metric. It cannot be nearest to a row of norm below 2^52, which
// every row of the filter is, as there is a code of norm below 2^18: one was sampled whose size is at most the typical one.
constexpr double kLargestCode = 0x1p60;

// Of the square of a length, up to rounding and underflow: kSlack and the addend are far more.
__device__ __forceinline__ double root(double square) {
  return static_cast<double>(sqrtf(static_cast<float>(square))) + 0x1p-70;
}

struct Survey {
  double squares[kSamples];  // -1 for a code that does not count
  float largest[kSamples];
  double part[kSurveyWarps];
  int centred;
};

// Sizes of the sampled codes, less the mean if there is one.
__device__ void measure_samples(const Codes& codes, int64_t h, int64_t stride, int n, const float* mean, Survey& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = warp; i < n; i += kSurveyWarps) {
    const int64_t at = code_offset(codes, h, i * stride);
    double square = 0;
    float largest = 0;
    bool finite = true;
    for (int64_t d = lane; d < codes.dim; d += 32) {
      const double v =
          load_double(codes.data, codes.dtype, at + d * codes.stride_d) - (mean ? static_cast<double>(mean[d]) : 0);
      finite &= is_finite(v);
      square += v * v;
      largest = fmaxf(largest, static_cast<float>(fabs(v)));
    }
    square = warp_sum(square);
    largest = warp_max(largest);
    finite = __ballot_sync(kWarp, !finite) == 0;
    if (lane == 0) {
      s.squares[i] = finite ? square : -1;
      s.largest[i] = largest;
    }
  }
}

__global__ void __launch_bounds__(kSurveyThreads, 2) survey_kernel(Codes codes, Metric metric, PackedCodebook p) {
  Survey& s = *reinterpret_cast<Survey*>(shared_memory());
  const int tid = threadIdx.x;
  const int64_t h = blockIdx.x, D = codes.dim, stride = (codes.n_codes + kSamples - 1) / kSamples;
  const int n = static_cast<int>((codes.n_codes + stride - 1) / stride), width = p.n_steps * 16;
  float* mean = p.means + h * width;
  measure_samples(codes, h, stride, n, nullptr, s);
  __syncthreads();
  int counted = 0;
  double squares = 0;
  for (int i = 0; i < n; ++i)
    if (s.squares[i] >= 0) {
      ++counted;
      squares += s.squares[i];
    }
  const double share = static_cast<double>(1.0f / static_cast<float>(counted > 0 ? counted : 1));
  double square = 0;
  for (int64_t d = tid; d < width; d += kSurveyThreads) {
    double sum = 0;
    if (d < D && metric != Metric::cosine)
      for (int i = 0; i < n; ++i)
        if (s.squares[i] >= 0)
          sum += load_double(codes.data, codes.dtype, code_offset(codes, h, i * stride) + d * codes.stride_d);
    const float m = static_cast<float>(sum * share);
    mean[d] = m;
    square += static_cast<double>(m) * static_cast<double>(m);
  }
  square = warp_sum(square);
  if (tid % 32 == 0) s.part[tid / 32] = square;
  __syncthreads();
  square = 0;
  for (int w = 0; w < kSurveyWarps; ++w) square += s.part[w];
  // sum |c - m|^2 = sum |c|^2 - n |m|^2: subtract the mean where that at least halves it. Two narrow types fit the
  // filter's as they are, and less a mean they might not.
  const bool narrow = codes.dtype == DType::f16 || codes.dtype == DType::bf16;
  const bool centred = square > 0 && counted * square >= (narrow ? 0.98 : 0.5) * squares;
  if (!centred)
    for (int64_t d = tid; d < width; d += kSurveyThreads) mean[d] = 0;
  __syncthreads();
  if (centred) measure_samples(codes, h, stride, n, mean, s);
  __syncthreads();
  if (tid == 0) {
    int sum = 0, some = 0, top = -200;
    for (int i = 0; i < n; ++i)
      if (s.squares[i] >= 0 && s.largest[i] > 0) {
        const int e = exponent_of(s.largest[i]);
        sum += e;
        top = e > top ? e : top;
        ++some;
      }
    // Euclidean: the typical code to 2^typical, room above and below. Dot: the largest wins, so it is the measure.
    const int typical = typical_exponent(p.part);
    int lift = some == 0                     ? 0
               : metric == Metric::euclidean ? typical - (sum >= 0 ? sum / some : -((some - 1 - sum) / some))
                                             : 12 - top;
    if (metric == Metric::cosine) lift = 14;
    p.heads[h] = {lift, centred, counted == 0, centred ? static_cast<float>(lifted(root(square), lift) * kSlack) : 0};
  }
}

struct Tile {
  float bias[kTileCodes], reach[kTileCodes], slope[kTileCodes], offset[kTileCodes];
};

// The bias as three halves. Returns their sum, which a double holds.
__device__ __forceinline__ double split_bias(double v, float (&out)[4]) {
  double held = 0;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    out[i] = half_to_float(float_to_half(static_cast<float>(v - held)));
    held += static_cast<double>(out[i]);
  }
  return held;
}

// Code j of a tile as the filter holds it, and its part of the bound.
__device__ void pack_code(const Codes& codes, int64_t h, int64_t k, Metric metric, bool fast, const PackedCodebook& p,
                          int j, unsigned char* slabs, Tile& tile) {
  const int lane = threadIdx.x % 32, dim = p.dim, width = p.n_steps * 16;
  const int lift = p.heads[h].lift;
  const float mean_norm = p.heads[h].mean_norm;
  const float* mean = p.means + h * width;
  const int64_t at = code_offset(codes, h, k);
  const bool there = k < codes.n_codes;
  double own = 0;
  bool finite = true;
  if (there && metric == Metric::cosine)
    for (int d = lane; d < dim; d += 32) {
      const double v = load_double(codes.data, codes.dtype, at + d * codes.stride_d);
      own += v * v;
    }
  own = warp_sum(own);
  const double factor = metric == Metric::cosine && own > 0 ? rsqrt(own) : 1;

  double square = 0;
  float largest = 0;
  if (there)
    for (int d = lane; d < dim; d += 32) {
      const double c = load_double(codes.data, codes.dtype, at + d * codes.stride_d);
      const double v = lifted((c - static_cast<double>(mean[d])) * factor, lift);
      finite &= is_finite(c);
      square += v * v;
      largest = fmaxf(largest, static_cast<float>(fabs(v)));
    }
  square = warp_sum(square);
  largest = warp_max(largest);
  finite = __ballot_sync(kWarp, !finite) == 0;
  const bool candidate = there && finite && (metric != Metric::cosine || own > 0);
  const bool usable = candidate && square <= kLargestCode * kLargestCode;
  // Under the dot product such a code may well win.
  if (candidate && !usable && metric == Metric::dot && lane == 0) atomicOr(&p.heads[h].skip_filter, 1);
  const double bias = metric == Metric::euclidean ? -0.5 * square : 0, piece = bias * (1.0 / (1 << kBiasExponent));
  const bool fits = usable && largest < 65504 && (!p.part || piece > -65504);

  double kept_square = 0, low_square = 0, lost_square = 0;
  for (int at_half = 4 * lane; at_half < width; at_half += 128) {
    const int part = p.part ? at_half / p.part : 0, d = p.part ? at_half % p.part : at_half;
    float four[4], out[4];
    if (fits && part < 3) load_four(codes.data, codes.dtype, at, codes.stride_d, d, dim, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = 0;
      if (!fits || part == 3 || d + i >= dim) continue;
      const double v = lifted((static_cast<double>(four[i]) - static_cast<double>(mean[d + i])) * factor, lift);
      out[i] = static_cast<float>(v);
      float high = half_to_float(float_to_half(out[i])), low = 0;
      if (p.part) split(out[i], high, low);
      if (part == 0) {
        const double left = v - static_cast<double>(high) - static_cast<double>(low);
        kept_square += static_cast<double>(high) * static_cast<double>(high);
        low_square += static_cast<double>(low) * static_cast<double>(low);
        lost_square += left * left;
      }
      if (p.part) out[i] = part == 2 ? low : high;
    }
    if (p.part && at_half == 3 * p.part && fits) {
      out[3] = 0;
      split_bias(piece, out);
    }
    unsigned char* to =
        slabs + static_cast<int64_t>(at_half / 16) * kSlabBytes + j / 16 * 512 + code_operand(j % 16, at_half % 16 / 4);
    *reinterpret_cast<uint2*>(to) = as_halves(out);
  }
  const double kept = root(warp_sum(kept_square)), norm = root(square);
  const double low = p.part ? root(warp_sum(low_square)) : 0;
  double lost = root(warp_sum(lost_square)) + 0x1p-50 * norm;  // v itself was rounded twice or so
  if (!fits) lost = norm;
  if (lane != 0) return;
  const double u = 0x1p-24, n = dim, gamma = (1.25 * width + 16) * 0x1p-23;
  const double rounding = metric == Metric::euclidean ? 0
                          : metric == Metric::dot     ? (n + 3) * 0x1p-53 * (norm + static_cast<double>(mean_norm))
                                                      : (2 * n + 8) * 0x1p-53 * 0x1p14;
  const double rounding_square = metric == Metric::euclidean ? (n + 3) * 0x1p-53 * square : 0;
  double bias_error = 8 * u * -bias;
  if (p.part && fits) {
    float b[4];
    const double held = split_bias(piece, b), scale = 1 << kBiasExponent;
    const double size =
        fabs(static_cast<double>(b[0])) + fabs(static_cast<double>(b[1])) + fabs(static_cast<double>(b[2]));
    bias_error += scale * (gamma * (size + 3 * 0x1p-14) + fabs(piece - held));
  }
  const bool bounded = usable && !fast;
  tile.bias[j] = !usable ? kUnreachable : p.part && fits ? 0 : static_cast<float>(bias);
  tile.reach[j] = bounded ? static_cast<float>(kSlack * (kept + low)) : 0;
  tile.slope[j] =
      bounded ? static_cast<float>(kSlack * (lost + (gamma + 4 * u) * (kept + low + static_cast<double>(kSubnormal)) +
                                             0x1p-10 * low + rounding))
              : 0;
  tile.offset[j] = bounded ? static_cast<float>(kSlack * (bias_error + rounding_square) + 0x1p-100) : 0;
}

__global__ void __launch_bounds__(kPackThreads, 4)
    pack_kernel(Codes codes, Metric metric, bool fast, PackedCodebook p) {
  Tile& tile = *reinterpret_cast<Tile*>(shared_memory());
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int64_t h = blockIdx.x / p.n_tiles, index = blockIdx.x;  // of the tile, over all heads
  const int64_t first = blockIdx.x % p.n_tiles * kTileCodes;
  for (int j = warp; j < kTileCodes; j += kPackWarps)
    pack_code(codes, h, first + j, metric, fast, p, j, p.slabs + index * p.n_steps * kSlabBytes, tile);
  __syncthreads();
  for (int j = tid; j < kTileCodes; j += kPackThreads) {
    p.bias[index * kTileCodes + j] = tile.bias[j];
    p.bounds[index * kTileCodes + j] = {tile.reach[j], tile.slope[j], tile.offset[j], 0};
  }
  if (warp != 0) return;
  float top[3] = {0, 0, 0}, low[3] = {HUGE_VALF, HUGE_VALF, HUGE_VALF};
  for (int j = lane; j < kTileCodes; j += 32) {
    if (tile.bias[j] == kUnreachable) continue;
    const float v[3] = {tile.reach[j], tile.slope[j], tile.offset[j]};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      top[i] = fmaxf(top[i], v[i]);
      low[i] = fminf(low[i], v[i]);
    }
  }
  bool irregular = false, separate_bias = false;
  for (int j = lane; j < kTileCodes; j += 32) separate_bias |= tile.bias[j] != 0;
  separate_bias = p.part && __any_sync(kWarp, separate_bias);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    top[i] = warp_max(top[i]);
    low[i] = -warp_max(-low[i]);
    irregular |= top[i] > 16 * low[i];
  }
  if (lane == 0) p.tiles[index] = {top[0], top[1], top[2], irregular * kIrregular | separate_bias * kSeparateBias};
}

}  // namespace

size_t packed_layout(const Codes& codes, unsigned char* base, PackedCodebook* packed) {
  PackedCodebook p{};
  p.n_heads = codes.n_heads;
  p.n_codes = codes.n_codes;
  p.dim = static_cast<int>(codes.dim);
  p.part = p.dim > kSplitDims ? 0 : p.dim > kSplitDims / 2 ? kSplitDims : kSplitDims / 2;
  const int steps = p.part ? p.part / 4 : (p.dim + 15) / 16;  // 3 part + 3 halves
  p.unit = steps <= 2 ? steps : 4;
  p.n_steps = (steps + p.unit - 1) / p.unit * p.unit;
  p.n_tiles = (codes.n_codes + kTileCodes - 1) / kTileCodes;
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    unsigned char* at = base ? base + used : nullptr;
    used += (bytes + 255) / 256 * 256;
    return at;
  };
  const size_t H = static_cast<size_t>(p.n_heads), tiles = H * static_cast<size_t>(p.n_tiles);
  p.slabs = take(tiles * static_cast<size_t>(p.n_steps) * kSlabBytes);
  p.bias = reinterpret_cast<float*>(take(tiles * kTileCodes * sizeof(float)));
  p.bounds = reinterpret_cast<CodeBound*>(take(tiles * kTileCodes * sizeof(CodeBound)));
  p.tiles = reinterpret_cast<TileInfo*>(take(tiles * sizeof(TileInfo)));
  p.means = reinterpret_cast<float*>(take(H * static_cast<size_t>(p.n_steps) * 16 * sizeof(float)));
  p.heads = reinterpret_cast<HeadInfo*>(take(H * sizeof(HeadInfo)));
  if (packed) *packed = p;
  return used;
}

int pack_codes(const Codes& codes, Metric metric, bool fast, const PackedCodebook& p, void* stream) {
  if (const int error = launch(survey_kernel, p.n_heads, kSurveyThreads, sizeof(Survey), stream, codes, metric, p))
    return error;
  return launch(pack_kernel, p.n_heads * p.n_tiles, kPackThreads, sizeof(Tile), stream, codes, metric, fast, p);
}

}  // namespace fastvq::cuda
