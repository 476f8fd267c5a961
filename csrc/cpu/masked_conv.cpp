// Masked convolution on the CPU: packing, cutting into tasks, and what becomes of a finished row.
//
// Forward and input gradient are one routine (the gradient's taps are mirrored and its channels swapped):
//   1. weights are packed as [block of output channels][tap][input channel][block]: active taps only;
//   2. a task is a band of rows of one image: its input is copied to zero-padded channels-last scratch that fits the
//      second-level cache;
//   3. for each block of channels, for each row: one product over all taps and channels, sums in registers;
//   4. the row is stored in the output's own layout, or gated first.
// The order of additions for an element does not depend on bands, tiles or threads.
#include <algorithm>
#include <memory>

#include "image_io.h"
#include "parallel.h"

namespace fastvq {

const ConvKernels& conv_kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return conv_kernels_avx512();
  if (isa == Isa::avx2) return conv_kernels_avx2();
#endif
  (void)isa;
  return conv_kernels_generic();
}

std::vector<Block> split_channels(int64_t n_channels, const ConvKernels& kernels) {
  std::vector<Block> blocks;
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

constexpr int64_t kBandBytes = 512 << 10;     // of scratch a band's input may take
constexpr int64_t kGroupBytes = 2LL << 20;    // of scratch the weight gradient may take for each operand
constexpr int64_t kPixelsPerChunk = 128;      // whose gradients (128 x 48 floats) stay in the first-level cache
constexpr int64_t kSlice = 16;                // input channels that make one cache line of a pixel

int64_t lanes_of(const Block& block, const ConvKernels& k) { return static_cast<int64_t>(block.n_vectors) * k.lanes; }

float weight_at(const MaskedWeight& w, int64_t i) {
  return w.dtype == DType::bf16 ? Bf16::get(static_cast<const uint16_t*>(w.data)[i])
                                : static_cast<const float*>(w.data)[i];
}

}  // namespace

void pack_block(const MaskedWeight& w, bool swapped, int64_t first, int64_t n_channels, int64_t lanes, float* dst) {
  const int64_t depth = swapped ? w.c_out : w.c_in, tap_size = depth * lanes;
  std::memset(dst, 0, static_cast<size_t>(tap_size) * w.taps.size() * sizeof(float));
  const auto copy = [&](int64_t d, int64_t lane) {
    const int64_t out = swapped ? d : first + lane, in = swapped ? first + lane : d;
    const int64_t at = (out * w.c_in + in) * w.kernel_size;
    float* to = dst + d * lanes + lane;
    for (const Tap& tap : w.taps) {
      if (w.active(tap.index, out, in)) *to = weight_at(w, at + tap.index);
      to += tap_size;
    }
  };
  // Few channels of depth at a time: what is read is contiguous, what is written stays in the first-level cache.
  for (int64_t d0 = 0; d0 < depth; d0 += kSlice)
    for (int64_t lane = 0; lane < n_channels; ++lane)
      for (int64_t d = d0; d < std::min(depth, d0 + kSlice); ++d) copy(d, lane);
}

namespace {

struct Packed {
  std::vector<Block> blocks;
  std::vector<int64_t> start;  // of each block's weights
  Floats weights;
};

// `parts` = 2 for a gated convolution: blocks of a and b alternate, so that a pair is finished together.
std::unique_ptr<Packed> pack(const MaskedWeight& w, bool swapped, int64_t parts, const ConvKernels& k, int n_threads) {
  auto packed = std::make_unique<Packed>();
  const int64_t lanes_total = swapped ? w.c_in : w.c_out, depth = swapped ? w.c_out : w.c_in;
  for (const Block& block : split_channels(lanes_total / parts, k))
    for (int64_t part = 0; part < parts; ++part)
      packed->blocks.push_back({block.first + part * (lanes_total / parts), block.n_channels, block.n_vectors});
  int64_t size = 0;
  for (const Block& block : packed->blocks) {
    packed->start.push_back(size);
    size += static_cast<int64_t>(w.taps.size()) * depth * lanes_of(block, k);
  }
  packed->weights.resize(std::max<int64_t>(size, 1));
  parallel_chunks(static_cast<int64_t>(packed->blocks.size()), n_threads, [&](int64_t i, int) {
    const Block& block = packed->blocks[static_cast<size_t>(i)];
    pack_block(w, swapped, block.first, block.n_channels, lanes_of(block, k),
               packed->weights.get() + packed->start[static_cast<size_t>(i)]);
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

// What one thread needs while it works on bands.
struct BandScratch {
  Floats input, row_a, row_b, row_out, condition;
};

int64_t band_rows(const Image& x, const Reach& reach, int64_t pixel, int n_threads) {
  const int64_t row_bytes = (reach.left + x.width + reach.right) * pixel * static_cast<int64_t>(sizeof(float));
  int64_t rows = std::max<int64_t>(1, kBandBytes / row_bytes - reach.top - reach.bottom);
  // Enough bands for every thread, though none so thin that copying the rows around it outweighs its work.
  const int64_t per_image = (4 * n_threads + x.batch - 1) / x.batch;
  if (n_threads > 1) rows = std::min(rows, std::max<int64_t>(4, (x.height + per_image - 1) / per_image));
  const int64_t n_bands = (x.height + rows - 1) / rows;
  return (x.height + n_bands - 1) / n_bands;  // all about as high: a thin last band would read all weights for little
}

// The bias of a block, and for a gated convolution the part of the condition that is the same for every position.
void start_values(const float* bias, const Image* vector_condition, int64_t b, const Block& block, int64_t lanes,
                  const ConvKernels& k, float* dst) {
  std::memset(dst, 0, static_cast<size_t>(lanes) * sizeof(float));
  if (vector_condition) load_pixels(k, *vector_condition, b, 0, 0, 1, block.first, block.n_channels, dst, lanes);
  if (bias)
    for (int64_t c = 0; c < block.n_channels; ++c) dst[c] += bias[block.first + c];
}

void add_condition(const ConvKernels& k, const Image& condition, int64_t b, int64_t y, const Block& block,
                   int64_t lanes, BandScratch& s, float* row) {
  load_pixels(k, condition, b, y, 0, condition.width, block.first, block.n_channels, s.condition.get(), lanes);
  for (int64_t p = 0; p < condition.width; ++p)
    for (int64_t c = 0; c < block.n_channels; ++c) row[p * lanes + c] += s.condition.get()[p * lanes + c];
}

void convolve(const Image& x, const std::vector<Tap>& taps, const Packed& packed, const float* bias, const Gate* gate,
              const Image& out, const ConvKernels& k, int n_threads) {
  const Reach reach(taps);
  const int64_t pixel = pixel_stride(x.channels), width = reach.left + x.width + reach.right, row = width * pixel;
  const int64_t rows = band_rows(x, reach, pixel, n_threads), n_bands = (x.height + rows - 1) / rows;
  std::vector<int64_t> segments;
  for (const Tap& t : taps) segments.push_back((reach.top + t.dy) * row + (reach.left + t.dx) * pixel);
  const bool mapped = gate && gate->condition.data && (gate->condition.stride_h || gate->condition.stride_w);
  const Image* vector_condition = gate && gate->condition.data && !mapped ? &gate->condition : nullptr;
  const int64_t widest = static_cast<int64_t>(k.max_vectors) * k.lanes;

  std::vector<BandScratch> scratch(static_cast<size_t>(std::max(1, n_threads)));
  parallel_chunks(x.batch * n_bands, n_threads, [&](int64_t task, int thread) {
    const int64_t b = task / n_bands, y0 = task % n_bands * rows, n_rows = std::min(rows, x.height - y0);
    BandScratch& s = scratch[static_cast<size_t>(thread)];
    s.input.resize((reach.top + rows + reach.bottom) * row);
    s.row_a.resize((x.width + 1) * widest);
    if (gate) {
      s.row_b.resize((x.width + 1) * widest);
      s.row_out.resize(x.width * widest);
      if (mapped) s.condition.resize(x.width * widest);
    }
    load_padded(k, x, b, 0, x.channels, y0, n_rows, reach, s.input.get(), pixel);

    const size_t step = gate ? 2 : 1;
    for (size_t i = 0; i < packed.blocks.size(); i += step) {
      const Block& block = packed.blocks[i];
      const int64_t lanes = lanes_of(block, k);
      float* rows_of[2] = {s.row_a.get(), s.row_b.get()};  // the part after the last pixel holds the start values
      for (size_t part = 0; part < step; ++part)
        start_values(bias, vector_condition, b, packed.blocks[i + part], lanes, k, rows_of[part] + x.width * widest);
      for (int64_t y = 0; y < n_rows; ++y) {
        for (size_t part = 0; part < step; ++part) {
          k.product({s.input.get() + y * row, pixel, 1, segments.data(), static_cast<int64_t>(segments.size()),
                     x.channels, packed.weights.get() + packed.start[i + part], rows_of[part], lanes,
                     rows_of[part] + x.width * widest, x.width, block.n_vectors,
                     part == 0 ? lines_of(out, b, y0 + y, block.first, block.n_channels) : Touch{}});
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

double multiply_adds(const Image& image, const MaskedWeight& w) {
  return static_cast<double>(image.batch * image.height * image.width) * static_cast<double>(w.c_out * w.c_in) *
         static_cast<double>(w.taps.size());
}

bool empty(const Image& im) { return im.batch == 0 || im.channels == 0 || im.height == 0 || im.width == 0; }

}  // namespace

void masked_conv_forward(const Image& x, const MaskedWeight& weight, const float* bias, const Image& out, Isa isa,
                         int n_threads) {
  if (empty(out)) return;
  const ConvKernels& k = conv_kernels(isa);
  n_threads = useful_threads(n_threads, multiply_adds(out, weight));
  convolve(x, weight.taps, *pack(weight, false, 1, k, n_threads), bias, nullptr, out, k, n_threads);
}

void gated_masked_conv_forward(const Image& x, const MaskedWeight& weight, const float* bias, const Gate& gate,
                               const Image& out, Isa isa, int n_threads) {
  if (empty(out)) return;
  const ConvKernels& k = conv_kernels(isa);
  n_threads = useful_threads(n_threads, multiply_adds(out, weight));
  convolve(x, weight.taps, *pack(weight, false, 2, k, n_threads), bias, &gate, out, k, n_threads);
}

void masked_conv_input_grad(const Image& grad_out, const MaskedWeight& weight, const Image& grad_x, Isa isa,
                            int n_threads) {
  if (empty(grad_x)) return;
  const ConvKernels& k = conv_kernels(isa);
  n_threads = useful_threads(n_threads, multiply_adds(grad_x, weight));
  convolve(grad_out, mirrored(weight.taps), *pack(weight, true, 1, k, n_threads), nullptr, nullptr, grad_x, k,
           n_threads);
}

namespace {

// The weight gradient of one group of images. Sums over pixels run in one order: a task owns (block of output
// channels, chunk of input channels) and adds chunk of pixels after chunk of pixels.
struct WeightGrad {
  const ConvKernels& k;
  const MaskedWeight& weight;
  std::vector<Block> blocks;
  std::vector<int64_t> start;  // of each block's sums [tap][C_in][lane]
  Floats sums, input, grads;
  std::vector<double> bias;

  WeightGrad(const MaskedWeight& w, const ConvKernels& kernels)
      : k(kernels), weight(w), blocks(split_channels(w.c_out, kernels)), bias(static_cast<size_t>(w.c_out), 0.0) {
    int64_t size = 0;
    for (const Block& block : blocks) {
      start.push_back(size);
      size += static_cast<int64_t>(w.taps.size()) * w.c_in * lanes_of(block, k);
    }
    sums.resize(std::max<int64_t>(size, 1));
    std::memset(sums.get(), 0, static_cast<size_t>(size) * sizeof(float));
  }

  void add_bias(const Block& block, const float* grad, int64_t n_pixels) {
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
      for (const Block& block : blocks) {
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
          const int64_t n_rows = std::min(rows, x.height - y0);
          const float* grad_at = grads.get() + blocks[i].first * n_pixels + (n * x.height + y0) * x.width * lanes;
          if (with_bias && slice == 0) add_bias(blocks[i], grad_at, n_rows * x.width);
          for (size_t t = 0; t < weight.taps.size(); ++t) {
            const Tap& tap = weight.taps[t];
            k.product({slice_input + n * image + (y0 + reach.top + tap.dy) * row + (reach.left + tap.dx) * kSlice, 1,
                       kSlice, segments.data(), n_rows, x.width, grad_at,
                       sums.get() + start[i] + (static_cast<int64_t>(t) * x.channels + first) * lanes, lanes, nullptr,
                       std::min(kSlice, x.channels - first), blocks[i].n_vectors, {}});
          }
        }
    });
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
        from += weight.c_in * lanes;
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
  n_threads = useful_threads(n_threads, multiply_adds(x, weight));
  WeightGrad work(weight, conv_kernels(isa));
  if (!empty(x)) {
    // Groups bound the scratch. Their size depends on the shapes alone, so the order of additions does too.
    const int64_t channels = std::max(pixel_stride(x.channels), grad_out.channels);
    const int64_t image_bytes = (x.height + 10) * (x.width + 10) * channels * static_cast<int64_t>(sizeof(float));
    const int64_t group = std::max<int64_t>(1, kGroupBytes / image_bytes);
    for (int64_t b = 0; b < x.batch; b += group)
      work.add_group(x, grad_out, b, std::min(group, x.batch - b), grad_bias != nullptr, n_threads);
  }
  work.write(grad_weight, grad_bias, n_threads);
}

void gate_backward(const float* grad, const float* tanh_a, const float* sigmoid_b, float* grad_ab, int64_t n_outer,
                   int64_t n_inner, Isa isa, int n_threads) {
  const ConvKernels& k = conv_kernels(isa);
  n_threads = useful_threads(n_threads, 16.0 * static_cast<double>(n_outer * n_inner));
  constexpr int64_t kPart = 4096;  // so that few long rows (contiguous images) are shared out too
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
