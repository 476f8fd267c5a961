// The weight gradient of the masked convolution on the CPU.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common.h"

namespace fastvq {
namespace {

constexpr int64_t kGroupBytes = 2LL << 20;  // most workspace for each operand
constexpr int64_t kPixelsPerChunk = 128;    // their gradients (128 x 48 floats) stay in the first-level cache

// Sums over pixels have one order: a task owns (block of output channels, chunk of input channels) and adds one chunk of
// pixels after another, or one line after another on tiles.
struct WeightGrad {
  const ConvKernels k;
  const TileKernels* tiles;
  const MaskedWeight& weight;
  const int64_t depth;  // C_in; for tiles rounded up to 32
  std::vector<ChannelBlock> blocks;
  std::vector<int64_t> start;  // of each block's sums [tap][depth][lane]
  Floats sums, input, grads;
  std::vector<double> bias;

  WeightGrad(const MaskedWeight& w, const ConvEngine& engine)
      : k(engine.k),
        tiles(engine.tiles),
        weight(w),
        depth(tiles ? tile_steps(w.c_in) * 32 : w.c_in),
        blocks(split_channels(w.c_out, k)),
        bias(static_cast<size_t>(w.c_out), 0.0) {
    int64_t size = 0;
    for (const ChannelBlock& block : blocks) {
      start.push_back(size);
      size += static_cast<int64_t>(w.taps.size()) * depth * lanes_of(block, k);
    }
    sums.resize(std::max<int64_t>(size, 1));
    std::memset(sums.get(), 0, static_cast<size_t>(size) * sizeof(float));
  }

  void add_bias(const ChannelBlock& block, const float* grad, int64_t n_pixels) {
    const int64_t lanes = lanes_of(block, k);
    constexpr float one = 1.0f;
    const int64_t none = 0;
    std::vector<float> sum(static_cast<size_t>(lanes), 0.0f);
    k.product({&one, 0, 0, &none, 1, n_pixels, grad, sum.data(), lanes, nullptr, 1, block.n_vectors, {}});
    for (int64_t c = 0; c < block.n_channels; ++c)
      bias[static_cast<size_t>(block.first + c)] += static_cast<double>(sum[static_cast<size_t>(c)]);
  }

  void add_group(const Image& x, const Image& grad, int64_t b0, int64_t n_images, bool with_bias, int n_threads) {
    const Reach reach(weight.taps);
    const int64_t row = (reach.left + x.width + reach.right) * kSlice, n_pixels = n_images * x.height * x.width;
    const int64_t image = (reach.top + x.height + reach.bottom) * row;
    const int64_t n_slices = (x.channels + kSlice - 1) / kSlice;
    const int64_t lanes_total = blocks.back().first + lanes_of(blocks.back(), k);
    input.resize(n_slices * n_images * image);
    grads.resize(n_pixels * lanes_total);
    parallel_chunks(n_images, n_threads, [&](int64_t i, int) {
      for (int64_t slice = 0; slice < n_slices; ++slice) {
        const int64_t c = slice * kSlice;
        load_padded(k, x, b0 + i, c, std::min(kSlice, x.channels - c), 0, x.height, reach,
                    input.get() + (slice * n_images + i) * image, kSlice);
      }
      for (const ChannelBlock& block : blocks) {
        const int64_t lanes = lanes_of(block, k);
        float* dst = grads.get() + block.first * n_pixels + i * x.height * x.width * lanes;
        if (block.n_channels < lanes)
          std::memset(dst, 0, static_cast<size_t>(x.height * x.width * lanes) * sizeof(float));
        load_rows(k, grad, b0 + i, 0, x.height, block.first, block.n_channels, dst, x.width * lanes, lanes);
      }
    });

    const int64_t rows = std::max<int64_t>(1, std::min(x.height, kPixelsPerChunk / x.width));
    parallel_chunks(static_cast<int64_t>(blocks.size()) * n_slices, n_threads, [&](int64_t task, int) {
      const size_t i = static_cast<size_t>(task / n_slices);
      const int64_t slice = task % n_slices, first = slice * kSlice, lanes = lanes_of(blocks[i], k);
      const float* slice_input = input.get() + slice * n_images * image;
      std::vector<int64_t> segments(static_cast<size_t>(rows));
      for (int64_t y = 0; y < rows; ++y) segments[static_cast<size_t>(y)] = y * row;
      for (int64_t n = 0; n < n_images; ++n)
        for (int64_t y0 = 0; y0 < x.height; y0 += rows) {
          checkpoint();
          const int64_t n_rows = std::min(rows, x.height - y0);
          const float* grad_at = grads.get() + blocks[i].first * n_pixels + (n * x.height + y0) * x.width * lanes;
          if (with_bias && slice == 0) add_bias(blocks[i], grad_at, n_rows * x.width);
          for (size_t t = 0; t < weight.taps.size(); ++t) {
            const Tap& tap = weight.taps[t];
            k.product({slice_input + n * image + (y0 + reach.top + tap.dy) * row + (reach.left + tap.dx) * kSlice,
                       1,
                       kSlice,
                       segments.data(),
                       n_rows,
                       x.width,
                       grad_at,
                       sums.get() + start[i] + (static_cast<int64_t>(t) * x.channels + first) * lanes,
                       lanes,
                       nullptr,
                       std::min(kSlice, x.channels - first),
                       blocks[i].n_vectors,
                       {}});
          }
        }
    });
  }

  // Bytes of workspace that an image takes; pixels lie next to each other in the input's, pairs of them in the gradient's.
  int64_t image_bytes(const Image& x, int64_t c_out) const {
    if (!tiles) {
      const int64_t channels = std::max(pixel_stride(x.channels), c_out);
      return (x.height + 10) * (x.width + 10) * channels * static_cast<int64_t>(sizeof(float));
    }
    const Lines lines(x, weight.taps);
    const int64_t elements = std::max(depth * lines.n, c_out * x.height) * lines.size;
    return elements * static_cast<int64_t>(sizeof(uint16_t));
  }

  struct Lines {
    const Reach reach;
    const int64_t steps, size, n;  // registers across the width; pixels of a line; lines
    Lines(const Image& x, const std::vector<Tap>& taps)
        : reach(taps),
          steps(tile_steps(x.width)),
          size(reach.left + steps * 32 + reach.right),
          n(reach.top + x.height + reach.bottom) {}
  };

  // As add_group, for bfloat16 on tiles: input as [image][C_in][line][pixel] with zeros around, gradients as pairs. Beyond
  // the width the gradient is zero. A tap multiplies those zeros by pixels outside its range, of which one that is not
  // finite would show.
  void add_group_on_tiles(const Image& x, const Image& grad, int64_t b0, int64_t n_images, bool with_bias,
                          int n_threads) {
    const Lines lines(x, weight.taps);
    const int64_t channel = lines.n * lines.size, image = depth * channel;
    const int64_t vector = x.height * lines.steps * kTileElements;  // of one image: 16 channels of the gradient
    const int64_t n_vectors = (weight.c_out + 15) / 16;
    uint16_t* const inputs = input.resize_bf16(n_images * image);
    uint16_t* const pairs = grads.resize_bf16(n_images * n_vectors * vector);
    parallel_chunks(n_images, n_threads, [&](int64_t i, int) {
      // Channels and pixels swapped: a "pixel" of this view is a channel.
      const Image turned{x.data,     x.dtype,    x.batch,    x.width,    x.height,
                         x.channels, x.stride_b, x.stride_w, x.stride_h, x.stride_c};
      uint16_t* const inside = inputs + i * image + lines.reach.top * lines.size + lines.reach.left;
      for (int64_t y = 0; y < x.height; ++y)
        load_pixels(*tiles, turned, b0 + i, y, 0, x.channels, 0, x.width, inside + y * lines.size, channel);
      std::vector<uint16_t> line(static_cast<size_t>(x.width * 32), 0);  // lanes without a channel stay zero
      for (const ChannelBlock& block : blocks) {
        const int64_t lanes = lanes_of(block, k);
        if (block.n_channels < lanes) std::fill(line.begin(), line.end(), uint16_t{0});
        uint16_t* to = pairs + (block.first / 16 * n_images + i * block.n_vectors) * vector;
        for (int64_t y = 0; y < x.height; ++y) {
          load_pixels(*tiles, grad, b0 + i, y, 0, x.width, block.first, block.n_channels, line.data(), lanes);
          for (int64_t s = 0; s < lines.steps; ++s)
            for (int64_t v = 0; v < block.n_vectors; ++v, to += kTileElements)
              tiles->pair(line.data() + s * 32 * lanes + v * 16, lanes, x.width - s * 32, 16, to);
        }
      }
    });

    const int64_t n_slices = depth / 32;
    parallel_chunks(static_cast<int64_t>(blocks.size()) * n_slices, n_threads, [&](int64_t task, int) {
      const size_t i = static_cast<size_t>(task / n_slices);
      const ChannelBlock& block = blocks[i];
      const int64_t first = task % n_slices * 32, lanes = lanes_of(block, k);
      for (int64_t n = 0; n < n_images; ++n) {
        checkpoint();
        const uint16_t* grad_at = pairs + (block.first / 16 * n_images + n * block.n_vectors) * vector;
        if (with_bias && first == 0) add_bias_of_pairs(block, grad_at, x.height, lines.steps);
        for (size_t t = 0; t < weight.taps.size(); ++t) {
          const Tap& tap = weight.taps[t];
          tiles->gradient({inputs + n * image + first * channel + (lines.reach.top + tap.dy) * lines.size +
                               lines.reach.left + tap.dx,
                           channel, lines.size, grad_at, x.height, lines.steps,
                           sums.get() + start[i] + (static_cast<int64_t>(t) * depth + first) * lanes, block.n_vectors});
        }
      }
    });
  }

  void add_bias_of_pairs(const ChannelBlock& block, const uint16_t* pairs, int64_t n_lines, int64_t n_steps) {
    for (int64_t y = 0; y < n_lines; ++y) {
      float sum[2][16] = {};
      for (int64_t s = 0; s < n_steps; ++s)
        for (int v = 0; v < block.n_vectors; ++v, pairs += kTileElements) tiles->add_pairs(pairs, 16, sum[v]);
      for (int64_t c = 0; c < block.n_channels; ++c)
        bias[static_cast<size_t>(block.first + c)] += static_cast<double>(sum[c / 16][c % 16]);
    }
  }

  void write(float* grad_weight, float* grad_bias, int n_threads) const {
    const int64_t n = weight.c_out * weight.c_in * weight.kernel_size;
    std::memset(grad_weight, 0, static_cast<size_t>(n) * sizeof(float));
    const auto copy = [&](size_t i, int64_t lane, int64_t in) {
      const int64_t out = blocks[i].first + lane, lanes = lanes_of(blocks[i], k);
      float* to = grad_weight + (out * weight.c_in + in) * weight.kernel_size;
      const float* from = sums.get() + start[i] + in * lanes + lane;
      for (const Tap& tap : weight.taps) {
        if (weight.active(tap.index, out, in)) to[tap.index] = *from;
        from += depth * lanes;
      }
    };
    parallel_chunks(static_cast<int64_t>(blocks.size()), n_threads, [&](int64_t task, int) {
      const size_t i = static_cast<size_t>(task);
      for (int64_t c0 = 0; c0 < weight.c_in; c0 += kSlice)
        for (int64_t lane = 0; lane < blocks[i].n_channels; ++lane)
          for (int64_t in = c0; in < std::min(weight.c_in, c0 + kSlice); ++in) copy(i, lane, in);
    });
    if (grad_bias)
      for (int64_t c = 0; c < weight.c_out; ++c) grad_bias[c] = static_cast<float>(bias[static_cast<size_t>(c)]);
  }
};

}  // namespace

void masked_conv_weight_grad(const Image& x, const Image& grad_out, const MaskedWeight& weight, float* grad_weight,
                             float* grad_bias, Isa isa, int n_threads) {
  if (weight.c_out == 0) return;
  n_threads = useful_threads(multiply_adds(x, weight), n_threads);
  WeightGrad work(weight, conv_engine(isa, x, grad_out, weight));
  if (!empty(x)) {
    // Groups of images bound the workspace. Their size depends on the shapes alone, and so does the order of additions.
    const int64_t group = std::max<int64_t>(1, kGroupBytes / work.image_bytes(x, grad_out.channels));
    for (int64_t b = 0; b < x.batch; b += group) {
      const int64_t n = std::min(group, x.batch - b);
      if (work.tiles)
        work.add_group_on_tiles(x, grad_out, b, n, grad_bias != nullptr, n_threads);
      else
        work.add_group(x, grad_out, b, n, grad_bias != nullptr, n_threads);
    }
  }
  work.write(grad_weight, grad_bias, n_threads);
}

}  // namespace fastvq
