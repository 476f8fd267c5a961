// Gradients of the masked convolution to its weights and bias, and of the gate.
//
//   grad_weight [C_out, C_in] of a tap = sum over pixels of  grad [C_out, pixels]  x [pixels + tap, C_in]
//
// 1. product: a block has 128 output channels, 64 input channels, one tap and a span of the pixels; a thread's chunk is
//    neighbouring pixels of one channel
// 2. bias: sums of the gradient over each span
// 3. join: the spans, in order, so that the result depends on the sizes alone; weights that do not count get zero
//
// Shared bytes: ConvTile::kBytes; of the bias, 4 x 256.
#include "masked_conv.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = kConvThreads;
constexpr int kChunksA = kConvRows * kChunksPerRow / kThreads;
constexpr int64_t kPixelsPerSpan = 2048, kMostSpans = 32;

struct WeightGradient {
  Image x, grad;
  ConvWeight weight;
  int64_t n_spans;
  bool x_side_by_side, grad_side_by_side;  // a pixel's channels
  float* partial;  // [n_spans, n_taps, C_out, C_in]
  float* partial_bias;  // [n_spans, C_out]
};

int64_t spans_of(const Image& x) {
  const int64_t n = positions(x) / kPixelsPerSpan;
  return n < 1 ? 1 : n > kMostSpans ? kMostSpans : n;
}

// Elements of one channel at neighbouring pixels from `pixel` on, dy and dx away; zero outside the image or the span.
template <class Tile>
__device__ __forceinline__ uint4 load_pixels(const Image& image, int64_t channel, int64_t pixel, int64_t end,
                                             int64_t dy, int64_t dx) {
  using Element = typename Tile::Element;
  const Element* data = static_cast<const Element*>(image.data) + channel * image.stride_c;
  data += dy * image.stride_h + dx * image.stride_w;
  const bool any = channel < image.channels && pixel < end;
  Position at(image, any ? pixel : 0);
  int64_t left = any ? end - pixel : 0;
  return make_chunk<Element>([&](int) {
    const int64_t y = at.y + dy, x = at.x + dx;
    const bool inside = left-- > 0 && y >= 0 && y < image.height && x >= 0 && x < image.width;
    const Element v = inside ? data[image_offset(image, at)] : Element(0);
    at.advance(image);
    return v;
  });
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) weight_kernel(WeightGradient g, int64_t tiles_out, int64_t tiles_in) {
  using Tile = ConvTile<kType>;
  Tile tile(shared_memory());
  const ConvWeight& w = g.weight;
  const int tid = threadIdx.x;
  const int64_t out = blockIdx.x % tiles_out * kConvRows, in = blockIdx.x / tiles_out % tiles_in * kConvColumns;
  const int64_t place = blockIdx.x / tiles_out / tiles_in % w.n_taps,
                span = blockIdx.x / tiles_out / tiles_in / w.n_taps;
  const int64_t dy = (w.first_tap + place) / w.kw - w.kh / 2, dx = (w.first_tap + place) % w.kw - w.kw / 2;
  const int64_t n_pixels = positions(g.x), first = n_pixels * span / g.n_spans, end = n_pixels * (span + 1) / g.n_spans;

  uint4 next_a[kChunksA], next_b;
  const auto row_of = [](bool side_by_side, int q, int n) { return side_by_side ? q % n : q / kChunksPerRow; };
  const auto part_of = [](bool side_by_side, int q, int n) { return side_by_side ? q / n : q % kChunksPerRow; };
  const auto load = [&](int64_t base) {
#pragma unroll
    for (int i = 0; i < kChunksA; ++i) {
      const int q = tid + i * kThreads;
      next_a[i] = load_pixels<Tile>(g.grad, out + row_of(g.grad_side_by_side, q, kConvRows),
                                    base + part_of(g.grad_side_by_side, q, kConvRows) * Tile::kPerChunk, end, 0, 0);
    }
    next_b = load_pixels<Tile>(g.x, in + row_of(g.x_side_by_side, tid, kConvColumns),
                               base + part_of(g.x_side_by_side, tid, kConvColumns) * Tile::kPerChunk, end, dy, dx);
  };

  float sums[kConvSums];
#pragma unroll
  for (int i = 0; i < kConvSums; ++i) sums[i] = 0;
  load(first);
  for (int64_t base = first; base < end; base += Tile::kDepth) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kChunksA; ++i) {
      const int q = tid + i * kThreads;
      tile.store_a(row_of(g.grad_side_by_side, q, kConvRows), part_of(g.grad_side_by_side, q, kConvRows), next_a[i]);
    }
    tile.store_b(row_of(g.x_side_by_side, tid, kConvColumns), part_of(g.x_side_by_side, tid, kConvColumns), next_b);
    __syncthreads();
    load(base + Tile::kDepth);
    tile.multiply(sums);
  }

  float* partial = g.partial + (span * w.n_taps + place) * w.c_out * w.c_in;
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r)
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; ++j) {
      const int64_t row = out + Tile::row(r), column = in + Tile::column(j);
      if (row < w.c_out && column < w.c_in) partial[row * w.c_in + column] = sums[Tile::sum(r, j)];
    }
}

// A block has 32 channels and a span; thread (channel, t) adds every eighth pixel from the t-th on.
__global__ void __launch_bounds__(kThreads, 4) bias_kernel(WeightGradient g, int64_t n_tiles) {
  constexpr int kEvery = kThreads / 32;
  float* sums = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % 32, turn = threadIdx.x / 32;
  const int64_t channel = blockIdx.x % n_tiles * 32 + lane, span = blockIdx.x / n_tiles, n = positions(g.grad);
  const int64_t first = n * span / g.n_spans, end = n * (span + 1) / g.n_spans;
  float sum = 0;
  if (channel < g.grad.channels)
    for (int64_t p = first + turn; p < end; p += kEvery)
      sum +=
          load_float(g.grad.data, g.grad.dtype, image_offset(g.grad, Position(g.grad, p)) + channel * g.grad.stride_c);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (turn != 0 || channel >= g.grad.channels) return;
  for (int t = 1; t < kEvery; ++t) sum += sums[t * 32 + lane];
  g.partial_bias[span * g.grad.channels + channel] = sum;
}

// The elements of grad_weight, then those of grad_bias.
__global__ void __launch_bounds__(kThreads) join_kernel(WeightGradient g, void* grad_weight, void* grad_bias) {
  const ConvWeight& w = g.weight;
  const int64_t kernel_size = w.kh * w.kw, n_weights = grad_weight ? w.c_out * w.c_in * kernel_size : 0;
  const int64_t n = n_weights + (grad_bias ? w.c_out : 0), each = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += each) {
    float sum = 0;
    if (i < n_weights) {
      const int64_t tap = i % kernel_size, pair = i / kernel_size;
      if (is_active(w, tap, pair / w.c_in, pair % w.c_in))
        for (int64_t span = 0; span < g.n_spans; ++span)
          sum += g.partial[(span * w.n_taps + tap - w.first_tap) * w.c_out * w.c_in + pair];
      store_float(grad_weight, w.dtype, i, sum);
    } else {
      for (int64_t span = 0; span < g.n_spans; ++span) sum += g.partial_bias[span * w.c_out + i - n_weights];
      store_float(grad_bias, w.dtype, i - n_weights, sum);
    }
  }
}

__global__ void __launch_bounds__(kThreads) gate_kernel(Image grad, Image tanh_a, Image sigmoid_b, Image grad_ab) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, C = grad.channels;
  if (i >= positions(grad) * C) return;
  // Neighbouring threads write neighbouring addresses, whichever way the result lies.
  const bool side_by_side = grad_ab.stride_c == 1;
  const int64_t pixels = grad.height * grad.width;
  const int64_t channel = side_by_side ? i % C : i / pixels % C;
  const Position at(grad, side_by_side ? i / C : i / pixels / C * pixels + i % pixels);
  const auto value = [&](const Image& image) {
    return load_float(image.data, image.dtype, image_offset(image, at) + channel * image.stride_c);
  };
  const float g = value(grad), t = value(tanh_a), s = value(sigmoid_b);
  const int64_t to = image_offset(grad_ab, at) + channel * grad_ab.stride_c;
  store_float(grad_ab.data, grad_ab.dtype, to, g * s * (1 - t * t));
  store_float(grad_ab.data, grad_ab.dtype, to + C * grad_ab.stride_c, g * t * (s * (1 - s)));
}

}  // namespace

size_t masked_conv_weight_grad_workspace(const Image& x, const ConvWeight& w) {
  return sizeof(float) * static_cast<size_t>(spans_of(x) * w.c_out * (w.n_taps * w.c_in + 1));
}

int masked_conv_weight_grad(const Image& x, const Image& grad_out, const ConvWeight& w, void* grad_weight,
                            void* grad_bias, void* workspace, void* stream) {
  WeightGradient g{
      x, grad_out, w, spans_of(x), x.stride_c == 1, grad_out.stride_c == 1, static_cast<float*>(workspace), nullptr};
  g.partial_bias = g.partial + g.n_spans * w.n_taps * w.c_out * w.c_in;
  const int64_t tiles_out = (w.c_out + kConvRows - 1) / kConvRows,
                tiles_in = (w.c_in + kConvColumns - 1) / kConvColumns;
  if (grad_weight) {
    const bool full = w.dtype == DType::f32, is_bf16 = w.dtype == DType::bf16;
    const auto kernel = full      ? weight_kernel<DType::f32>
                        : is_bf16 ? weight_kernel<DType::bf16>
                                  : weight_kernel<DType::f16>;
    const size_t shared = full ? ConvTile<DType::f32>::kBytes : ConvTile<DType::f16>::kBytes;
    if (const int error = launch(kernel, g.n_spans * w.n_taps * tiles_in * tiles_out, kThreads, shared, stream, g,
                                 tiles_out, tiles_in))
      return error;
  }
  if (grad_bias) {
    const int64_t n_tiles = (w.c_out + 31) / 32;
    if (const int error =
            launch(bias_kernel, n_tiles * g.n_spans, kThreads, sizeof(float) * kThreads, stream, g, n_tiles))
      return error;
  }
  const int64_t n = (grad_weight ? w.c_out * w.c_in * w.kh * w.kw : 0) + (grad_bias ? w.c_out : 0);
  const int64_t elements = int64_t{4} * kThreads;
  return launch(join_kernel, (n + elements - 1) / elements, kThreads, 0, stream, g, grad_weight, grad_bias);
}

int gate_backward(const Image& grad, const Image& tanh_a, const Image& sigmoid_b, const Image& grad_ab, void* stream) {
  const int64_t n = positions(grad) * grad.channels;
  return launch(gate_kernel, (n + kThreads - 1) / kThreads, kThreads, 0, stream, grad, tanh_a, sigmoid_b, grad_ab);
}

}  // namespace fastvq::cuda
