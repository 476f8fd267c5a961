// Masked convolution as one product over the active taps: forward, gated forward and input gradient.
//
//   x [B, C_in, H, W], any strides   weight [C_out, C_in, kh, kw]   ->   out [B, C_out, H, W], any strides
//
//   out [pixels, C_out] = sum over (tap, 64 bytes of input channels) of  x [pixels + tap, depth]  w [depth, C_out]
//
// 1. pack: weights become [64 output channels][tap][depth][tile], masked ones zero, in the order the tiles read them.
//    Gated: 32 channels of a, then the 32 of b that belong to them. Input gradient: channels change places.
// 2. product: a block has 128 pixels and 64 output channels; the next step's loads are under way while a step's
//    products are made. Input gradient: taps are mirrored.
// 3. a finished sum gets its bias, and a gate its condition, and is stored, or gated first.
//
// Shared bytes: ConvTile::kBytes, one step (the next one waits in registers).
#include "masked_conv.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = kConvThreads;
constexpr int kChunksA = kConvRows * kChunksPerRow / kThreads;  // a thread
static_assert(kConvColumns * kChunksPerRow == kThreads, "one chunk of b a thread");

struct Packing {
  bool gated, swapped;
  int64_t n_out, depth;  // output channels; of input channels
  int64_t n_tiles, n_steps;
};

Packing packing_of(const ConvWeight& w, bool gated, bool swapped) {
  const int64_t step = w.dtype == DType::f32 ? ConvTile<DType::f32>::kDepth : ConvTile<DType::f16>::kDepth;
  const int64_t n_out = swapped ? w.c_in : w.c_out, depth = swapped ? w.c_out : w.c_in;
  const int64_t per_tile = gated ? kConvColumns / 2 : kConvColumns;
  const int64_t n_tiles = ((gated ? n_out / 2 : n_out) + per_tile - 1) / per_tile;
  return {gated, swapped, n_out, depth, n_tiles, (depth + step - 1) / step};
}

// The output channel of a tile's column, n_out or more where there is none.
__device__ __forceinline__ int64_t channel_of(const Packing& p, int64_t tile, int64_t column) {
  if (!p.gated) return tile * kConvColumns + column;
  const int64_t half = kConvColumns / 2, channel = tile * half + column % half;
  return channel >= p.n_out / 2 ? p.n_out : column < half ? channel : p.n_out / 2 + channel;
}

// A block packs what one step of a tile reads.
template <DType kType>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(ConvWeight w, Packing p, typename ConvTile<kType>::Element* packed) {
  using Tile = ConvTile<kType>;
  using Element = typename Tile::Element;
  const int64_t step = blockIdx.x % p.n_steps, place = blockIdx.x / p.n_steps % w.n_taps;
  const int64_t tap = w.first_tap + place, tile = blockIdx.x / p.n_steps / w.n_taps;
  packed += static_cast<int64_t>(blockIdx.x) * (kConvColumns * Tile::kDepth);
  for (int i = threadIdx.x; i < kConvColumns * Tile::kDepth; i += kThreads) {
    const int column = i % kConvColumns, inner = i / kConvColumns;
    const int64_t to = channel_of(p, tile, column), from = step * Tile::kDepth + inner;
    const int64_t out = p.swapped ? from : to, in = p.swapped ? to : from;
    Element v = 0;
    if (to < p.n_out && from < p.depth && is_active(w, tap, out, in))
      v = static_cast<const Element*>(w.data)[(out * w.c_in + in) * w.kh * w.kw + tap];
    packed[Tile::packed_at(inner, column)] = v;
  }
}

struct Convolution {
  Image x, out;
  Packing packing;
  const void* packed;
  const void* bias;
  int64_t kw, first_tap, n_taps, centre_y, centre_x;
  int64_t sign;  // 1, or -1 for mirrored taps
  bool side_by_side;  // a pixel's channels
  bool whole_chunks;  // and aligned, sixteen bytes at a time
};

template <DType kType, bool kGated>
__global__ void __launch_bounds__(kThreads) convolution_kernel(Convolution c, Gate gate) {
  using Tile = ConvTile<kType>;
  using Element = typename Tile::Element;
  Tile tile(shared_memory());
  const int tid = threadIdx.x;
  const int64_t n_tiles = c.packing.n_tiles, which = blockIdx.x % n_tiles, first = blockIdx.x / n_tiles * kConvRows;
  const int64_t n_pixels = positions(c.x), n_steps = c.packing.n_steps, n_all = c.n_taps * n_steps;
  const Element* x = static_cast<const Element*>(c.x.data);
  const uint4* weights = static_cast<const uint4*>(c.packed) + which * n_all * kThreads + tid;

  // The chunks of x that this thread loads: neighbouring threads read neighbouring addresses.
  int rows[kChunksA], parts[kChunksA];
  int64_t base[kChunksA], ys[kChunksA], xs[kChunksA];
#pragma unroll
  for (int i = 0; i < kChunksA; ++i) {
    const int q = tid + i * kThreads;
    rows[i] = c.side_by_side ? q / kChunksPerRow : q % kConvRows;
    parts[i] = c.side_by_side ? q % kChunksPerRow : q / kConvRows;
    const int64_t pixel = first + rows[i];
    const Position at(c.x, pixel < n_pixels ? pixel : 0);
    base[i] = image_offset(c.x, at) + parts[i] * Tile::kPerChunk * c.x.stride_c;
    ys[i] = pixel < n_pixels ? at.y : -1 - c.centre_y;  // no tap reaches the image from there
    xs[i] = at.x;
  }

  uint4 next_a[kChunksA], next_b;
  int64_t tap = c.first_tap, step = 0;
  const auto load = [&](int64_t s) {
    const int64_t dy = c.sign * (tap / c.kw - c.centre_y), dx = c.sign * (tap % c.kw - c.centre_x);
    next_b = weights[s * kThreads];
#pragma unroll
    for (int i = 0; i < kChunksA; ++i) {
      const int64_t y = ys[i] + dy, x_ = xs[i] + dx;
      const int64_t left = c.x.channels - step * Tile::kDepth - parts[i] * Tile::kPerChunk;
      const bool inside = y >= 0 && y < c.x.height && x_ >= 0 && x_ < c.x.width && left > 0;
      const int64_t at = base[i] + dy * c.x.stride_h + dx * c.x.stride_w + step * Tile::kDepth * c.x.stride_c;
      if (inside && c.whole_chunks)
        next_a[i] = *reinterpret_cast<const uint4*>(x + at);
      else
        next_a[i] =
            make_chunk<Element>([&](int e) { return inside && e < left ? x[at + e * c.x.stride_c] : Element(0); });
    }
    if (++step == n_steps) {
      step = 0;
      ++tap;
    }
  };

  float sums[kConvSums];
#pragma unroll
  for (int i = 0; i < kConvSums; ++i) sums[i] = 0;
  if (n_all > 0) load(0);
  for (int64_t s = 0; s < n_all; ++s) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kChunksA; ++i) tile.store_a(rows[i], parts[i], next_a[i]);
    tile.store_packed(tid, next_b);
    __syncthreads();
    if (s + 1 < n_all) load(s + 1);
    tile.multiply(sums);
  }

  const auto value = [](const Image& image, const Position& at, int64_t channel) {
    return load_float(image.data, kType, image_offset(image, at) + channel * image.stride_c);
  };
  const auto store = [](const Image& image, const Position& at, int64_t channel, float v) {
    store_float(image.data, kType, image_offset(image, at) + channel * image.stride_c, v);
  };
  const int64_t n_out = c.packing.n_out;
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    const int64_t pixel = first + Tile::row(r);
    if (pixel >= n_pixels) continue;
    const Position at(c.x, pixel);
    if constexpr (!kGated) {
#pragma unroll
      for (int j = 0; j < Tile::kThreadColumns; ++j) {
        const int64_t channel = channel_of(c.packing, which, Tile::column(j));
        if (channel >= n_out) continue;
        float v = sums[Tile::sum(r, j)];
        if (c.bias) v += load_float(c.bias, kType, channel);
        store(c.out, at, channel, v);
      }
    } else {
#pragma unroll
      for (int j = 0; j < Tile::kThreadColumns / 2; ++j) {
        const int64_t channel = channel_of(c.packing, which, Tile::column(j)), of_b = channel + n_out / 2;
        if (channel >= n_out) continue;
        float a = sums[Tile::sum(r, j)], b = sums[Tile::sum(r, j + Tile::kThreadColumns / 2)];
        if (c.bias) {
          a += load_float(c.bias, kType, channel);
          b += load_float(c.bias, kType, of_b);
        }
        if (gate.condition.data) {
          a += value(gate.condition, at, channel);
          b += value(gate.condition, at, of_b);
        }
        const float t = tanhf(a), s = 1 / (1 + expf(-b));
        store(c.out, at, channel, t * s);
        if (gate.saved) {
          store(gate.tanh_a, at, channel, t);
          store(gate.sigmoid_b, at, channel, s);
        }
      }
    }
  }
}

bool multiple_of_chunks(const Image& x) {
  const int64_t per_chunk = x.dtype == DType::f32 ? 4 : 8;
  bool whole = reinterpret_cast<uintptr_t>(x.data) % kChunk == 0 && x.stride_c == 1 && x.channels % per_chunk == 0;
  for (const int64_t stride : {x.stride_b, x.stride_h, x.stride_w}) whole = whole && stride % per_chunk == 0;
  return whole;
}

template <DType kType>
int convolve(const Image& x, const ConvWeight& w, const void* bias, const Gate* gate, const Image& out, bool swapped,
             void* workspace, void* stream) {
  using Tile = ConvTile<kType>;
  const Packing packing = packing_of(w, gate != nullptr, swapped);
  if (const int error = launch(pack_kernel<kType>, packing.n_tiles * w.n_taps * packing.n_steps, kThreads, 0, stream, w,
                               packing, static_cast<typename Tile::Element*>(workspace)))
    return error;
  const Convolution c{x,
                      out,
                      packing,
                      workspace,
                      bias,
                      w.kw,
                      w.first_tap,
                      w.n_taps,
                      w.kh / 2,
                      w.kw / 2,
                      swapped ? -1 : 1,
                      x.stride_c == 1,
                      multiple_of_chunks(x)};
  const auto kernel = gate ? convolution_kernel<kType, true> : convolution_kernel<kType, false>;
  return launch(kernel, (positions(x) + kConvRows - 1) / kConvRows * packing.n_tiles, kThreads, Tile::kBytes, stream, c,
                gate ? *gate : Gate{});
}

int run(const Image& x, const ConvWeight& w, const void* bias, const Gate* gate, const Image& out, bool swapped,
        void* workspace, void* stream) {
  const auto of_type = x.dtype == DType::f32    ? convolve<DType::f32>
                       : x.dtype == DType::bf16 ? convolve<DType::bf16>
                                                : convolve<DType::f16>;
  return of_type(x, w, bias, gate, out, swapped, workspace, stream);
}

}  // namespace

size_t masked_conv_workspace(const ConvWeight& w, bool gated, bool swapped) {
  const Packing p = packing_of(w, gated, swapped);
  return static_cast<size_t>(p.n_tiles * w.n_taps * p.n_steps) * kThreads * kChunk;
}

int masked_conv_forward(const Image& x, const ConvWeight& w, const void* bias, const Image& out, void* workspace,
                        void* stream) {
  return run(x, w, bias, nullptr, out, false, workspace, stream);
}

int gated_masked_conv_forward(const Image& x, const ConvWeight& w, const void* bias, const Gate& gate, const Image& out,
                              void* workspace, void* stream) {
  return run(x, w, bias, &gate, out, false, workspace, stream);
}

int masked_conv_input_grad(const Image& grad_out, const ConvWeight& w, const Image& grad_x, void* workspace,
                           void* stream) {
  return run(grad_out, w, nullptr, nullptr, grad_x, true, workspace, stream);
}

}  // namespace fastvq::cuda
