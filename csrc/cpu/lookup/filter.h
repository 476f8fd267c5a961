// The lookup: a filter that certifies its winner or leaves a few candidates to the definition. The including file names
// the filter's operands first (lookup/filter_float32.h, lookup/filter_int16.h).
//
// Panels of kWidth codes meet tiles of kTileRows rows, the sums of all of them in registers:
//
//        panel [steps][kWidth]        1. pack a block of rows: tiles [steps][kTileRows], norms
//   tile    c c c ... c               2. chunk of panels by tile: scores, and the largest score of each lane of a panel
//  [steps] x . . . . . .              3. per row: can this chunk hold a winner? Then raise the row's lower bound
//         x . . . . . .                  L = max (score - bound) and list the codes with score + bound >= L
//         x . . . . . .               4. per row: one candidate is certified, several are rescored (resolve.h).
//                                        A list that overflowed, or a norm beyond the filter's range: all codes.
//
// The bound is derived in lookup/bounds.h. A chunk is small enough for the second-level cache with the block of rows,
// so a codebook of any size is read from memory once per block. Nothing of size N x K exists.
#pragma once
#include <cmath>
#include <cstdint>

#include "bounds.h"
#include "score_layout.h"

namespace fastvq {
namespace {

constexpr int64_t kChunkBytes = 256 << 10;
// A panel is read from the first-level cache for all tiles of a group but the first.
constexpr int kGroupTiles = 3;
// Narrower vectors have so few multiply-adds a score that storing every score would cost a third of the time. Their
// scores are recomputed for the few panels that may hold a winner.
constexpr int64_t kKeepScoresDim = 32;

inline int64_t panel_bytes(int64_t D) { return 4 * panel_floats(D); }

// Step 2 for one tile and a chunk of panels; the last panel of a codebook may be partly empty.
template <bool KeepScores>
void score_panels(const float* tiles, int n_tiles, const PackedCodes& packed, int64_t first, int n_panels,
                  float* scores, float* maxima) {
  const int64_t D = packed.dim, empty = packed.n_panels * kWidth - packed.n_codes;
  const int partial = first + n_panels == packed.n_panels && empty >= kLanes;
  const float* panel = panel_at(packed, first);
  const float* bias = packed.bias + first * kWidth;
  for (int p = 0; p < n_panels; ++p, panel += panel_floats(D), bias += kWidth) {
    const auto score = p < n_panels - partial                 ? score_tile<kTileVectors, KeepScores>
                       : empty >= (kTileVectors - 1) * kLanes ? score_tile<1, KeepScores>
                                                              : score_tile<kTileVectors - 1, KeepScores>;
    for (int t = 0; t < n_tiles; ++t)
      score(tiles + t * tile_floats(D), panel, bias, D, scores + t * kTileRows * kScoreStride + p * kWidth,
            maxima + t * kTileRows * kMaximaStride + p * kLanes);
  }
}

struct FilterWorkspace {
  float *tiles, *scores, *maxima, *eight;
  double* doubles;  // [2 D]
};

template <class Take>
FilterWorkspace filter_workspace(int64_t D, const Take& take) {
  FilterWorkspace s;
  s.scores = reinterpret_cast<float*>(take(4 * kGroupTiles * kTileRows * kScoreStride));
  s.maxima = reinterpret_cast<float*>(take(4 * kGroupTiles * kTileRows * kMaximaStride));
  s.tiles = reinterpret_cast<float*>(take(4 * (block_rows(D) / kTileRows * tile_floats(D) + 8)));
  s.eight = reinterpret_cast<float*>(take(4 * 8 * D));
  s.doubles = reinterpret_cast<double*>(take(8 * 2 * D));
  return s;
}

// Step 1 for a block of rows.
inline void pack_block(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                       FilterWorkspace& s, RowBounds* rows) {
  const int64_t D = packed.dim, n_tiles = (n + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < n_tiles; ++t) {
    const int64_t row = t * kTileRows, here = n - row < kTileRows ? n - row : kTileRows;
    Measured measured[kTileRows];
    with_element(lookup.x->dtype, [&](auto e) {
      pack_tile<decltype(e)>(*lookup.x, h, first + row, here,
                             packed.mean + (lookup.metric == Metric::euclidean ? 0 : D), s.tiles + t * tile_floats(D),
                             s.eight, s.doubles, measured);
    });
    for (int64_t i = 0; i < here; ++i)
      start_row(rows[row + i], packed, lookup.fast, std::sqrt(measured[i].square), std::sqrt(measured[i].lost));
  }
}

// All scores of a block of rows: visit(row, first code of a panel, its scores).
template <class Visit>
void score_block(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                 FilterWorkspace& s, RowBounds* rows, const Visit& visit) {
  pack_block(lookup, packed, h, first, n, s, rows);
  for (int64_t i0 = 0; i0 < n; i0 += kTileRows)
    for (int64_t p = 0; p < packed.n_panels; ++p) {
      score_panels<true>(s.tiles + i0 / kTileRows * tile_floats(packed.dim), 1, packed, p, 1, s.scores, s.maxima);
      for (int64_t i = 0; i < kTileRows && i0 + i < n; ++i) visit(i0 + i, p * kWidth, s.scores + i * kScoreStride);
    }
}

// Steps 1 to 3 for a block of rows.
inline void filter_block(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                         FilterWorkspace& s, RowBounds* rows) {
  pack_block(lookup, packed, h, first, n, s, rows);
  const int64_t D = packed.dim, n_tiles = (n + kTileRows - 1) / kTileRows;
  const bool keep_scores = D >= kKeepScoresDim;
  const int64_t most = keep_scores ? kChunkPanels : kLongChunkPanels, bytes = panel_bytes(D);
  const int64_t fit = kChunkBytes / bytes, chunk_panels = fit < 1 ? 1 : fit > most ? most : fit;
  const bool whole = packed.n_panels * bytes <= 2 * kChunkBytes;
  for (int64_t p0 = 0; p0 < packed.n_panels; p0 += chunk_panels) {
    if (p0 > 0) checkpoint();
    const Chunk chunk = chunk_at(packed, p0, chunk_panels);
    // After the last chunk the next block begins with the first.
    const int64_t next = p0 + chunk_panels < packed.n_panels ? p0 + chunk_panels : 0, left = packed.n_panels - next;
    const int64_t next_bytes = whole ? 0 : (left < chunk_panels ? left : chunk_panels) * bytes;
    const int64_t piece = next_bytes / n_tiles + 64;
    for (int64_t t = 0; t < n_tiles; ++t) {
      if (t * piece < next_bytes)
        prefetch(packed.panels + next * bytes + t * piece,
                 next_bytes - t * piece < piece ? next_bytes - t * piece : piece);
      if (t % kGroupTiles) continue;
      const int64_t g0 = t * kTileRows, here = n - g0 < kGroupTiles * kTileRows ? n - g0 : kGroupTiles * kTileRows;
      const float* tiles = s.tiles + t * tile_floats(D);
      const int n_group = static_cast<int>((here + kTileRows - 1) / kTileRows);
      if (keep_scores)
        score_panels<true>(tiles, n_group, packed, p0, chunk.n, s.scores, s.maxima);
      else
        score_panels<false>(tiles, n_group, packed, p0, chunk.n, s.scores, s.maxima);
      for (int64_t i = 0; i < here; ++i) {
        RowBounds& row = rows[g0 + i];
        const float* tile = tiles + i / kTileRows * tile_floats(D);
        const float* maxima = s.maxima + i * kMaximaStride;
        const V top = top_of(maxima, chunk.n);
        const V bound = RowBound(row).of_chunk(chunk);
        if (at_least(add(top, bound), broadcast(row.lower)))
          search_chunk(row, packed, chunk, top, bound, maxima, lookup.fast, [&](int p, float* buffer) -> const float* {
            if (keep_scores) return s.scores + i * kScoreStride + p * kWidth;
            const int64_t panel = p0 + p;
            score_row(tile, i % kTileRows, panel_at(packed, panel), packed.bias + panel * kWidth, D, buffer);
            return buffer;
          });
      }
    }
  }
}

}  // namespace
}  // namespace fastvq
