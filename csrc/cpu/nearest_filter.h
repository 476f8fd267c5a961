// The lookup: a float32 filter that proves its winner, or hands its few survivors to the definition.
//
// Panels of kWidth codes meet tiles of kTileRows rows, the sums of all of them in registers:
//
//        panel [D][kWidth]            1. pack a block of rows: tiles [D][kTileRows], norms
//   tile    c c c ... c               2. chunk of panels by tile: scores, and the largest score of each lane of a panel
//   [D]   x . . . . . .               3. per row: can this chunk hold a winner? Then raise the row's lower bound
//         x . . . . . .                  L = max (score - bound) and note the codes with score + bound >= L
//         x . . . . . .               4. per row: one code noted: it is proved. Several: the definition decides.
//                                        Too many, or a norm beyond the filter's range: every code by the definition.
//
// The bound is derived in nearest_pack.h. A chunk is small enough for the second-level cache with the block of rows,
// so a codebook of any size is read from memory once per block. Nothing of size N x K exists.
#pragma once
#include "nearest_pack.h"

namespace fastvq {
namespace {
// Operands are float32, as near as the bound counts them.
constexpr bool kRounded = false;
constexpr double kRowSlack = kSlack;
}  // namespace
}  // namespace fastvq

#include "nearest_rows.h"

namespace fastvq {
namespace {

constexpr int kChunkCodes = 768;
constexpr int kChunkPanels = kChunkCodes / kWidth, kLongChunkPanels = 2 * kChunkPanels;
constexpr int kScoreStride = kChunkCodes + 16;  // off a multiple of the first-level cache's sets
constexpr int kMaximaStride = kLongChunkPanels * kLanes + 16;
constexpr int64_t kChunkBytes = 256 << 10;
// A panel is read from the first-level cache for all tiles of a group but the first.
constexpr int kGroupTiles = 3;
// Narrower vectors leave so few multiply-adds a score that writing every score out would cost a third of the time;
// the scores of the few panels that matter are made again.
constexpr int64_t kKeepScoresDim = 32;

int64_t panel_bytes(int64_t dim) { return 4 * dim * kWidth; }
inline float* panel_at(const PackedCodes& packed, int64_t panel) {
  return reinterpret_cast<float*>(packed.panels) + panel * kWidth * packed.dim;
}

struct CodeLayout {
  static double chain(int64_t D) { return static_cast<double>(D) + 2; }
  static double underflow(int64_t D) { return (2 * static_cast<double>(D) + 10) * 0x1p-149; }
  static Placed put(const PackedCodes& packed, int64_t p, int j, const float*, const float* eight) {
    if ((j & 7) == 7) transpose8(eight, packed.dim, panel_at(packed, p) + j - 7, kWidth);
    return {0, 0};
  }
};

// Step 2 for one tile and the first `Vectors` vectors of one panel. tile [D][kTileRows], panel [D][kWidth].
template <int Vectors, bool KeepScores>
__attribute__((noinline)) void score_tile(const float* tile, const float* panel, const float* bias, int64_t D, float* scores,
                       float* maxima) {
  V sums[kTileRows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sums[i][v] = load(bias + v * kLanes);
  for (int64_t d = 0; d < D; ++d) {
    V codes[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) codes[v] = load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const V row = spread(tile[i]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[i][v] = mul_add(row, codes[v], sums[i][v]);
    }
    tile += kTileRows;
    panel += kWidth;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    V top = sums[i][0];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      if (KeepScores) store(scores + i * kScoreStride + v * kLanes, sums[i][v]);
      if (v) top = larger(top, sums[i][v]);
    }
    store(maxima + i * kMaximaStride, top);
  }
}

// Step 2 for one tile and a chunk of panels; the last panel of a codebook may be partly empty.
template <bool KeepScores>
void score_panels(const float* tiles, int n_tiles, const PackedCodes& packed, int64_t first, int n_panels,
                  float* scores, float* maxima) {
  const int64_t D = packed.dim, empty = packed.n_panels * kWidth - packed.n_codes;
  const int partial = first + n_panels == packed.n_panels && empty >= kLanes;
  const float* panel = panel_at(packed, first);
  const float* bias = packed.bias + first * kWidth;
  for (int p = 0; p < n_panels; ++p, panel += kWidth * D, bias += kWidth) {
    const auto score = p < n_panels - partial                    ? score_tile<kTileVectors, KeepScores>
                       : empty >= (kTileVectors - 1) * kLanes ? score_tile<1, KeepScores>
                                                              : score_tile<kTileVectors - 1, KeepScores>;
    for (int t = 0; t < n_tiles; ++t)
      score(tiles + t * kTileRows * D, panel, bias, D, scores + t * kTileRows * kScoreStride + p * kWidth,
            maxima + t * kTileRows * kMaximaStride + p * kLanes);
  }
}

// The scores of one row of a tile against one panel once more.
inline void score_row(const float* row, const float* panel, const float* bias, int64_t D, float* scores) {
  V sums[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) sums[v] = load(bias + v * kLanes);
  for (int64_t d = 0; d < D; ++d)
    for (int v = 0; v < kTileVectors; ++v)
      sums[v] = mul_add(spread(row[d * kTileRows]), load(panel + d * kWidth + v * kLanes), sums[v]);
  for (int v = 0; v < kTileVectors; ++v) store(scores + v * kLanes, sums[v]);
}

// Step 1 for one tile: rows [first, first + n) into out [D][kTileRows], room for 8 floats behind it.
template <class E>
__attribute__((noinline)) void pack_tile(const Rows& x, int64_t h, int64_t first, int64_t n, const float* mean, float* out, float* eight,
               void* room, double* squares) {
  using Real = typename E::Real;
  const int64_t D = x.dim;
  if (x.stride_d != 1 && x.stride_inner == 1 && n == kTileRows && first / x.n_inner == (first + n - 1) / x.n_inner) {
    // Channel-first: neighbouring rows are neighbours in memory.
    const auto* p = row_at<E>(x, h, first);
    for (int i = 0; i < kTileRows; ++i) squares[i] = 0;
    for (int64_t d = 0; d < D; ++d, p += x.stride_d)
      for (int i = 0; i < kTileRows; ++i) {
        const float v = static_cast<float>(E::get(p[i]) - static_cast<Real>(mean[d]));
        out[d * kTileRows + i] = v;
        squares[i] += static_cast<double>(v) * static_cast<double>(v);
      }
    return;
  }
  for (int i = 0; i < kTileRows; ++i) {
    if (i < n) {
      const auto* p = contiguous(row_at<E>(x, h, first + i), x.stride_d, D, room);
      squares[i] = place_code<E>(p, D, mean, 0, eight + i * D);
    } else {
      for (int64_t d = 0; d < D; ++d) eight[i * D + d] = 0;
    }
  }
  transpose8(eight, D, out, kTileRows);
}

struct FilterScratch {
  float *tiles, *scores, *maxima, *eight;
  double* room;  // [2 D]
};

template <class Take>
FilterScratch filter_scratch(int64_t D, const Take& take) {
  FilterScratch s;
  s.scores = reinterpret_cast<float*>(take(4 * kGroupTiles * kTileRows * kScoreStride));
  s.maxima = reinterpret_cast<float*>(take(4 * kGroupTiles * kTileRows * kMaximaStride));
  s.tiles = reinterpret_cast<float*>(take(4 * (block_rows(D) * D + 8)));
  s.eight = reinterpret_cast<float*>(take(4 * 8 * D));
  s.room = reinterpret_cast<double*>(take(8 * 2 * D));
  return s;
}

// Step 1 for a block of rows.
inline void pack_block(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                         FilterScratch& s, RowState* rows) {
  const int64_t D = packed.dim, n_tiles = (n + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < n_tiles; ++t) {
    const int64_t row = t * kTileRows, here = n - row < kTileRows ? n - row : kTileRows;
    double squares[kTileRows];
    with_element(lookup.x->dtype, [&](auto e) {
      pack_tile<decltype(e)>(*lookup.x, h, first + row, here,
                             packed.mean + (lookup.metric == Metric::euclidean ? 0 : D), s.tiles + row * D, s.eight,
                             s.room, squares);
    });
    for (int64_t i = 0; i < here; ++i) start_row(rows[row + i], packed, lookup.fast, std::sqrt(squares[i]), 0);
  }
}

// All scores of a block of rows: visit(row, first code of a panel, its scores).
template <class Visit>
void score_block(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                 FilterScratch& s, RowState* rows, const Visit& visit) {
  pack_block(lookup, packed, h, first, n, s, rows);
  for (int64_t i0 = 0; i0 < n; i0 += kTileRows)
    for (int64_t p = 0; p < packed.n_panels; ++p) {
      score_panels<true>(s.tiles + i0 * packed.dim, 1, packed, p, 1, s.scores, s.maxima);
      for (int64_t i = 0; i < kTileRows && i0 + i < n; ++i) visit(i0 + i, p * kWidth, s.scores + i * kScoreStride);
    }
}

// Steps 1 to 3 for a block of rows.
inline void filter_block(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                         FilterScratch& s, RowState* rows) {
  pack_block(lookup, packed, h, first, n, s, rows);
  const int64_t D = packed.dim, n_tiles = (n + kTileRows - 1) / kTileRows;
  const bool keep_scores = D >= kKeepScoresDim;
  const int64_t most = keep_scores ? kChunkPanels : kLongChunkPanels, panel_bytes = 4 * D * kWidth;
  const int64_t fit = kChunkBytes / panel_bytes, chunk_panels = fit < 1 ? 1 : fit > most ? most : fit;
  const bool whole = packed.n_panels * panel_bytes <= 2 * kChunkBytes;
  for (int64_t p0 = 0; p0 < packed.n_panels; p0 += chunk_panels) {
    const Chunk chunk = chunk_at(packed, p0, chunk_panels);
    // After the last chunk comes the first, for the next block.
    const int64_t next = p0 + chunk_panels < packed.n_panels ? p0 + chunk_panels : 0, left = packed.n_panels - next;
    const int64_t next_bytes = whole ? 0 : (left < chunk_panels ? left : chunk_panels) * panel_bytes;
    const int64_t piece = next_bytes / n_tiles + 64;
    for (int64_t t = 0; t < n_tiles; ++t) {
      if (t * piece < next_bytes)
        prefetch(packed.panels + next * panel_bytes + t * piece,
                 next_bytes - t * piece < piece ? next_bytes - t * piece : piece);
      if (t % kGroupTiles) continue;
      const int64_t g0 = t * kTileRows, here = n - g0 < kGroupTiles * kTileRows ? n - g0 : kGroupTiles * kTileRows;
      const float* tiles = s.tiles + g0 * D;
      const int n_group = static_cast<int>((here + kTileRows - 1) / kTileRows);
      if (keep_scores)
        score_panels<true>(tiles, n_group, packed, p0, chunk.n, s.scores, s.maxima);
      else
        score_panels<false>(tiles, n_group, packed, p0, chunk.n, s.scores, s.maxima);
      for (int64_t i = 0; i < here; ++i) {
        RowState& row = rows[g0 + i];
        const float* tile = tiles + i / kTileRows * kTileRows * D;
        const float* maxima = s.maxima + i * kMaximaStride;
        const V top = top_of(maxima, chunk.n);
        const V bound = RowBound(row).of_chunk(chunk);
        if (at_least(add(top, bound), spread(row.lower)))
          search_chunk(row, packed, chunk, top, bound, maxima, lookup.fast, [&](int p, float* room) -> const float* {
            if (keep_scores) return s.scores + i * kScoreStride + p * kWidth;
            const int64_t panel = p0 + p;
            score_row(tile + i % kTileRows, panel_at(packed, panel), packed.bias + panel * kWidth, D, room);
            return room;
          });
      }
    }
  }
}

// The ceiling: independent chains of multiply-adds on registers alone. Returns the operations done.
constexpr int kChains = kTileRows * kTileVectors;
double fma_chains(int64_t n, float* out) {
  V sums[kChains];
  const V a = spread(0.5f), b = spread(out[0] + 1);  // every chain stays near 2: zeros and denormals take other times
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) sums[i] = spread(static_cast<float>(i));
  for (int64_t t = 0; t < n; ++t) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) sums[i] = mul_add(sums[i], a, b);
  }
  V total = sums[0];
  for (int i = 1; i < kChains; ++i) total = larger(total, sums[i]);
  store(out, sub(total, total));
  return 2.0 * static_cast<double>(n) * kChains * kLanes;
}

}  // namespace
}  // namespace fastvq
