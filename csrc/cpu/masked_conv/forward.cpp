// Masked convolution on the CPU: packing weights, cutting the work into tasks, storing finished rows.
//
// Forward and input gradient are one routine (the gradient's taps are mirrored and its channels swapped):
//   1. weights are packed as [block of output channels][tap][input channel][block]: active taps only;
//   2. a task is a band of rows of one image: its input is copied to zero-padded channels-last workspace that fits the
//      second-level cache;
//   3. for each block of channels, for each row: one product over all taps and channels, sums in registers;
//   4. the row is gated where asked, and stored in the layout of the output.
// On matrix tiles bfloat16 images and weights keep their type in steps 1 to 3; everything else is float32.
// The order of additions for an element does not depend on bands, tiles or threads.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "common.h"

namespace fastvq {

const ConvKernels& conv_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return conv_kernels_avx512;
  if (isa == Isa::avx2) return conv_kernels_avx2;
#endif
  (void)isa;
  return conv_kernels_generic;
}

const TileKernels* tile_kernels(Isa isa) {
#if defined(__x86_64__) && defined(FASTVQ_AMX)
  if (isa == Isa::amx) return &tile_kernels_amx;
#endif
#if defined(__x86_64__) && defined(FASTVQ_EMULATED)
  if (isa == Isa::emulated) return &tile_kernels_emulated;
#endif
  (void)isa;
  return nullptr;
}

ConvEngine conv_engine(Isa isa, const Image& x, const Image& out, const MaskedWeight& w) {
  ConvEngine e{conv_kernels(isa), nullptr};
  if (x.dtype == DType::bf16 && out.dtype == DType::bf16 && w.dtype == DType::bf16) e.tiles = tile_kernels(isa);
  if (e.tiles) e.k.max_vectors = 2;  // two registers of 16 channels
  return e;
}

std::vector<ChannelBlock> split_channels(int64_t n_channels, const ConvKernels& kernels) {
  std::vector<ChannelBlock> blocks;
  int64_t vectors = (n_channels + kernels.lanes - 1) / kernels.lanes;
  for (int64_t first = 0; vectors > 0;) {
    int n = static_cast<int>(std::min<int64_t>(vectors, kernels.max_vectors));
    // A block of one vector runs at half speed (its loads outnumber its multiplications): 4 = 2 + 2, not 3 + 1.
    if (vectors == kernels.max_vectors + 1 && n > 2) n = 2;
    const int64_t width = static_cast<int64_t>(n) * kernels.lanes;
    blocks.push_back({first, std::min(width, n_channels - first), n});
    first += width;
    vectors -= n;
  }
  return blocks;
}

namespace {

constexpr int64_t kBandBytes = 512 << 10;  // most workspace for the input of a band
float weight_at(const MaskedWeight& w, int64_t i) {
  return w.dtype == DType::bf16 ? Bf16::get(static_cast<const uint16_t*>(w.data)[i])
                                : static_cast<const float*>(w.data)[i];
}

// put(number of the tap, depth, lane, index into the weights) for every active weight of a block.
template <class Put>
void each_weight(const MaskedWeight& w, bool swapped, int64_t first, int64_t n_channels, const Put& put) {
  const int64_t depth = swapped ? w.c_out : w.c_in, n_taps = static_cast<int64_t>(w.taps.size());
  const auto visit = [&](int64_t d, int64_t lane) {
    const int64_t out = swapped ? d : first + lane, in = swapped ? first + lane : d;
    const int64_t at = (out * w.c_in + in) * w.kernel_size;
    for (int64_t t = 0; t < n_taps; ++t) {
      const int64_t index = w.taps[static_cast<size_t>(t)].index;
      if (w.active(index, out, in)) put(t, d, lane, at + index);
    }
  };
  // Few channels of depth at a time: reads are contiguous, and writes stay in the first-level cache.
  for (int64_t d0 = 0; d0 < depth; d0 += kSlice)
    for (int64_t lane = 0; lane < n_channels; ++lane)
      for (int64_t d = d0; d < std::min(depth, d0 + kSlice); ++d) visit(d, lane);
}

}  // namespace

void pack_block(const MaskedWeight& w, bool swapped, int64_t first, int64_t n_channels, int64_t lanes, float* dst) {
  const int64_t tap_size = (swapped ? w.c_out : w.c_in) * lanes;
  std::memset(dst, 0, static_cast<size_t>(tap_size) * w.taps.size() * sizeof(float));
  each_weight(w, swapped, first, n_channels, [&](int64_t tap, int64_t d, int64_t lane, int64_t at) {
    dst[tap * tap_size + d * lanes + lane] = weight_at(w, at);
  });
}

namespace {

// For tiles: [tap][step of 32 channels][vector][16 pairs of channels][16 lanes][2].
void pack_pairs(const MaskedWeight& w, bool swapped, const ChannelBlock& block, uint16_t* dst) {
  const int64_t step = block.n_vectors * kTileElements, tap_size = tile_steps(swapped ? w.c_out : w.c_in) * step;
  std::memset(dst, 0, static_cast<size_t>(tap_size) * w.taps.size() * sizeof(uint16_t));
  const uint16_t* data = static_cast<const uint16_t*>(w.data);
  each_weight(w, swapped, block.first, block.n_channels, [&](int64_t tap, int64_t d, int64_t lane, int64_t at) {
    dst[tap * tap_size + d / 32 * step + lane / 16 * kTileElements + d % 32 / 2 * 32 + lane % 16 * 2 + d % 2] =
        data[at];
  });
}

struct PackedConvWeight {
  std::vector<ChannelBlock> blocks;
  std::vector<int64_t> start;  // of each block's weights, in elements
  Floats weights;  // for tiles they hold bfloat16
  const uint16_t* bf16() const { return reinterpret_cast<const uint16_t*>(weights.get()); }
};

// `parts` = 2 for a gated convolution: blocks of a and b alternate, so that a pair is finished together.
std::unique_ptr<PackedConvWeight> pack(const MaskedWeight& w, bool swapped, int64_t parts, const ConvEngine& e,
                                       int n_threads) {
  auto packed = std::make_unique<PackedConvWeight>();
  const int64_t lanes_total = swapped ? w.c_in : w.c_out, depth = swapped ? w.c_out : w.c_in;
  for (const ChannelBlock& block : split_channels(lanes_total / parts, e.k))
    for (int64_t part = 0; part < parts; ++part)
      packed->blocks.push_back({block.first + part * (lanes_total / parts), block.n_channels, block.n_vectors});
  int64_t size = 0;
  for (const ChannelBlock& block : packed->blocks) {
    packed->start.push_back(size);
    const int64_t of_a_tap =
        e.tiles ? tile_steps(depth) * block.n_vectors * kTileElements : depth * lanes_of(block, e.k);
    size += static_cast<int64_t>(w.taps.size()) * of_a_tap;
  }
  packed->weights.resize(std::max<int64_t>(e.tiles ? size / 2 : size, 1));
  parallel_chunks(static_cast<int64_t>(packed->blocks.size()), n_threads, [&](int64_t i, int) {
    const ChannelBlock& block = packed->blocks[static_cast<size_t>(i)];
    const int64_t start = packed->start[static_cast<size_t>(i)];
    if (e.tiles)
      pack_pairs(w, swapped, block, reinterpret_cast<uint16_t*>(packed->weights.get()) + start);
    else
      pack_block(w, swapped, block.first, block.n_channels, lanes_of(block, e.k), packed->weights.get() + start);
  });
  return packed;
}

std::vector<Tap> mirrored(std::vector<Tap> taps) {
  for (Tap& t : taps) {
    t.dy = -t.dy;
    t.dx = -t.dx;
  }
  return taps;
}

// Workspace of one thread.
struct BandWorkspace {
  Floats input, row_a, row_b, row_out, condition;
};

int64_t band_rows(const Image& x, const Reach& reach, int64_t pixel_bytes, int n_threads) {
  const int64_t row_bytes = (reach.left + x.width + reach.right) * pixel_bytes;
  int64_t rows = std::max<int64_t>(1, kBandBytes / row_bytes - reach.top - reach.bottom);
  // Enough bands for every thread, but none so thin that copying the rows around it outweighs its work.
  const int64_t per_image = (4 * n_threads + x.batch - 1) / x.batch;
  if (n_threads > 1) rows = std::min(rows, std::max<int64_t>(4, (x.height + per_image - 1) / per_image));
  const int64_t n_bands = (x.height + rows - 1) / rows;
  return (x.height + n_bands - 1) /
         n_bands;  // about equal heights: a thin last band would read all weights for little work
}

// Start values of the sums of a block: the bias, and a condition that is the same for every position.
void start_values(const float* bias, const Image* vector_condition, int64_t b, const ChannelBlock& block, int64_t lanes,
                  const ConvKernels& k, float* dst) {
  std::memset(dst, 0, static_cast<size_t>(lanes) * sizeof(float));
  if (vector_condition) load_pixels(k, *vector_condition, b, 0, 0, 1, block.first, block.n_channels, dst, lanes);
  if (bias)
    for (int64_t c = 0; c < block.n_channels; ++c) dst[c] += bias[block.first + c];
}

void add_condition(const ConvKernels& k, const Image& condition, int64_t b, int64_t y, const ChannelBlock& block,
                   int64_t lanes, BandWorkspace& s, float* row) {
  load_pixels(k, condition, b, y, 0, condition.width, block.first, block.n_channels, s.condition.get(), lanes);
  for (int64_t p = 0; p < condition.width; ++p)
    for (int64_t c = 0; c < block.n_channels; ++c) row[p * lanes + c] += s.condition.get()[p * lanes + c];
}

void convolve(const Image& x, const std::vector<Tap>& taps, const PackedConvWeight& packed, const float* bias,
              const Gate* gate, const Image& out, const ConvEngine& e, int n_threads) {
  const ConvKernels& k = e.k;
  const Reach reach(taps);
  const int64_t size = e.tiles ? 2 : 4, pixel = pixel_stride(x.channels, 64 / size);
  const int64_t row = (reach.left + x.width + reach.right) * pixel;
  const int64_t rows = band_rows(x, reach, pixel * size, n_threads), n_bands = (x.height + rows - 1) / rows;
  const int64_t made = e.tiles ? (x.width + 15) / 16 * 16 : x.width;  // pixels of a row that a product writes
  std::vector<int64_t> segments;
  for (const Tap& t : taps) segments.push_back((reach.top + t.dy) * row + (reach.left + t.dx) * pixel);
  const bool mapped = gate && gate->condition.data && (gate->condition.stride_h || gate->condition.stride_w);
  const Image* vector_condition = gate && gate->condition.data && !mapped ? &gate->condition : nullptr;
  const int64_t widest = static_cast<int64_t>(k.max_vectors) * k.lanes;

  std::vector<BandWorkspace> workspace(static_cast<size_t>(std::max(1, n_threads)));
  parallel_chunks(x.batch * n_bands, n_threads, [&](int64_t task, int thread) {
    const int64_t b = task / n_bands, y0 = task % n_bands * rows, n_rows = std::min(rows, x.height - y0);
    BandWorkspace& s = workspace[static_cast<size_t>(thread)];
    const int64_t band = (reach.top + rows + reach.bottom) * row;
    uint16_t* input_bf16 = nullptr;
    if (e.tiles) {
      input_bf16 = s.input.resize_bf16(band + 16 * pixel);
      load_padded(*e.tiles, x, b, 0, x.channels, y0, n_rows, reach, input_bf16, pixel);
    } else {
      s.input.resize(band);
      load_padded(k, x, b, 0, x.channels, y0, n_rows, reach, s.input.get(), pixel);
    }
    s.row_a.resize((made + 1) * widest);
    if (gate) {
      s.row_b.resize((made + 1) * widest);
      s.row_out.resize(x.width * widest);
      if (mapped) s.condition.resize(x.width * widest);
    }

    const size_t step = gate ? 2 : 1;
    for (size_t i = 0; i < packed.blocks.size(); i += step) {
      checkpoint();
      const ChannelBlock& block = packed.blocks[i];
      const int64_t lanes = lanes_of(block, k);
      float* rows_of[2] = {s.row_a.get(), s.row_b.get()};  // the part after the last pixel holds the start values
      for (size_t part = 0; part < step; ++part)
        start_values(bias, vector_condition, b, packed.blocks[i + part], lanes, k, rows_of[part] + made * widest);
      for (int64_t y = 0; y < n_rows; ++y) {
        for (size_t part = 0; part < step; ++part) {
          const int64_t n_segments = static_cast<int64_t>(segments.size()), start = packed.start[i + part];
          if (e.tiles)
            e.tiles->product({input_bf16 + y * row, pixel, segments.data(), n_segments, tile_steps(x.channels),
                              packed.bf16() + start, rows_of[part], lanes, rows_of[part] + made * widest, x.width,
                              block.n_vectors});
          else
            k.product({s.input.get() + y * row, pixel, 1, segments.data(), n_segments, x.channels,
                       packed.weights.get() + start, rows_of[part], lanes, rows_of[part] + made * widest, x.width,
                       block.n_vectors,
                       part == 0 ? lines_of(out, b, y0 + y, block.first, block.n_channels) : PrefetchLines{}});
          if (mapped) add_condition(k, gate->condition, b, y0 + y, packed.blocks[i + part], lanes, s, rows_of[part]);
        }
        const float* result = s.row_a.get();
        if (gate) {
          k.gate(s.row_a.get(), s.row_b.get(), s.row_out.get(), x.width * lanes);
          result = s.row_out.get();
          if (gate->saved) {
            store_pixels(k, gate->tanh_a, b, y0 + y, 0, x.width, block.first, block.n_channels, s.row_a.get(), lanes);
            store_pixels(k, gate->sigmoid_b, b, y0 + y, 0, x.width, block.first, block.n_channels, s.row_b.get(),
                         lanes);
          }
        }
        store_pixels(k, out, b, y0 + y, 0, x.width, block.first, block.n_channels, result, lanes);
      }
    }
  });
}

}  // namespace

void masked_conv_forward(const Image& x, const MaskedWeight& weight, const float* bias, const Image& out, Isa isa,
                         int n_threads) {
  if (empty(out)) return;
  const ConvEngine e = conv_engine(isa, x, out, weight);
  n_threads = useful_threads(multiply_adds(out, weight), n_threads);
  convolve(x, weight.taps, *pack(weight, false, 1, e, n_threads), bias, nullptr, out, e, n_threads);
}

void gated_masked_conv_forward(const Image& x, const MaskedWeight& weight, const float* bias, const Gate& gate,
                               const Image& out, Isa isa, int n_threads) {
  if (empty(out)) return;
  const ConvEngine e = conv_engine(isa, x, out, weight);
  n_threads = useful_threads(multiply_adds(out, weight), n_threads);
  convolve(x, weight.taps, *pack(weight, false, 2, e, n_threads), bias, &gate, out, e, n_threads);
}

void masked_conv_input_grad(const Image& grad_out, const MaskedWeight& weight, const Image& grad_x, Isa isa,
                            int n_threads) {
  if (empty(grad_x)) return;
  const ConvEngine e = conv_engine(isa, grad_out, grad_x, weight);
  n_threads = useful_threads(multiply_adds(grad_x, weight), n_threads);
  convolve(grad_out, mirrored(weight.taps), *pack(weight, true, 1, e, n_threads), nullptr, nullptr, grad_x, e,
           n_threads);
}

void gate_backward(const float* grad, const float* tanh_a, const float* sigmoid_b, float* grad_ab, int64_t n_outer,
                   int64_t n_inner, Isa isa, int n_threads) {
  const ConvKernels& k = conv_kernels(isa);
  n_threads = useful_threads(16.0 * static_cast<double>(n_outer * n_inner), n_threads);
  constexpr int64_t kPart = 4096;  // cuts few long rows (contiguous images) for several threads
  const int64_t parts = (n_inner + kPart - 1) / kPart;
  const int64_t rows = std::max<int64_t>(1, kPart / std::max<int64_t>(1, n_inner));
  const int64_t n_tasks = (n_outer + rows - 1) / rows;
  parallel_chunks(n_tasks * parts, n_threads, [&](int64_t task, int) {
    const int64_t at = task % parts * kPart, n = std::min(kPart, n_inner - at), first = task / parts * rows;
    for (int64_t i = first; i < std::min(n_outer, first + rows); ++i)
      k.gate_backward(grad + i * n_inner + at, tanh_a + i * n_inner + at, sigmoid_b + i * n_inner + at,
                      grad_ab + 2 * i * n_inner + at, grad_ab + (2 * i + 1) * n_inner + at, n);
  });
}

}  // namespace fastvq
