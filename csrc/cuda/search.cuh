// The filter of a block of rows over a packed codebook, and the choice among the candidates. Used by every kernel that
// looks up codes; lookup.cu shows the order of the steps.
//
//   rows [kRows, D] fp16 in shared memory, for the whole search        (filter_rows.cuh)
//   codes stream through shared memory, a stage of four slabs (16 dims of 64 codes each) for each group of warps
//
//         4 warps:  kRowWarps x kCodeWarps;  a warp holds kRowTiles x 16 rows, and 64 codes at a time
//
//            codes 0..63   codes 64..127  ...          scores of a tile: 8 kRowTiles x 4 a thread; row g of sixteen is
//     rows  +------------+------------+                 in the four lanes of quad g, and row g + 8 too
//    0..31  | warp 0     |  (the same |
//    32..63 | warp 1     |   warps)   |
//     ...   +------------+------------+
//
// Cost: one multiply-add and one maximum per score; only the maximum where the bias is part of the product.
//
// Candidates: limit is the best certain score so far, max_j (v_j - bound_j). A thread tests its scores of a row one by one
// only where their largest could still win (largest + bound >= limit), and pushes those that could onto the row's list. A
// full list is pruned of candidates below the current limit. A list that stays full leaves the row unresolved.
//
// Shared bytes: 2 kRows width + kStages kCodeWarps 9216 + kRows (16 + 4 + 8 + kCodeWarps (4 + 4 + 8 kListed)).
#pragma once
#include "exact.cuh"
#include "filter_rows.cuh"

namespace fastvq::cuda {

constexpr int kSearchThreads = 128, kStageSlabs = 4;
constexpr int kStagedSlab = kSlabBytes + kTileCodes * 4;  // behind a tile's last slab, the bias of its codes
constexpr int kListed = 8;  // length of a row's list; kListed + 1 marks a closed row

struct Candidate {
  uint32_t code;
  float score;
};

// part: of operands in two parts (filter.cuh), or 0.
template <int rows, int row_warps, int row_tiles, int stages, int unit, int blocks, int part = 0>
struct Shape {
  static constexpr int kRows = rows, kRowWarps = row_warps, kCodeWarps = 4 / row_warps, kRowTiles = row_tiles;
  static constexpr int kStages = stages, kUnit = unit, kBlocks = blocks, kSlots = 2 * row_tiles;
  static constexpr int kPart = part;
  static constexpr int kStageBytes = kCodeWarps * kStageSlabs * kStagedSlab;
  static_assert(rows == row_warps * row_tiles * 16, "each row belongs to one warp, or to one of each group of codes");
};

template <class S>
struct SearchMemory {
  unsigned char *operand, *stages;
  RowInfo* info;  // [kRows]
  int64_t* chosen;  // [kRows]
  Candidate* listed;  // [kRows][kCodeWarps * kListed]
  float* limit;  // [kCodeWarps][kRows]
  int* count;  // [kCodeWarps][kRows]
  int*
      state;  // [kRows] RowStatus during the search; then the number of candidates, or minus the status of a row not searched

  static constexpr size_t kRowBytes = sizeof(RowInfo) + sizeof(int64_t) + sizeof(int) +
                                      S::kCodeWarps * (kListed * sizeof(Candidate) + sizeof(float) + sizeof(int));
  static size_t bytes(int width) {
    return static_cast<size_t>(S::kRows) * (2 * static_cast<size_t>(width) + kRowBytes) +
           S::kStages * static_cast<size_t>(S::kStageBytes);
  }
  __device__ __forceinline__ SearchMemory(unsigned char* base, int width) {
    operand = base;
    stages = operand + S::kRows * width * 2;
    info = reinterpret_cast<RowInfo*>(stages + S::kStages * S::kStageBytes);
    chosen = reinterpret_cast<int64_t*>(info + S::kRows);
    listed = reinterpret_cast<Candidate*>(chosen + S::kRows);
    limit = reinterpret_cast<float*>(listed + S::kRows * S::kCodeWarps * kListed);
    count = reinterpret_cast<int*>(limit + S::kRows * S::kCodeWarps);
    state = count + S::kRows * S::kCodeWarps;
  }
};

// One head of the packed codebook.
struct PackedHead {
  const unsigned char* slabs;
  const float* bias;
  const CodeBound* bounds;
  const TileInfo* tiles;
  int64_t n_tiles;
  int n_steps;

  __device__ __forceinline__ PackedHead(const PackedCodebook& p, int64_t h)
      : slabs(p.slabs + h * p.n_tiles * p.n_steps * kSlabBytes),
        bias(p.bias + h * p.n_tiles * kTileCodes),
        bounds(p.bounds + h * p.n_tiles * kTileCodes),
        tiles(p.tiles + h * p.n_tiles),
        n_tiles(p.n_tiles),
        n_steps(p.n_steps) {}
  __device__ __forceinline__ float bound(const RowInfo& row, int64_t k) const {
    const CodeBound code = bounds[k];
    return fmaf(row.rho, code.reach, fmaf(row.norm, code.slope, code.offset + row.own));
  }
};

// Copies the stream of slabs into the stages: for each group of warps the steps of tile group, kCodeWarps + group, ...
template <class S>
struct Stream {
  const PackedHead& head;
  unsigned char* stages;
  int64_t tile = 0;
  int step = 0, stage = 0;

  __device__ __forceinline__ Stream(const PackedHead& h, unsigned char* s) : head(h), stages(s) {}
  __device__ __forceinline__ void copy_stage() {
    unsigned char* to = stages + stage * S::kStageBytes + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < kStageSlabs; ++i) {
#pragma unroll
      for (int w = 0; w < S::kCodeWarps; ++w)
        if (tile + w < head.n_tiles) {
          copy_async(to + (w * kStageSlabs + i) * kStagedSlab,
                     head.slabs + ((tile + w) * head.n_steps + step) * kSlabBytes + threadIdx.x * 16);
          if (step + 1 == head.n_steps && threadIdx.x < kTileCodes / 4)
            copy_async(to + (w * kStageSlabs + i) * kStagedSlab + kSlabBytes,
                       head.bias + (tile + w) * kTileCodes + threadIdx.x * 4);
        }
      if (++step == head.n_steps) {
        step = 0;
        tile += S::kCodeWarps;
      }
    }
    copy_commit();
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  }
};

// The search of one warp's rows. Slot s of a thread is row 16 (s / 2) + 8 (s % 2) + lane / 4 of them.
template <class S>
struct WarpSearch {
  const PackedHead& head;
  const SearchMemory<S>& m;
  bool fast;
  int lane, group, first;  // group: which codes; first: of the warp's rows in the block
  bool active;  // whether any of its rows is searched
  float score[S::kRowTiles][8][4];

  __device__ __forceinline__ WarpSearch(const PackedHead& h, const SearchMemory<S>& memory, bool is_fast)
      : head(h), m(memory), fast(is_fast) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    group = warp / S::kRowWarps;
    first = warp % S::kRowWarps * S::kRowTiles * 16;
    const int row = first + lane % (S::kRowTiles * 16);
    const bool open = m.state[row] == searched;
    active = __any_sync(kWarp, open);
    if (lane < S::kRowTiles * 16) {
      m.limit[group * S::kRows + row] = open ? kLowestScore : HUGE_VALF;  // no score passes a closed row's limit
      m.count[group * S::kRows + row] = 0;
    }
    __syncwarp();
    clear();
  }
  __device__ __forceinline__ int row_of(int s) const { return first + s / 2 * 16 + s % 2 * 8 + lane / 4; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[r][j][i] = 0;
  }

  __device__ __forceinline__ void multiply(int step, const unsigned char* slabs) {
    const unsigned char* rows = m.operand + (first / 16 * head.n_steps + step) * 512 + lane * 16;
#pragma unroll
    for (int u = 0; u < S::kUnit; ++u) {
      uint32_t a[S::kRowTiles][4];
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        const uint4 v = *reinterpret_cast<const uint4*>(rows + (r * head.n_steps + u) * 512);
        a[r][0] = v.x;
        a[r][1] = v.y;
        a[r][2] = v.z;
        a[r][3] = v.w;
      }
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const uint4 b = *reinterpret_cast<const uint4*>(slabs + u * kStagedSlab + pair * 512 + lane * 16);
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) {
          multiply_add_tile(score[r][2 * pair], a[r], b.x, b.y);
          multiply_add_tile(score[r][2 * pair + 1], a[r], b.z, b.w);
        }
      }
    }
  }

  // `last`: the tile's last slab, which its codes' bias follows.
  __device__ __forceinline__ void finish_tile(int64_t tile, const unsigned char* last) {
    const TileInfo info = head.tiles[tile];
    const float* bias = reinterpret_cast<const float*>(last + kSlabBytes) + lane % 4 * 2;
    const bool complete =
        S::kPart && !(info.flags & kSeparateBias);  // the product holds the bias; only the row's lift is missing
    unsigned near = 0;
#pragma unroll
    for (int s = 0; s < S::kSlots; ++s) {
      const float inverse = m.info[row_of(s)].inverse;
      float top = kUnreachable;
      if (complete) {
#pragma unroll
        for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(score[s / 2][j][s % 2 * 2], score[s / 2][j][s % 2 * 2 + 1]));
        top *= inverse;
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 b = *reinterpret_cast<const float2*>(bias + 8 * j);
          float* v = &score[s / 2][j][s % 2 * 2];
          v[0] = fmaf(v[0], inverse, b.x);
          v[1] = fmaf(v[1], inverse, b.y);
          top = fmaxf(top, fmaxf(v[0], v[1]));
        }
      }
      if (!(top + tile_bound(info, s) < m.limit[group * S::kRows + row_of(s)])) near |= 1u << s;
    }
    if (__any_sync(kWarp, near != 0)) {
#pragma unroll 1
      for (int s = 0; s < S::kSlots; ++s)
        if (__any_sync(kWarp, near >> s & 1)) {
          float v[16];
          take(s, v, complete ? m.info[row_of(s)].inverse : 1);
          list_candidates(s, v, tile, info.flags & kIrregular, tile_bound(info, s));
        }
    }
    clear();
  }
  __device__ __forceinline__ float tile_bound(const TileInfo& tile, int s) const {
    const RowInfo row = m.info[row_of(s)];
    return fmaf(row.rho, tile.reach, fmaf(row.norm, tile.slope, tile.offset + row.own));
  }
  // The scores of one slot. The loop selects it at compile time because registers cannot be indexed at run time.
  __device__ __forceinline__ void take(int slot, float (&v)[16], float factor) const {
#pragma unroll
    for (int s = 0; s < S::kSlots; ++s)
      if (s == slot)
#pragma unroll
        for (int i = 0; i < 16; ++i)
          v[i] = S::kPart ? score[s / 2][i / 2][s % 2 * 2 + i % 2] * factor : score[s / 2][i / 2][s % 2 * 2 + i % 2];
  }

  // Rotates the next score to the front. A loop that is not unrolled (to save registers) can only read a fixed register.
  static __device__ __forceinline__ void turn(float (&v)[16]) {
    const float front = v[0];
#pragma unroll
    for (int i = 0; i < 15; ++i) v[i] = v[i + 1];
    v[15] = front;
  }

  // Raises the limit of the rows of slot s, and pushes the scores v of the tile that could win onto their lists.
  __device__ __forceinline__ void list_candidates(int s, float (&v)[16], int64_t tile, bool irregular, float bound) {
    const int row = row_of(s), at_row = group * S::kRows + row;
    const RowInfo info = m.info[row];
    const int64_t k0 = tile * kTileCodes + lane % 4 * 2;
    float certain = kUnreachable;
    if (irregular) {
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        certain = fmaxf(certain, v[0] - head.bound(info, k0 + i / 2 * 8 + i % 2));
        turn(v);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) certain = fmaxf(certain, v[i]);
      certain -= bound;
    }
    certain = fmaxf(certain, __shfl_xor_sync(kWarp, certain, 1));
    certain = fmaxf(certain, __shfl_xor_sync(kWarp, certain, 2));
    float limit = fmaxf(m.limit[at_row], certain);
    unsigned found = 0;
    if (irregular) {
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        if (!(v[0] + head.bound(info, k0 + i / 2 * 8 + i % 2) < limit)) found |= 1u << i;
        turn(v);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (!(v[i] + bound < limit)) found |= 1u << i;
    }
    // Each lane of the quad writes behind those before it.
    int upto = __popc(found);
    const int own = upto;
    int other = __shfl_up_sync(kWarp, upto, 1);
    if (lane % 4 >= 1) upto += other;
    other = __shfl_up_sync(kWarp, upto, 2);
    if (lane % 4 >= 2) upto += other;
    const int total = __shfl_sync(kWarp, upto, lane | 3);
    Candidate* list = m.listed + (row * S::kCodeWarps + group) * kListed;
    int count = m.count[at_row];
    const bool full = count <= kListed && count + total > kListed;
    if (__any_sync(kWarp, full)) {
      if (full && lane % 4 == 0) count = prune(list, count, info, limit);
      count = __shfl_sync(kWarp, count, lane & ~3);
      if (full && count + total > kListed && !fast) {
        limit = HUGE_VALF;  // closed
        count = kListed + 1;
        found = 0;
      }
    }
    int at = count + upto - own;
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (found >> i & 1) {
        if (at < kListed) list[at] = {static_cast<uint32_t>(k0 + i / 2 * 8 + i % 2), v[i]};
        ++at;
      }
    __syncwarp();  // all have read what is written now
    if (lane % 4 == 0) {
      m.limit[at_row] = limit;
      m.count[at_row] = count > kListed ? count : count + total < kListed ? count + total : kListed;
    }
    __syncwarp();
  }

  __device__ __forceinline__ int prune(Candidate* list, int n, const RowInfo& row, float least) const {
    int kept = 0;
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const Candidate c = list[i];
      if (!(c.score + head.bound(row, c.code) < least)) list[kept++] = c;
    }
    return kept;
  }
};

}  // namespace fastvq::cuda
