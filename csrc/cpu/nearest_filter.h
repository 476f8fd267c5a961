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
#include "nearest_exact.h"
#include "nearest_pack.h"

namespace fastvq {
namespace {

constexpr int kWidth = kTileVectors * kLanes;
constexpr int kChunkCodes = 768;
constexpr int kChunkPanels = kChunkCodes / kWidth, kLongChunkPanels = 2 * kChunkPanels;
constexpr int kScoreStride = kChunkCodes + 16;  // off a multiple of the first-level cache's sets
constexpr int kMaximaStride = kLongChunkPanels * kLanes + 16;
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int kMaxNoted = 16;
// A panel is read from the first-level cache for all tiles of a group but the first.
constexpr int kGroupTiles = 3;
// Narrower vectors leave so few multiply-adds a score that writing every score out would cost a third of the time;
// the scores of the few panels that matter are made again.
constexpr int64_t kKeepScoresDim = 32;

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

// Asks for a piece of what is needed next, so that it is in the second-level cache by then.
inline void prefetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// A lower bound that no score passes, not even an infinite one.
constexpr float kClosed = __builtin_nanf("");

// What is known of one row. upper = score + bound; fast: the score.
struct RowState {
  float norm, own, lower;
  int32_t n_noted;  // -1: too many, or out of the filter's range
  float upper[kMaxNoted];
  int64_t code[kMaxNoted];
};

inline void note(RowState& row, int64_t code, float upper, bool fast) {
  if (row.n_noted == kMaxNoted) {
    // Fast: those noted have the largest score already and came first, this one ties with them or loses.
    if (fast) return;
    row.n_noted = -1;
    row.lower = kClosed;
    return;
  }
  row.upper[row.n_noted] = upper;
  row.code[row.n_noted++] = code;
}

inline void drop_beaten(RowState& row) {
  int kept = 0;
  for (int i = 0; i < row.n_noted; ++i)
    if (row.upper[i] >= row.lower) {
      row.upper[kept] = row.upper[i];
      row.code[kept++] = row.code[i];
    }
  row.n_noted = kept;
}

// A chunk of panels with the largest coefficients of them. Where the panels' differ much, the largest would say too
// little about the others, and each panel's own is used.
struct Chunk {
  int64_t first;
  int n;
  float slope, offset;
  bool uneven;
};

inline Chunk chunk_at(const PackedCodes& packed, int64_t first, int64_t chunk_panels) {
  const int64_t left = packed.n_panels - first;
  Chunk c{first, static_cast<int>(left < chunk_panels ? left : chunk_panels), 0, 0, false};
  float least_slope = HUGE_VALF, least_offset = HUGE_VALF;
  for (int64_t p = first; p < first + c.n; ++p) {
    const float slope = packed.panel_slope[p], offset = packed.panel_offset[p];
    c.slope = slope > c.slope ? slope : c.slope;
    c.offset = offset > c.offset ? offset : c.offset;
    least_slope = slope < least_slope ? slope : least_slope;
    least_offset = offset < least_offset ? offset : least_offset;
  }
  c.uneven = c.slope > 4 * least_slope || c.offset > 16 * least_offset;
  return c;
}

inline V panel_bound(const PackedCodes& packed, int64_t panel, V norm, V own) {
  return add(mul_add(norm, spread(packed.panel_slope[panel]), spread(packed.panel_offset[panel])), own);
}

// Step 3 where the chunk may hold a winner: top >= score of each lane, bound >= bound of each panel. Bounds grow with
// their coefficients and rounding is monotone, so a panel that fails its test holds no code that would pass its own.
__attribute__((noinline)) void search_chunk(RowState& row, const PackedCodes& packed, const Chunk& chunk, V top,
                                            V bound, const float* tile_row, const float* kept_scores,
                                            const float* maxima, bool fast) {
  const V norm = spread(row.norm), own = spread(row.own);
  V best = sub(top, bound);
  if (chunk.uneven)
    for (int p = 0; p < chunk.n; ++p)
      best = larger(best, sub(load(maxima + p * kLanes), panel_bound(packed, chunk.first + p, norm, own)));
  const float lower = largest(best);
  if (lower > row.lower) {
    row.lower = lower;
    if (row.n_noted) drop_beaten(row);
  }
  const V limit = spread(row.lower);
  for (int p = 0; p < chunk.n; ++p) {
    const V panel_top = load(maxima + p * kLanes);
    if (!at_least(add(panel_top, bound), limit)) continue;
    if (chunk.uneven && !at_least(add(panel_top, panel_bound(packed, chunk.first + p, norm, own)), limit)) continue;
    const int64_t k0 = (chunk.first + p) * kWidth;
    float again[kWidth], upper[kWidth];
    const float* scores = again;
    if (kept_scores)
      scores = kept_scores + p * kWidth;
    else
      score_row(tile_row, panel_at(packed, chunk.first + p), packed.bias + k0, packed.dim, again);
    uint64_t mask = 0;
    for (int v = 0; v < kTileVectors && k0 + v * kLanes < packed.n_codes; ++v) {
      const int64_t k = k0 + v * kLanes;
      const V code_bound = add(mul_add(norm, load(packed.slope + k), load(packed.offset + k)), own);
      const V score = load(scores + v * kLanes), code_upper = add(score, code_bound);
      if (chunk.uneven) {  // the panel's bound may be another code's: this code's own says more
        const float code_lower = largest(sub(score, code_bound));
        row.lower = code_lower > row.lower ? code_lower : row.lower;
      }
      store(upper + v * kLanes, code_upper);
      mask |= static_cast<uint64_t>(at_least(code_upper, limit)) << (v * kLanes);
    }
    for (; mask; mask &= mask - 1) {
      const int j = __builtin_ctzll(mask);
      note(row, k0 + j, upper[j], fast);
      if (row.n_noted < 0) return;
    }
  }
}

// The largest score of each lane over n panels. Two chains of maxima: one alone would wait for itself.
inline V top_of(const float* maxima, int n) {
  V even = load(maxima), odd = even;
  int p = 1;
  for (; p + 4 <= n; p += 4) {
    even = larger(even, load(maxima + p * kLanes));
    odd = larger(odd, load(maxima + (p + 1) * kLanes));
    even = larger(even, load(maxima + (p + 2) * kLanes));
    odd = larger(odd, load(maxima + (p + 3) * kLanes));
  }
  for (; p < n; ++p) even = larger(even, load(maxima + p * kLanes));
  return larger(even, odd);
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

struct SearchScratch {
  float *tiles, *scores, *maxima, *eight;
  double* room;  // [2 D]
  RowState* rows;
  ExactScratch exact;
};

inline size_t search_layout(int64_t D, char* base, SearchScratch* s) {
  size_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* at = base + used;
    used += (static_cast<size_t>(bytes) + 63) / 64 * 64;
    return at;
  };
  SearchScratch out;
  const int64_t filter_dim = D <= kMaxFilterDim ? D : 0;
  const int64_t rows = block_rows(D);
  out.scores = reinterpret_cast<float*>(take(4 * kGroupTiles * kTileRows * kScoreStride));
  out.maxima = reinterpret_cast<float*>(take(4 * kGroupTiles * kTileRows * kMaximaStride));
  out.rows = reinterpret_cast<RowState*>(take(static_cast<int64_t>(sizeof(RowState)) * rows));
  out.tiles = reinterpret_cast<float*>(take(4 * (rows * filter_dim + 8)));
  out.eight = reinterpret_cast<float*>(take(4 * 8 * filter_dim));
  out.room = reinterpret_cast<double*>(take(8 * 2 * filter_dim));
  out.exact.pending = reinterpret_cast<int64_t*>(take(8 * rows));
  out.exact.best = reinterpret_cast<double*>(take(8 * rows));
  out.exact.sums = reinterpret_cast<double*>(take(8 * kExactCodes * rows));
  out.exact.codes = reinterpret_cast<double*>(take(8 * kExactCodes * kExactDims));
  out.exact.row = reinterpret_cast<double*>(take(8 * kExactDims));
  if (s) *s = out;
  return used;
}

size_t search_bytes(int64_t dim) { return search_layout(dim, nullptr, nullptr); }

// Steps 1 to 3 for a block of rows.
inline void filter_block(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                         SearchScratch& s) {
  const int64_t D = packed.dim, n_tiles = (n + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < n_tiles; ++t) {
    const int64_t row = t * kTileRows, here = n - row < kTileRows ? n - row : kTileRows;
    double squares[kTileRows];
    with_element(lookup.x->dtype, [&](auto e) {
      pack_tile<decltype(e)>(*lookup.x, h, first + row, here,
                             packed.mean + (lookup.metric == Metric::euclidean ? 0 : D), s.tiles + row * D, s.eight,
                             s.room, squares);
    });
    for (int64_t i = 0; i < here; ++i) {
      RowState& state = s.rows[row + i];
      const double norm = std::sqrt(squares[i]);
      const bool inside = norm < packed.row_limit;  // false for NaN
      state.norm = lookup.fast || !inside ? 0.0f : static_cast<float>(norm * kSlack) + 0x1p-149f;
      state.own = packed.row_part > 0 ? state.norm * state.norm * packed.row_part : 0.0f;
      state.lower = inside ? -HUGE_VALF : kClosed;
      state.n_noted = inside ? 0 : -1;
    }
  }
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
        RowState& row = s.rows[g0 + i];
        const float* tile = tiles + i / kTileRows * kTileRows * D;
        const float* maxima = s.maxima + i * kMaximaStride;
        const V top = top_of(maxima, chunk.n);
        const V bound = add(mul_add(spread(row.norm), spread(chunk.slope), spread(chunk.offset)), spread(row.own));
        if (at_least(add(top, bound), spread(row.lower)))
          search_chunk(row, packed, chunk, top, bound, tile + i % kTileRows, keep_scores ? s.scores + i * kScoreStride : nullptr,
                       maxima, lookup.fast);
      }
    }
  }
}

void search(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n, char* scratch,
            LookupCounts& counts) {
  SearchScratch s;
  search_layout(packed.dim, scratch, &s);
  const int64_t N = lookup.x->n_rows();
  const uint8_t* mask = lookup.mask ? lookup.mask + h * N + first : nullptr;
  int64_t* indices = lookup.indices + h * N + first;
  if (!packed.only_exact) filter_block(lookup, packed, h, first, n, s);
  int64_t n_pending = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (mask && !mask[i]) {
      indices[i] = -1;
      continue;
    }
    RowState& row = s.rows[i];
    if (packed.only_exact || row.n_noted <= 0) {
      s.exact.pending[n_pending++] = i;
      continue;
    }
    if (lookup.fast) {
      int best = 0;
      for (int j = 1; j < row.n_noted; ++j)
        if (row.upper[j] > row.upper[best]) best = j;
      indices[i] = row.code[best];
      continue;
    }
    drop_beaten(row);
    indices[i] = row.code[0];
    if (row.n_noted > 1) {
      indices[i] = best_of(lookup, h, first + i, row.code, row.n_noted, s.room);
      ++counts.rescored;
    }
  }
  if (n_pending) {
    counts.scanned += n_pending;
    scan_rows(lookup, h, first, n_pending, s.exact, indices);
  }
}

}  // namespace
}  // namespace fastvq
