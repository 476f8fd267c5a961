// Positions of a gated PixelCNN, any number of them in one launch: the vertical stack at the start of a row, then for each
// position all layers, the head, and the id that is drawn. Or one position, and its logits.
//
//   ids [B, H, W], uniforms [B, H, W], wanted [B, H, W] -> ids where wanted
//
//   team       blocks that compute up to kVectors images (more, where the card is too small for another team);
//              no team waits for another
//   warps      share the outputs of a layer
//   barriers   a team waits between the writes and the reads of activations: 2 n_layers + 3 times a position,
//              n_layers + 1 times a row
//   weights    are read once a position and team, from the second-level cache, where they stay
//   grid       limited to the resident blocks: blocks of a team spin on each other, so all must be resident; without
//              cooperative launch a team is a single block
//
// A linear map: a warp makes four outputs of P vectors (pixels of a row, or images at a position).
//
//     lane: every 32nd input of each vector, 4 P sums in registers; lanes are then added in one order, whatever P
//
// so an output depends on its own inputs and the sizes alone: not on the batch, the card or how images are shared out.
//
// weights, floats: matrices [outputs / 4, segments, C, 4], biases [outputs], outputs filled up with zeros to whole fours.
// For each layer V, L, H, O, then the head W_1, W_2, each matrix followed by its bias. k is the layer's kernel size,
// R = k / 2:
//
//   matrix     segments                           outputs                              bias
//   V          R + 1 rows of k (first layer R)    gate's a, b in turn: a_0, b_0, ..    yes
//   L          1                                  the same                             yes, the horizontal's added
//   H          R + 1 columns (first layer R)      the same                             no: it is in L's
//   O          1                                  residual, then skip                  yes
//                                                 (last layer: skip alone)
//   W_1, W_2   1                                  C; K                                 yes
//
// cache, floats but for mass, per image:
//
//   mass     [K] doubles    once                         weights of the ids (sample_ids.cuh)
//   logits   [K]            once
//   gated, skip, hidden     once, [C] each
//   above    [R + 1, W, C]  each layer but the first     inputs of V, a ring of rows
//   left     [W, C]         each layer but the first     inputs of H in this row
//   link     [W, 2C]        each layer                   terms that the vertical stack adds to the horizontal gate
//   end      [W, C]         once                         the vertical stack's last outputs
//
// table, int64 [n_layers + 1, 11], places in the weights and in the cache (structs Layer and Ends):
//
//   row       in the weights                               in the cache
//   layer l   (k first) V, bias, L, bias, H, O, bias       above, left, link
//   last      W_1, bias, W_2, bias                         end, mass, logits, gated, skip, hidden
//
// Shared bytes: 8 for each warp.
#include "sample_ids.cuh"

namespace fastvq::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kLanes, kVectors = 4;
constexpr size_t kShared = sizeof(double) * kWarps;
constexpr int64_t kEntries = 11;

struct Layer {
  int64_t size, v, v_bias, link, link_bias, h, out, out_bias, above, left, links;
};
struct Ends {
  int64_t w_1, b_1, w_2, b_2, end, mass, logits, gated, skip, hidden, unused;
};
static_assert(sizeof(Layer) == kEntries * sizeof(int64_t) && sizeof(Ends) == sizeof(Layer), "one row of the table");

struct Team {
  int64_t first, n_images;  // images
  unsigned rank, size;  // blocks
  unsigned* arrived;
  unsigned target;

  __device__ explicit Team(const SamplerCall& c) : rank(blockIdx.x % c.team_size), size(c.team_size), target(0) {
    const int64_t n_teams = gridDim.x / c.team_size, team = blockIdx.x / c.team_size;
    first = c.batch * team / n_teams;
    n_images = c.batch * (team + 1) / n_teams - first;
    arrived = c.arrived + team;
  }
  __device__ int64_t warp() const { return static_cast<int64_t>(rank) * kWarps + threadIdx.x / kLanes; }

  // Barrier of the team: writes made before it by any thread are visible to all threads after it.
  __device__ void wait() {
    __syncthreads();
    if (size == 1) return;
    if (threadIdx.x == 0) {
      target += size;
      add_release(arrived, 1);
      while (static_cast<int>(load_acquire(arrived) - target) < 0) relax();
    }
    __syncthreads();
  }
};

// Sums over lanes: lane l gets value l / (32 / n) of n. In one order for any n: lanes 16 apart first.
template <int n, int mask = kLanes / 2>
__device__ __forceinline__ float over_lanes(float* sums) {
  if constexpr (n > 1) {
    const bool upper = threadIdx.x & mask;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      const float kept = upper ? sums[i + n / 2] : sums[i], given = upper ? sums[i] : sums[i + n / 2];
      sums[i] = kept + __shfl_xor_sync(kWarp, given, mask);
    }
    return over_lanes<n / 2, mask / 2>(sums);
  } else {
    float sum = sums[0];
#pragma unroll
    for (int m = mask; m > 0; m /= 2) sum += __shfl_xor_sync(kWarp, sum, m);
    return sum;
  }
}

__device__ __forceinline__ float gate(float a, float b) { return tanhf(a) / (1 + expf(-b)); }
__device__ __forceinline__ float relu(float v) { return v < 0 ? 0.0f : v; }  // NaN stays

enum Kind { vertical_gate, link, horizontal_gate, output, hidden, logits };

// One linear map and what becomes of it, for vectors that are the pixels of a row (vertical_gate, link) or the images at
// a position (all else).
struct Stage {
  Kind kind;
  int64_t l, row, column;
  Layer layer;
  int64_t n_out;
  int n_segments;
  const float *w, *bias;  // bias: or null
  int64_t from, to, skip;  // in the cache

  __device__ bool of_row() const { return kind == vertical_gate || kind == link; }

  __device__ Stage(const SamplerCall& c, int64_t number, int64_t y, int64_t x)
      : row(y), column(x), n_out(2 * c.channels), n_segments(1) {
    const Ends ends = reinterpret_cast<const Ends*>(c.table)[c.n_layers];
    const bool in_row = number < 2 * c.n_layers;
    const int64_t in_stack = in_row ? number : number - 2 * c.n_layers;
    l = in_stack / 2;
    const bool first = l == 0, last = l + 1 == c.n_layers;
    if (l == c.n_layers) {
      kind = in_stack % 2 ? logits : hidden;
      n_out = kind == logits ? c.n_codes : c.channels;
      w = c.weights + (kind == logits ? ends.w_2 : ends.w_1);
      bias = c.weights + (kind == logits ? ends.b_2 : ends.b_1);
      from = kind == logits ? ends.hidden : ends.skip;
      to = kind == logits ? ends.logits : ends.hidden;
      return;
    }
    layer = reinterpret_cast<const Layer*>(c.table)[l];
    const Layer next = reinterpret_cast<const Layer*>(c.table)[last ? l : l + 1];
    const int size = static_cast<int>(layer.size), seen = first ? size / 2 : size / 2 + 1;
    if (in_row) {
      const int64_t end = last ? ends.end : next.above + row % (next.size / 2 + 1) * c.width * c.channels;
      kind = in_stack % 2 ? link : vertical_gate;
      w = c.weights + (kind == link ? layer.link : layer.v);
      bias = c.weights + (kind == link ? layer.link_bias : layer.v_bias);
      if (kind == vertical_gate) n_segments = seen * size;
      from = kind == link ? end : layer.above;
      to = kind == link ? layer.links : end;
    } else if (in_stack % 2 == 0) {
      kind = horizontal_gate;
      w = c.weights + layer.h;
      bias = nullptr;
      n_segments = seen;
      from = layer.left;
      to = ends.gated;
    } else {
      kind = output;
      w = c.weights + layer.out;
      bias = c.weights + layer.out_bias;
      if (last) n_out = c.channels;
      from = ends.gated;
      to = last ? -1 : next.left;
      skip = ends.skip;
    }
  }
};

// P vectors of a stage: pixels x0, .. of image b0, or images b0, .. at x0.
template <int P>
struct Vectors {
  const SamplerCall& c;
  const Stage& stage;
  int64_t b0, x0, b_end, x_end;

  __device__ Vectors(const SamplerCall& call, const Stage& of, const Team& team, int64_t group)
      : c(call), stage(of), b0(team.first), x0(of.column), b_end(team.first + team.n_images), x_end(call.width) {
    if (of.of_row()) {
      const int64_t a_row = (c.width + P - 1) / P, image = group / a_row;
      b0 += image;
      x0 = (group - image * a_row) * P;
    } else {
      b0 += group * P;
    }
  }
  static __device__ int64_t groups(const SamplerCall& c, const Stage& of, const Team& team) {
    return of.of_row() ? team.n_images * ((c.width + P - 1) / P) : (team.n_images + P - 1) / P;
  }
  __device__ int64_t image(int p) const { return stage.of_row() ? b0 : b0 + p; }
  __device__ int64_t column(int p) const { return stage.of_row() ? x0 + p : x0; }
  __device__ bool there(int p) const { return image(p) < b_end && column(p) < x_end; }
  __device__ float* cache(int p) const { return c.cache + image(p) * c.cache_per_image; }

  // A vector of the layer's inputs, or null outside the map.
  __device__ const float* source(int p, int64_t y, int64_t x) const {
    if (y < 0 || x < 0 || x >= x_end) return nullptr;
    if (stage.l == 0) {
      const int64_t id = c.ids[(image(p) * c.height + y) * c.width + x];
      return id >= 0 && id < c.n_codes ? c.embedding + id * c.channels : nullptr;
    }
    const int64_t line = stage.kind == vertical_gate ? y % (stage.layer.size / 2 + 1) : 0;
    return cache(p) + stage.from + (line * c.width + x) * c.channels;
  }
  __device__ const float* input(int s, int p) const {
    if (!there(p)) return nullptr;
    if (stage.kind == link) return cache(p) + stage.from + column(p) * c.channels;
    if (stage.kind != vertical_gate && stage.kind != horizontal_gate) return cache(p) + stage.from;
    const int size = static_cast<int>(stage.layer.size), reach = size / 2;
    return source(p, stage.kind == vertical_gate ? stage.row - reach + s / size : stage.row,
                  column(p) + s % size - reach);
  }
  // c^v, and 2C further c^h; null where there is no condition.
  __device__ const float* condition(int p) const {
    if (!c.condition) return nullptr;
    const int64_t y = stage.row / (c.height / c.condition_height), x = column(p) / (c.width / c.condition_width);
    return c.condition +
           (((stage.l * c.batch + image(p)) * c.condition_height + y) * c.condition_width + x) * 4 * c.channels;
  }
  // Output o, and the one after it: a gate's b where o is its a.
  __device__ void use(int p, int64_t o, float y, float next) const {
    if (!there(p)) return;
    const int64_t C = c.channels, half = o / 2, odd = o % 2;
    float* mine = cache(p);
    switch (stage.kind) {
      case vertical_gate: {
        if (odd) return;
        if (const float* add = condition(p)) {
          y += add[half];
          next += add[C + half];
        }
        const float before = stage.l == 0 ? 0.0f : source(p, stage.row, column(p))[half];
        mine[stage.to + column(p) * C + half] = gate(y, next) + before;
        return;
      }
      case link: {
        const float* add = condition(p);
        mine[stage.to + column(p) * 2 * C + o] = y + (add ? add[(2 + odd) * C + half] : 0.0f);
        return;
      }
      case horizontal_gate: {
        const float* of_link = mine + stage.layer.links + column(p) * 2 * C + o;
        if (!odd) mine[stage.to + half] = gate(y + of_link[0], next + of_link[1]);
        return;
      }
      case output: {
        const bool last = stage.to < 0;
        if (!last && o < C) {
          mine[stage.to + column(p) * C + o] = y + (stage.l == 0 ? 0.0f : mine[stage.layer.left + column(p) * C + o]);
          return;
        }
        float& skip = mine[stage.skip + (last ? o : o - C)];
        y += stage.l == 0 ? 0.0f : skip;
        skip = last ? relu(y) : y;
        return;
      }
      case hidden:
        mine[stage.to + o] = relu(y);
        return;
      case logits:
        if (c.logits)
          c.logits[image(p) * c.n_codes + o] = y;
        else
          mine[stage.to + o] = y;
    }
  }
};

template <int P>
__device__ void run(const SamplerCall& c, const Stage& stage, const Team& team) {
  const int lane = threadIdx.x % kLanes;
  constexpr int kSame = kLanes / (4 * P);  // lanes that get the same sum
  const int64_t n_groups = Vectors<P>::groups(c, stage, team), items = (stage.n_out + 3) / 4 * n_groups;
  const int64_t n_warps = static_cast<int64_t>(team.size) * kWarps, me = team.warp();
  for (int64_t item = items * me / n_warps; item < items * (me + 1) / n_warps; ++item) {
    const int64_t quad = item / n_groups;
    const Vectors<P> vectors(c, stage, team, item - quad * n_groups);
    float sums[4 * P];
#pragma unroll
    for (int i = 0; i < 4 * P; ++i) sums[i] = 0;
    for (int s = 0; s < stage.n_segments; ++s) {
      const float* inputs[P];
#pragma unroll
      for (int p = 0; p < P; ++p) inputs[p] = vectors.input(s, p);
      const float* rows = stage.w + (quad * stage.n_segments + s) * c.channels * 4;
#pragma unroll 4
      for (int64_t k = lane; k < c.channels; k += kLanes) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(rows + k * 4));
#pragma unroll
        for (int p = 0; p < P; ++p) {
          const float x = inputs[p] ? inputs[p][k] : 0.0f;
          sums[4 * p] = __fmaf_rn(x, four.x, sums[4 * p]);
          sums[4 * p + 1] = __fmaf_rn(x, four.y, sums[4 * p + 1]);
          sums[4 * p + 2] = __fmaf_rn(x, four.z, sums[4 * p + 2]);
          sums[4 * p + 3] = __fmaf_rn(x, four.w, sums[4 * p + 3]);
        }
      }
    }
    const int mine = lane / kSame;
    const int64_t o = quad * 4 + mine % 4;
    float y = over_lanes<4 * P>(sums);
    if (stage.bias) y += __ldg(stage.bias + o);
    const float next = __shfl_xor_sync(kWarp, y, kSame);
    if (lane % kSame == 0 && o < stage.n_out) vectors.use(mine / 4, o, y, next);
  }
}

// Whether some image of the team has an id to be drawn here.
__device__ bool any_wanted(const SamplerCall& c, const Team& team, int64_t position) {
  bool any = false;
  for (int64_t b = team.first; b < team.first + team.n_images; ++b)
    any = any || c.wanted[b * c.height * c.width + position];
  return any;
}

__device__ void draw(const SamplerCall& c, const Team& team, int64_t position) {
  const Ends ends = reinterpret_cast<const Ends*>(c.table)[c.n_layers];
  for (int64_t b = team.first + team.rank; b < team.first + team.n_images; b += team.size) {
    const int64_t at = b * c.height * c.width + position;
    if (!c.wanted[at]) continue;
    float* cache = c.cache + b * c.cache_per_image;
    const int64_t id = sample_ids(cache + ends.logits, c.n_codes, c.uniforms[at], c.choice,
                                  reinterpret_cast<double*>(cache + ends.mass), shared_memory());
    if (threadIdx.x == 0) c.ids[at] = id;
  }
}

__global__ void __launch_bounds__(kThreads, 1) sampler_kernel(const __grid_constant__ SamplerCall c) {
  Team team(c);
  const int64_t in_row = 2 * c.n_layers, of_position = 2 * in_row;  // stages; then two of the head
  for (int64_t position = c.first; position < c.first + c.n_positions; ++position) {
    const int64_t row = position / c.width, column = position - row * c.width;
    const bool ends_here = !c.logits && !any_wanted(c, team, position);
    for (int64_t number = column == 0 ? 0 : in_row; number < of_position + (ends_here ? 0 : 2); ++number) {
      const Stage stage(c, number, row, column);
      if (!stage.of_row() && team.n_images == 1)
        run<1>(c, stage, team);
      else
        run<kVectors>(c, stage, team);
      // The next layer's vertical gate reads what the link read.
      if (stage.kind != link || number + 1 == in_row) team.wait();
    }
    if (c.logits || ends_here) continue;
    draw(c, team, position);
    team.wait();
  }
}

}  // namespace

int pixelcnn_positions(const SamplerCall& call, void* stream) {
  const int64_t needed = ((2 * call.channels + 3) / 4 + kWarps - 1) / kWarps;  // a warp for each four of 2C outputs
  const int64_t resident = resident_blocks(sampler_kernel, kThreads, kShared);
  SamplerCall c = call;
  c.team_size = static_cast<unsigned>(needed < resident ? needed : resident > 0 ? resident : 1);
  if (c.team_size == 1) return launch(sampler_kernel, c.batch, kThreads, kShared, stream, c);
  const int64_t wished = (c.batch + kVectors - 1) / kVectors, room = resident / c.team_size;
  return launch_together(sampler_kernel, (wished < room ? wished : room) * c.team_size, kThreads, kShared, stream, c);
}

}  // namespace fastvq::cuda
