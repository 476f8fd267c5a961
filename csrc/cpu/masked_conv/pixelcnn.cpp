// A gated PixelCNN, one position after another.
//
// The vertical stack of row i sees rows above i alone, so it is computed for the whole row when the row begins; the
// horizontal stack then goes position by position, all images of the batch together. Between calls a cache keeps, a
// layer (P = floats a pixel, K = kernel size, R = K / 2):
//   v_in  [B, R + 1, W + 2R, P]   inputs of the vertical convolution: rows i - R ... i, row y at y % (R + 1), zeros
//                                 left and right
//   h_in  [B, R + W, P]           inputs of the horizontal convolution: zeros, then this row's positions
//   link  [B, W, blocks of (a, b)]  row i of the vertical stack as it enters the horizontal gate, biases included
// The cache does not grow with the number of positions. Weights are packed once as [block][part][bias, tap, channel], in the
// order they are read: a position reads all of them, so they come from the last-level cache.
#include "conv_kernels.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "image_io.h"
#include "pixelcnn_plan.h"
#include "../common/checkpoint.h"
#include "../common/parallel.h"

namespace fastvq {
namespace {

void pack_linear(const Plan& plan, const Linear& map, const float* weight, const float* bias, int64_t kernel_size,
                 const std::vector<Tap>& taps, float* packed) {
  const MaskedWeight w{weight, DType::f32, map.parts * map.n, map.depth, kernel_size, taps, 0, 1, true};
  float* at = packed + map.at;
  for (const ChannelBlock& block : plan.blocks_of(map))
    for (int64_t part = 0; part < map.parts; ++part) {
      checkpoint();
      const int64_t lanes = plan.width(block), first = part * map.n + block.first;
      std::memset(at, 0, static_cast<size_t>(lanes) * sizeof(float));
      std::memcpy(at, bias + first, static_cast<size_t>(block.n_channels) * sizeof(float));
      pack_block(w, false, first, block.n_channels, lanes, at + lanes);
      at += plan.floats_of(map, block);
    }
}

// Calls use(block, bias of part 0, weights of part 0, floats from one part to the next) for every block of a map.
template <class Use>
void for_blocks(const Plan& plan, const Linear& map, const float* packed, const Use& use) {
  const float* at = packed + map.at;
  for (const ChannelBlock& block : plan.blocks_of(map)) {
    const int64_t step = plan.floats_of(map, block);
    use(block, at, at + plan.width(block), step);
    at += map.parts * step;
  }
}

std::vector<int64_t> offsets(const std::vector<Tap>& taps, int64_t pixel) {
  std::vector<int64_t> result;
  for (const Tap& t : taps) result.push_back(t.dx * pixel);
  return result;
}

void relu(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = p[i] < 0.0f ? 0.0f : p[i];  // NaN stays
}

// Images [b0, b1) of a batch.
struct Run {
  const Plan& plan;
  const PixelCNNCall& call;
  int64_t b0, b1;

  const float* condition(int64_t layer, int64_t b, int64_t y, int64_t x, int64_t part) const {
    const PixelCNNShape& s = plan.s;
    const int64_t cy = y / (s.height / call.condition_height), cx = x / (s.width / call.condition_width);
    return call.condition +
           ((((layer * s.batch + b) * call.condition_height + cy) * call.condition_width + cx) * 4 + part) * s.channels;
  }
  void embed(int64_t b, int64_t y, int64_t x, float* dst) const {
    const PixelCNNShape& s = plan.s;
    const int64_t id = call.ids[(b * s.height + y) * s.width + x];
    if (id < 0 || id >= s.n_codes)
      throw std::invalid_argument("fastvq.ops.pixelcnn_step: ids must be in [0, " + std::to_string(s.n_codes) +
                                  "), got " + std::to_string(id) + "; encode with the codebook the model was made for");
    std::memcpy(dst, call.embedding + id * s.channels, static_cast<size_t>(s.channels) * sizeof(float));
  }

  // A map begins with zeros.
  void clear() const {
    for (const Layer& y : plan.layers) {
      std::memset(call.cache + y.v_in + b0 * y.v_image, 0, static_cast<size_t>((b1 - b0) * y.v_image) * sizeof(float));
      std::memset(call.cache + y.h_in + b0 * y.h_image, 0, static_cast<size_t>((b1 - b0) * y.h_image) * sizeof(float));
    }
  }

  // Where the first pixel of a row lies among those that the vertical convolution of a layer reads, from row - R on.
  // A row takes the place of one that no later row reads, so a call that comes again writes what it wrote.
  int64_t place(const Layer& y, int64_t row) const {
    return (row + y.reach + 1) % (y.reach + 1) * y.v_row + y.reach * plan.pixel;
  }

  void embed_row_above() const {
    const Layer& first = plan.layers[0];
    if (call.row == 0 || first.reach == 0) return;
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t x = 0; x < plan.s.width; ++x)
        embed(b, call.row - 1, x,
              call.cache + first.v_in + b * first.v_image + place(first, call.row - 1) + x * plan.pixel);
  }

  // Row `call.row` of the vertical stack, all layers. May be left and come again.
  void vertical() const {
    const PixelCNNShape& s = plan.s;
    const ConvKernels& k = plan.k;
    const int64_t widest = static_cast<int64_t>(k.max_vectors) * k.lanes, pixel = plan.pixel;
    Floats a(s.width * widest), b_(s.width * widest), gated(s.width * widest), last((b1 - b0) * s.width * pixel);
    embed_row_above();
    for (size_t l = 0; l < plan.layers.size(); ++l) {
      const Layer& y = plan.layers[l];
      const bool is_last = l + 1 == plan.layers.size();
      const auto here = [&](int64_t b) { return call.cache + y.v_in + b * y.v_image + place(y, call.row); };
      const auto next = [&](int64_t b) {
        if (is_last) return last.get() + (b - b0) * s.width * pixel;
        const Layer& n = plan.layers[l + 1];
        return call.cache + n.v_in + b * n.v_image + place(n, call.row);
      };
      std::vector<int64_t> segments;  // from here(b)
      for (const Tap& t : y.v_taps) segments.push_back(place(y, call.row + t.dy) - place(y, call.row) + t.dx * pixel);
      for_blocks(plan, y.v, call.weights,
                 [&](const ChannelBlock& block, const float* bias, const float* w, int64_t step) {
                   const int64_t lanes = plan.width(block);
                   float* parts[2] = {a.get(), b_.get()};
                   for (int64_t b = b0; b < b1; ++b) {
                     checkpoint();
                     for (int64_t part = 0; part < 2; ++part) {
                       k.product({here(b),
                                  pixel,
                                  1,
                                  segments.data(),
                                  y.v.segments,
                                  s.channels,
                                  w + part * step,
                                  parts[part],
                                  lanes,
                                  bias + part * step,
                                  s.width,
                                  block.n_vectors,
                                  {}});
                       if (call.condition)
                         for (int64_t x = 0; x < s.width; ++x) {
                           const float* c = condition(static_cast<int64_t>(l), b, call.row, x, part) + block.first;
                           for (int64_t i = 0; i < block.n_channels; ++i) parts[part][x * lanes + i] += c[i];
                         }
                     }
                     k.gate(a.get(), b_.get(), gated.get(), s.width * lanes);
                     for (int64_t x = 0; x < s.width; ++x) {
                       const float* from = here(b) + x * pixel + block.first;
                       float* to = next(b) + x * pixel + block.first;
                       for (int64_t i = 0; i < block.n_channels; ++i)
                         to[i] = l == 0 ? gated.get()[x * lanes + i] : from[i] + gated.get()[x * lanes + i];
                     }
                   }
                 });
      const int64_t none = 0;
      for_blocks(
          plan, y.link, call.weights, [&](const ChannelBlock& block, const float* bias, const float* w, int64_t step) {
            const int64_t lanes = plan.width(block);
            checkpoint();
            for (int64_t b = b0; b < b1; ++b)
              for (int64_t part = 0; part < 2; ++part) {
                float* out = call.cache + y.link_out + b * s.width * 2 * plan.lanes_c + 2 * block.first + part * lanes;
                k.product({next(b),
                           pixel,
                           1,
                           &none,
                           1,
                           s.channels,
                           w + part * step,
                           out,
                           2 * plan.lanes_c,
                           bias + part * step,
                           s.width,
                           block.n_vectors,
                           {}});
                if (call.condition)
                  for (int64_t x = 0; x < s.width; ++x) {
                    const float* c = condition(static_cast<int64_t>(l), b, call.row, x, 2 + part) + block.first;
                    for (int64_t i = 0; i < block.n_channels; ++i) out[x * 2 * plan.lanes_c + i] += c[i];
                  }
              }
          });
    }
  }

  // Position (call.row, call.column) of the horizontal stack, all layers, and the logits. May be left and come again.
  void horizontal() const {
    const PixelCNNShape& s = plan.s;
    const ConvKernels& k = plan.k;
    const int64_t n = b1 - b0, pixel = plan.pixel, j = call.column;
    const int64_t widest = static_cast<int64_t>(k.max_vectors) * k.lanes, none = 0;
    Floats a(n * widest), b_(n * widest), block_out(n * widest), gated(n * pixel), skip(n * plan.lanes_c);
    const auto at = [&](const Layer& y, int64_t b, int64_t x) {
      return call.cache + y.h_in + b * y.h_image + (y.reach + x) * pixel;
    };
    // n rows of a map applied to [n, pixel], block by block, into block_out.
    const auto apply = [&](const float* rows, const ChannelBlock& block, const float* bias, const float* w) {
      checkpoint();
      k.product(
          {rows, pixel, 1, &none, 1, s.channels, w, block_out.get(), plan.width(block), bias, n, block.n_vectors, {}});
      return block_out.get();
    };
    if (j > 0)
      for (int64_t b = b0; b < b1; ++b) embed(b, call.row, j - 1, at(plan.layers[0], b, j - 1));

    for (size_t l = 0; l < plan.layers.size(); ++l) {
      const Layer& y = plan.layers[l];
      const std::vector<int64_t> segments = offsets(y.h_taps, pixel);
      for_blocks(plan, y.h, call.weights, [&](const ChannelBlock& block, const float*, const float* w, int64_t step) {
        const int64_t lanes = plan.width(block);
        float* parts[2] = {a.get(), b_.get()};
        checkpoint();
        for (int64_t part = 0; part < 2; ++part) {
          for (int64_t i = 0; i < n; ++i)
            std::memcpy(
                parts[part] + i * lanes,
                call.cache + y.link_out + ((b0 + i) * s.width + j) * 2 * plan.lanes_c + 2 * block.first + part * lanes,
                static_cast<size_t>(lanes) * sizeof(float));
          k.product({at(y, b0, j),
                     y.h_image,
                     1,
                     segments.data(),
                     y.h.segments,
                     s.channels,
                     w + part * step,
                     parts[part],
                     lanes,
                     nullptr,
                     n,
                     block.n_vectors,
                     {}});
        }
        k.gate(a.get(), b_.get(), block_out.get(), n * lanes);
        for (int64_t i = 0; i < n; ++i)
          std::memcpy(gated.get() + i * pixel + block.first, block_out.get() + i * lanes,
                      static_cast<size_t>(block.n_channels) * sizeof(float));
      });
      for_blocks(
          plan, y.out, call.weights, [&](const ChannelBlock& block, const float* bias, const float* w, int64_t step) {
            const int64_t lanes = plan.width(block);
            if (y.out.parts == 2) {  // residual, then skip; the last layer has only the skip
              const Layer& next = plan.layers[l + 1];
              const float* residual = apply(gated.get(), block, bias, w);
              for (int64_t i = 0; i < n; ++i)
                for (int64_t c = 0; c < block.n_channels; ++c)
                  at(next, b0 + i, j)[block.first + c] =
                      l == 0 ? residual[i * lanes + c] : at(y, b0 + i, j)[block.first + c] + residual[i * lanes + c];
              bias += step;
              w += step;
            }
            k.product({gated.get(),
                       pixel,
                       1,
                       &none,
                       1,
                       s.channels,
                       w,
                       skip.get() + block.first,
                       plan.lanes_c,
                       l == 0 ? bias : nullptr,
                       n,
                       block.n_vectors,
                       {}});
          });
    }
    if (call.logits == nullptr) return;

    Floats hidden(n * pixel);
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(gated.get() + i * pixel, skip.get() + i * plan.lanes_c,
                  static_cast<size_t>(s.channels) * sizeof(float));
    for (int64_t i = 0; i < n; ++i) relu(gated.get() + i * pixel, s.channels);
    for_blocks(plan, plan.head_1, call.weights,
               [&](const ChannelBlock& block, const float* bias, const float* w, int64_t) {
                 const float* rows = apply(gated.get(), block, bias, w);
                 for (int64_t i = 0; i < n; ++i)
                   std::memcpy(hidden.get() + i * pixel + block.first, rows + i * plan.width(block),
                               static_cast<size_t>(block.n_channels) * sizeof(float));
               });
    for (int64_t i = 0; i < n; ++i) relu(hidden.get() + i * pixel, s.channels);
    for_blocks(plan, plan.head_2, call.weights,
               [&](const ChannelBlock& block, const float* bias, const float* w, int64_t) {
                 const float* rows = apply(hidden.get(), block, bias, w);
                 for (int64_t i = 0; i < n; ++i)
                   std::memcpy(call.logits + (b0 + i) * s.n_codes + block.first, rows + i * plan.width(block),
                               static_cast<size_t>(block.n_channels) * sizeof(float));
               });
  }
};

}  // namespace

PixelCNNSizes pixelcnn_sizes(const PixelCNNShape& shape, Isa isa) {
  const Plan plan(shape, isa);
  return {plan.weight_floats, plan.cache_floats};
}

void pixelcnn_pack(const PixelCNNShape& shape, const std::vector<const float*>& weights, float* packed, Isa isa) {
  const Plan plan(shape, isa);
  size_t i = 0;
  const std::vector<Tap> single{{0, 0, 0}};
  const auto pack = [&](const Linear& map, int64_t kernel_size, const std::vector<Tap>& taps) {
    pack_linear(plan, map, weights[i], weights[i + 1], kernel_size, taps, packed);
    i += 2;
  };
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const Layer& y = plan.layers[l];
    const int64_t size = shape.kernel_sizes[l];
    pack(y.v, size * size, y.v_taps);
    pack(y.link, 1, single);
    pack(y.h, size, y.h_taps);
    pack(y.out, 1, single);
  }
  pack(plan.head_1, 1, single);
  pack(plan.head_2, 1, single);
}

void pixelcnn_step(const PixelCNNShape& shape, const PixelCNNCall& call, Isa isa, int n_threads) {
  const Plan plan(shape, isa);
  n_threads = useful_threads(static_cast<double>(plan.weight_floats) * static_cast<double>(shape.batch), n_threads);
  // A thread takes images; few enough groups that a tile of the product stays full, since each reads all weights.
  constexpr int64_t kImages = 8;
  const int64_t n_groups = std::max<int64_t>(1, std::min<int64_t>(n_threads, (shape.batch + kImages - 1) / kImages));
  const auto run_of = [&](int64_t group) {
    return Run{plan, call, shape.batch * group / n_groups, shape.batch * (group + 1) / n_groups};
  };
  // A call that raises leaves the cache as one that did not end; it may come again, which writes all it reads.
  parallel_chunks(n_groups, n_threads, [&](int64_t group, int) {
    const Run run = run_of(group);
    if (call.column == 0) {
      if (call.row == 0) run.clear();
      run.vertical();
    }
    run.horizontal();
  });
}

}  // namespace fastvq
