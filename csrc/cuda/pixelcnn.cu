// One position of a gated PixelCNN in one launch: all layers, and at column 0 the vertical stack of the row before.
//
//   ids [B, H, W] -> logits [B, K]
//
// Images share nothing but weights, so a block has one image and no block ever waits for another. The weights are read
// once a position and image, and stay in the second-level cache. A linear map is made by all threads of the block:
//
//     thread (quad, part):  four outputs, a part of the input channels, P pixels: 4 P sums in registers
//     parts are added in order, in shared memory, so results depend on the sizes alone
//
// P is 1 for a position, 8 for the row of the vertical stack, where it saves seven of eight readings of the weights.
//
// weights, floats, rows padded to n = 4 ceil(outputs / 4); k the kernel size, R = k / 2; the first layer sees neither
// its own row nor its own position. Per layer:
//   V [R + 1 rows (first layer R), k, C, n], its bias [n]; L [C, n], bias [n] (the horizontal's added);
//   H [R + 1 columns (first layer R), C, n]; O [C, n] (residual, skip; the last layer: skip alone), bias [n]
// then W_1 [C, n], bias [n], W_2 [C, n], bias [n].
//
// cache, per image, per layer: above [R + 1, W, C], inputs of V, a ring of rows; left [W, C], inputs of H in this row;
// link [W, 2C], what the vertical stack adds to the horizontal gate. Then the vertical stack's end [W, C].
//
// Shared bytes: 4 (256 x 4 x 8 + 8 n + 3 C), n for 2C outputs.
#include "../fastvq_cuda.h"
#include "primitives.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = 256, kPixels = 8;

__host__ __device__ inline int64_t padded(int64_t n) { return (n + 3) / 4 * 4; }

size_t shared_bytes(int64_t channels) {
  return sizeof(float) * static_cast<size_t>(kThreads * 4 * kPixels + kPixels * padded(2 * channels) + 3 * channels);
}

// out[p][o] = bias[o] + sum over segments s and c of segment(s, p)[c] w[s][c][o], for o < n_out and P pixels; a segment
// may be null, for zeros. partial [256 x 4 x P] is shared; out is shared or not.
template <int P, class Segment>
__device__ void linear(const Segment& segment, int64_t n_segments, int64_t C, const float* w, const float* bias,
                       int64_t n_out, float* partial, float* out, int64_t out_pitch) {
  const int tid = threadIdx.x;
  const int64_t n = padded(n_out), quads = n / 4;
  const int wide = static_cast<int>(quads < kThreads ? quads : kThreads), parts = kThreads / wide;
  const int mine = tid % wide, part = tid / wide;
  for (int64_t base = 0; base < quads; base += wide) {
    const int64_t quad = base + mine;
    if (part < parts && quad < quads) {
      float sums[P][4];
#pragma unroll
      for (int p = 0; p < P; ++p)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[p][e] = 0;
      const int64_t first = C * part / parts, last = C * (part + 1) / parts;
      for (int64_t s = 0; s < n_segments; ++s) {
        const float* inputs[P];
#pragma unroll
        for (int p = 0; p < P; ++p) inputs[p] = segment(s, p);
#pragma unroll 4
        for (int64_t c = first; c < last; ++c) {
          const float4 four = *reinterpret_cast<const float4*>(w + (s * C + c) * n + quad * 4);
#pragma unroll
          for (int p = 0; p < P; ++p) {
            const float v = inputs[p] ? inputs[p][c] : 0.0f;
            sums[p][0] = __fmaf_rn(v, four.x, sums[p][0]);
            sums[p][1] = __fmaf_rn(v, four.y, sums[p][1]);
            sums[p][2] = __fmaf_rn(v, four.z, sums[p][2]);
            sums[p][3] = __fmaf_rn(v, four.w, sums[p][3]);
          }
        }
      }
#pragma unroll
      for (int p = 0; p < P; ++p)
#pragma unroll
        for (int e = 0; e < 4; ++e) partial[((part * P + p) * wide + mine) * 4 + e] = sums[p][e];
    }
    __syncthreads();
    for (int i = tid; i < P * wide * 4; i += kThreads) {
      const int p = i / (wide * 4);
      const int64_t o = base * 4 + i % (wide * 4);
      if (o >= n_out) continue;
      float sum = bias ? bias[o] : 0.0f;
      for (int q = 0; q < parts; ++q) sum += partial[q * (P * wide * 4) + i];
      out[p * out_pitch + o] = sum;
    }
    __syncthreads();
  }
}

__device__ __forceinline__ float gate(float a, float b) { return tanhf(a) / (1 + expf(-b)); }

// What a layer reads and keeps, found by walking the layers before it.
struct Layer {
  int64_t size, reach, seen;  // kernel size; rows and columns that are seen
  const float *v, *v_bias, *link, *link_bias, *h, *out, *out_bias;
  float *above, *left, *link_out;  // of the block's image
};

struct Walk {
  const SamplerStep& c;
  const float* weights;
  float* cache;
  __device__ explicit Walk(const SamplerStep& call)
      : c(call), weights(call.weights), cache(call.cache + static_cast<int64_t>(blockIdx.x) * call.cache_per_image) {}

  __device__ const float* matrix(int64_t depth, int64_t n_out) {
    const float* at = weights;
    weights += depth * padded(n_out);
    return at;
  }
  __device__ float* room(int64_t n) {
    float* at = cache;
    cache += n;
    return at;
  }
  __device__ Layer layer(int64_t l) {
    Layer y;
    const int64_t C = c.channels;
    y.size = c.kernel_sizes[l];
    y.reach = y.size / 2;
    y.seen = l == 0 ? y.reach : y.reach + 1;
    y.v = matrix(y.seen * y.size * C, 2 * C);
    y.v_bias = matrix(1, 2 * C);
    y.link = matrix(C, 2 * C);
    y.link_bias = matrix(1, 2 * C);
    y.h = matrix(y.seen * C, 2 * C);
    const int64_t n_out = l + 1 < c.n_layers ? 2 * C : C;
    y.out = matrix(C, n_out);
    y.out_bias = matrix(1, n_out);
    y.above = room((y.reach + 1) * c.width * C);
    y.left = room(c.width * C);
    y.link_out = room(c.width * 2 * C);
    return y;
  }
};

struct OneImage {
  const SamplerStep& c;
  int64_t b;

  __device__ const float* embedded(int64_t row, int64_t column) const {
    const int64_t id = c.ids[(b * c.height + row) * c.width + column];
    return id >= 0 && id < c.n_codes ? c.embedding + id * c.channels : nullptr;
  }
  // c^v, and 2C further c^h, at a position of the row; null where there is no condition.
  __device__ const float* condition(int64_t l, int64_t column) const {
    if (!c.condition) return nullptr;
    const int64_t y = c.row / (c.height / c.condition_height), x = column / (c.width / c.condition_width);
    return c.condition + (((l * c.batch + b) * c.condition_height + y) * c.condition_width + x) * 4 * c.channels;
  }
};

__device__ void vertical(const SamplerStep& c, const OneImage& image, float* partial, float* out) {
  const int64_t C = c.channels, W = c.width, pitch = padded(2 * C);
  const int tid = threadIdx.x;
  Walk walk(c);
  Layer y = walk.layer(0);
  for (int64_t l = 0; l < c.n_layers; ++l) {
    const Layer here = y;
    float* end;
    int64_t rings = 1;
    if (l + 1 < c.n_layers) {
      y = walk.layer(l + 1);
      end = y.above;
      rings = y.reach + 1;
    } else {
      end = walk.room(W * C);
    }
    end += c.row % rings * W * C;
    const auto input = [&](int64_t row, int64_t column) -> const float* {
      if (row < 0 || column < 0 || column >= W) return nullptr;
      return l == 0 ? image.embedded(row, column) : here.above + (row % (here.reach + 1) * W + column) * C;
    };
    for (int64_t x0 = 0; x0 < W; x0 += kPixels) {
      const auto seen = [&](int64_t s, int p) {
        return input(c.row - here.reach + s / here.size, x0 + p + s % here.size - here.reach);
      };
      linear<kPixels>(seen, here.seen * here.size, C, here.v, here.v_bias, 2 * C, partial, out, pitch);
      for (int64_t i = tid; i < kPixels * C; i += kThreads) {
        const int64_t p = i / C, k = i % C, x = x0 + p;
        if (x >= W) continue;
        float a = out[p * pitch + k], b = out[p * pitch + C + k];
        if (const float* add = image.condition(l, x)) {
          a += add[k];
          b += add[C + k];
        }
        end[x * C + k] = gate(a, b) + (l == 0 ? 0.0f : input(c.row, x)[k]);
      }
      __syncthreads();
      linear<kPixels>([&](int64_t, int p) -> const float* { return x0 + p < W ? end + (x0 + p) * C : nullptr; }, 1, C,
                      here.link, here.link_bias, 2 * C, partial, out, pitch);
      for (int64_t i = tid; i < kPixels * 2 * C; i += kThreads) {
        const int64_t p = i / (2 * C), k = i % (2 * C), x = x0 + p;
        if (x >= W) continue;
        const float* add = image.condition(l, x);
        here.link_out[x * 2 * C + k] = out[p * pitch + k] + (add ? add[2 * C + k] : 0.0f);
      }
      __syncthreads();
    }
  }
}

__global__ void __launch_bounds__(kThreads) step_kernel(SamplerStep c) {
  const int tid = threadIdx.x;
  const int64_t C = c.channels, j = c.column, pitch = padded(2 * C);
  float* partial = reinterpret_cast<float*>(shared_memory());
  float* out = partial + kThreads * 4 * kPixels;
  float *gated = out + kPixels * pitch, *skip = gated + C, *hidden = skip + C;
  const OneImage image{c, static_cast<int64_t>(blockIdx.x)};
  if (j == 0) vertical(c, image, partial, out);

  for (int64_t k = tid; k < C; k += kThreads) skip[k] = 0;
  Walk walk(c);
  Layer y = walk.layer(0);
  for (int64_t l = 0; l < c.n_layers; ++l) {
    const Layer here = y;
    const bool more = l + 1 < c.n_layers;
    if (more) y = walk.layer(l + 1);
    linear<1>([&](int64_t s, int) -> const float* {
                const int64_t x = j - here.reach + s;
                if (x < 0) return nullptr;
                return l == 0 ? image.embedded(c.row, x) : here.left + x * C;
              },
              here.seen, C, here.h, nullptr, 2 * C, partial, out, pitch);
    for (int64_t k = tid; k < C; k += kThreads) {
      const float* link = here.link_out + j * 2 * C;
      gated[k] = gate(out[k] + link[k], out[C + k] + link[C + k]);
    }
    __syncthreads();
    linear<1>([&](int64_t, int) -> const float* { return gated; }, 1, C, here.out, here.out_bias, more ? 2 * C : C,
              partial, out, pitch);
    for (int64_t k = tid; k < C; k += kThreads) {
      if (more) y.left[j * C + k] = out[k] + (l == 0 ? 0.0f : here.left[j * C + k]);
      skip[k] += out[more ? C + k : k];
    }
    __syncthreads();
  }
  if (!c.logits) return;
  for (int64_t k = tid; k < C; k += kThreads) gated[k] = fmaxf(skip[k], 0.0f);
  __syncthreads();
  const float* w_1 = walk.matrix(C, C);
  const float* b_1 = walk.matrix(1, C);
  linear<1>([&](int64_t, int) -> const float* { return gated; }, 1, C, w_1, b_1, C, partial, hidden, C);
  for (int64_t k = tid; k < C; k += kThreads) hidden[k] = fmaxf(hidden[k], 0.0f);
  __syncthreads();
  const float* w_2 = walk.matrix(C, c.n_codes);
  const float* b_2 = walk.matrix(1, c.n_codes);
  linear<1>([&](int64_t, int) -> const float* { return hidden; }, 1, C, w_2, b_2, c.n_codes, partial,
            c.logits + image.b * c.n_codes, c.n_codes);
}

}  // namespace

bool pixelcnn_fits(int64_t channels) { return shared_bytes(channels) <= shared_limit(); }

int pixelcnn_step(const SamplerStep& call, void* stream) {
  return launch(step_kernel, call.batch, kThreads, shared_bytes(call.channels), stream, call);
}

}  // namespace fastvq::cuda
