// The layers of a gated PixelCNN, and where their weights and activations lie: pixelcnn.cpp computes them.
//
// One source includes this file; it is compiled for the baseline instruction set.
#pragma once
#include <cstdint>
#include <vector>

#include "image_io.h"

namespace fastvq {
namespace {

// A linear map of `segments` pixels of `depth` channels to `parts` times `n` channels.
struct Linear {
  int64_t parts, n, segments, depth, at;
};

struct Layer {
  int64_t reach, v_row, v_image, h_image;  // strides in floats
  std::vector<Tap> v_taps, h_taps;
  Linear v, link, h, out;
  int64_t v_in, h_in, link_out;  // places in the cache
};

struct Plan {
  const ConvKernels& k;
  const PixelCNNShape& s;
  int64_t pixel, lanes_c;
  std::vector<ChannelBlock> blocks_c, blocks_k;
  std::vector<Layer> layers;
  Linear head_1, head_2;
  int64_t weight_floats = 0, cache_floats = 0;

  Plan(const PixelCNNShape& shape, Isa isa)
      : k(conv_kernels(isa)),
        s(shape),
        pixel(pixel_stride(shape.channels)),
        blocks_c(split_channels(shape.channels, k)),
        blocks_k(split_channels(shape.n_codes, k)) {
    lanes_c = blocks_c.back().first + width(blocks_c.back());
    const int64_t n_layers = static_cast<int64_t>(s.kernel_sizes.size());
    for (int64_t l = 0; l < n_layers; ++l) {
      Layer y{};
      const int64_t size = s.kernel_sizes[static_cast<size_t>(l)];
      y.reach = size / 2;
      // The first layer sees the ids themselves, so neither row i nor position j; the others see features of both.
      for (int64_t dy = -y.reach; dy <= (l == 0 ? -1 : 0); ++dy)
        for (int64_t dx = -y.reach; dx <= y.reach; ++dx)
          y.v_taps.push_back({(y.reach + dy) * size + y.reach + dx, dy, dx});
      for (int64_t dx = -y.reach; dx <= (l == 0 ? -1 : 0); ++dx) y.h_taps.push_back({y.reach + dx, 0, dx});
      y.v_row = (s.width + 2 * y.reach) * pixel;
      y.v_image = (y.reach + 1) * y.v_row;
      y.h_image = (y.reach + s.width) * pixel;
      y.v = linear(2, s.channels, static_cast<int64_t>(y.v_taps.size()), s.channels);
      y.link = linear(2, s.channels, 1, s.channels);
      y.h = linear(2, s.channels, static_cast<int64_t>(y.h_taps.size()), s.channels);
      y.out = linear(l + 1 < n_layers ? 2 : 1, s.channels, 1, s.channels);
      y.v_in = take(s.batch * y.v_image);
      y.h_in = take(s.batch * y.h_image);
      y.link_out = take(s.batch * s.width * 2 * lanes_c);
      layers.push_back(y);
    }
    head_1 = linear(1, s.channels, 1, s.channels);
    head_2 = linear(1, s.n_codes, 1, s.channels);
  }

  int64_t width(const ChannelBlock& block) const { return static_cast<int64_t>(block.n_vectors) * k.lanes; }
  const std::vector<ChannelBlock>& blocks_of(const Linear& map) const {
    return map.n == s.channels ? blocks_c : blocks_k;
  }
  int64_t floats_of(const Linear& map, const ChannelBlock& block) const {
    return width(block) * (1 + map.segments * map.depth);
  }

 private:
  Linear linear(int64_t parts, int64_t n, int64_t segments, int64_t depth) {
    const Linear map{parts, n, segments, depth, weight_floats};
    for (const ChannelBlock& block : blocks_of(map)) weight_floats += parts * floats_of(map, block);
    return map;
  }
  int64_t take(int64_t n) {
    const int64_t at = cache_floats;
    cache_floats += n;
    return at;
  }
};

}  // namespace
}  // namespace fastvq
