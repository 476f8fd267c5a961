// The lookup's filter on matrix tiles: operands rounded to bfloat16, sums in float32. The including file names its tiles
// first (tile_amx.h, or tile_emulated.h for tests).
//
//            codes, 32 a panel [step][2][16 pairs][16 codes]       a step is 32 elements of D, one instruction deep
//   rows     +-------+-------+                                     1. pack a block of rows, measuring what rounding takes
//   32 a     | sum 0 | sum 1 |                                     2. panel by 32 rows; while the next panel is under way,
//   group    +-------+-------+                                        the bias is added and the largest of each lane taken
//   [step]   | sum 2 | sum 3 |                                     3., 4. as in nearest_filter.h
//   [32][32] +-------+-------+
//
// The sums of wide vectors are kept for the chunk. Those of narrow ones would take as long to go through the caches as to
// be made: two panels' have room in the first-level cache, and a row's are made again for the few panels that may hold a
// winner.
//
// Up to kSplitDim elements a vector fill a third of a step, so each operand is given as the sum of two bfloat16:
// [hi, lo, hi] times [hi, hi, lo] leaves an error of 2^-16 instead of 2^-8, at no cost.
#pragma once
#include "nearest_pack.h"

namespace fastvq {
namespace {
constexpr bool kRounded = true;
// A row's sums of squares are float32 sums, off by less than (D / 16 + 8) 2^-24.
constexpr double kRowSlack = 1 + 0x1p-9;
}  // namespace
}  // namespace fastvq

#include "nearest_rows.h"

namespace fastvq {
namespace {

constexpr int kGroup = 32, kStep = 32;
constexpr int64_t kAgainRows = kGroup;  // that nearest_again.h looks at together
constexpr int kTile = 16 * 32;  // bfloat16 elements of a register
constexpr int kChunkPanels = 16, kLongChunkPanels = 32;  // sums kept, or not
constexpr int kScoreStride = kChunkPanels * kWidth + 16;  // off a multiple of the first-level cache's sets
constexpr int kMaximaStride = kLongChunkPanels * kLanes + 16;
constexpr int64_t kKeepSumsDim = 97;  // and wider
constexpr int64_t kSplitDim = 10;
constexpr int64_t kWholeBytes = 512 << 10;  // a codebook that stays in the second-level cache

inline int64_t pieces(int64_t D) { return D <= kSplitDim ? 3 : 1; }
inline int64_t steps(int64_t D) { return (pieces(D) * D + kStep - 1) / kStep; }
int64_t panel_bytes(int64_t D) { return steps(D) * 2 * kTile * 2; }

// The nearest bfloat16, ties to even, small numbers flushed as the unit does it. For numbers below 2^127.
inline uint32_t round_bits(float v) {
  const uint32_t bits = float_to_bits(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  return (rounded & 0x7f800000) ? rounded : 0;
}
inline float round_to_bf16(float v) { return bits_to_float(round_bits(v)); }

// An operand in pieces: hi and lo nearest to what is left, each rounded; the rest is lost.
struct Pieces {
  float hi, lo, rest;
  Pieces(float v, bool split) : hi(round_to_bf16(v)), lo(split ? round_to_bf16(v - hi) : 0), rest(v - hi - lo) {}
};

// c^ = hi (+ lo) of the codes, e = c' - c^; the same for rows, x' = x^ + lost:
//   one piece:  x'.c' - x^.c^ = lost.c^ + x'.e                <= |lost| |c^| + |x'| |e|
//   two pieces, without lo.lo:                                <= |lost| (|c'| + |e|) + |x'| (|e| + 2^-8 1.01 |lo_c|)
// Sums: a product goes through at most the 32 multiply-adds of a step, in whatever order, and two additions a step after
// (where a row's are made again: through the multiply-adds of all steps, and one addition);
// magnitudes of rounded operands are up to 1.02 times the exact ones (1.01 each), hence the factor. Flushing takes up to
// 2^-126 going in and coming out of each of these.
struct CodeLayout {
  static double chain(int64_t D) {
    return 1.02 * static_cast<double>(34 + 2 * steps(D) + 4 + (D < kKeepSumsDim ? kStep * steps(D) : 0));
  }
  static double underflow(int64_t D) { return static_cast<double>(steps(D) * 4 * (kStep + 2)) * 0x1p-126; }

  static Placed put(const PackedCodes& packed, int64_t p, int j, const float* code, double norm, float*) {
    const int64_t D = packed.dim, n = steps(D) * kStep;
    const bool split = pieces(D) > 1;
    uint16_t* to = reinterpret_cast<uint16_t*>(packed.panels + p * panel_bytes(D)) + j / 16 * kTile + j % 16 * 2;
    const auto at = [&](int64_t i) -> uint16_t& {
      return to[i / kStep * 2 * kTile + i % kStep / 2 * 32 + (i & 1)];
    };
    double rest = 0, low = 0;
    for (int64_t d = 0; d < D; ++d) {
      const Pieces c(code[d], split);
      at(d) = static_cast<uint16_t>(float_to_bits(c.hi) >> 16);
      if (split) {
        at(D + d) = at(d);
        at(2 * D + d) = static_cast<uint16_t>(float_to_bits(c.lo) >> 16);
      }
      rest += static_cast<double>(c.rest) * static_cast<double>(c.rest);
      low += static_cast<double>(c.lo) * static_cast<double>(c.lo);
    }
    for (int64_t i = pieces(D) * D; i < n; ++i) at(i) = 0;
    rest = std::sqrt(rest);
    return {rest + 1.01 * 0x1p-8 * std::sqrt(low), norm + rest};
  }
};

struct FilterScratch {
  uint16_t* rows;  // [groups][steps][kGroup][kStep]
  float *scores, *maxima, *placed;
  double* room;  // [2 D]
};

template <class Take>
FilterScratch filter_scratch(int64_t D, const Take& take) {
  const int64_t rows = (block_rows(D) + kGroup - 1) / kGroup * kGroup;
  FilterScratch s;
  s.rows = reinterpret_cast<uint16_t*>(take(2 * rows * steps(D) * kStep));
  s.scores = reinterpret_cast<float*>(take(4 * kGroup * kScoreStride));
  s.maxima = reinterpret_cast<float*>(take(4 * kGroup * kMaximaStride));
  s.placed = reinterpret_cast<float*>(take(4 * (16 * D + 16)));
  s.room = reinterpret_cast<double*>(take(8 * 2 * D));
  return s;
}

// A row of float32 less the mean, rounded, into its group. `to` is its place in the group's first step.
inline Measured round_row(const float* x, const float* mean, int64_t D, uint16_t* to) {
  if (pieces(D) > 1) {
    double square = 0, lost = 0;
    for (int64_t i = 0; i < kStep; ++i) to[i] = 0;
    for (int64_t d = 0; d < D; ++d) {
      const float v = x[d] - mean[d];
      const Pieces r(v, true);
      to[d] = to[2 * D + d] = static_cast<uint16_t>(float_to_bits(r.hi) >> 16);
      to[D + d] = static_cast<uint16_t>(float_to_bits(r.lo) >> 16);
      square += static_cast<double>(v) * static_cast<double>(v);
      lost += static_cast<double>(r.rest) * static_cast<double>(r.rest);
    }
    return {square, lost};
  }
  const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000)), exponent = _mm512_set1_epi32(0x7f800000);
  V squares = spread(0), losts = spread(0);
  for (int64_t d0 = 0; d0 < steps(D) * kStep; d0 += kLanes) {
    const int64_t left = D - d0;
    const __mmask16 mask = left >= kLanes ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
    const V v = sub(_mm512_maskz_loadu_ps(mask, x + d0), _mm512_maskz_loadu_ps(mask, mean + d0));
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i r = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(bits, half), odd), high);
    r = _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(r, exponent), r);
    const V rest = sub(v, _mm512_castsi512_ps(r));
    squares = mul_add(v, v, squares);
    losts = mul_add(rest, rest, losts);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d0 / kStep * kGroup * kStep + d0 % kStep),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
  }
  const float square = _mm512_reduce_add_ps(squares);
  if (square >= 0x1p-40f && square < 0x1p116f) return {square, _mm512_reduce_add_ps(losts)};
  // Squares that float32 does not hold: once more in double.
  double wide = 0, lost = 0;
  for (int64_t d = 0; d < D; ++d) {
    const float v = x[d] - mean[d], rest = v - round_to_bf16(v);
    wide += static_cast<double>(v) * static_cast<double>(v);
    lost += static_cast<double>(rest) * static_cast<double>(rest);
  }
  return {wide, lost};
}

// Step 1 for up to 16 rows of one group.
template <class E>
void pack_rows(const Rows& x, int64_t h, int64_t first, int64_t n, const float* mean, const float* zeros,
               uint16_t* to, FilterScratch& s, Measured* measured) {
  const int64_t D = x.dim;
  if (std::is_same<E, Element<DType::f32>>::value && x.stride_d == 1) {
    for (int64_t i = 0; i < n; ++i)
      measured[i] = round_row(reinterpret_cast<const float*>(row_at<E>(x, h, first + i)), mean, D, to + i * kStep);
    return;
  }
  if (x.stride_d != 1 && x.stride_inner == 1 && first / x.n_inner == (first + n - 1) / x.n_inner) {
    // Channel-first: neighbouring rows are neighbours in memory.
    using Real = typename E::Real;
    const auto* p = row_at<E>(x, h, first);
    for (int64_t d = 0; d < D; ++d, p += x.stride_d)
      for (int64_t i = 0; i < n; ++i)
        s.placed[i * D + d] = static_cast<float>(E::get(p[i]) - static_cast<Real>(mean[d]));
  } else {
    for (int64_t i = 0; i < n; ++i)
      place_code<E>(contiguous(row_at<E>(x, h, first + i), x.stride_d, D, s.room), D, mean, 0, s.placed + i * D);
  }
  for (int64_t i = 0; i < n; ++i) measured[i] = round_row(s.placed + i * D, zeros, D, to + i * kStep);
}

// Step 2 for one panel and the first 16 * Halves rows of a group, in the accumulators.
template <int Halves>
inline void multiply_panel(const uint16_t* rows, const uint16_t* panel, int64_t n_steps) {
  tile::clear<0>();
  tile::clear<1>();
  if constexpr (Halves == 2) {
    tile::clear<2>();
    tile::clear<3>();
  }
  for (int64_t i = 0; i < n_steps; ++i, rows += 2 * kTile, panel += 2 * kTile) {
    tile::load<4>(rows, 64);
    tile::load<6>(panel, 64);
    tile::multiply<0, 0>();
    tile::load<7>(panel + kTile, 64);
    tile::multiply<0, 1>();
    if constexpr (Halves == 2) {
      tile::load<5>(rows + kTile, 64);
      tile::multiply<1, 0>();
      tile::multiply<1, 1>();
    }
  }
}

template <int Halves>
inline void write_panel(float* sums, int64_t stride) {
  tile::store<0>(sums, 4 * stride);
  tile::store<1>(sums + 16, 4 * stride);
  if constexpr (Halves == 2) {
    tile::store<2>(sums + 16 * stride, 4 * stride);
    tile::store<3>(sums + 16 * stride + 16, 4 * stride);
  }
}

inline void panel_maxima(const float* sums, int64_t stride, const float* bias, int n_rows, float* maxima) {
  const V low = load(bias), high = load(bias + kLanes);
#pragma GCC unroll 4
  for (int i = 0; i < n_rows; ++i)
    store(maxima + i * kMaximaStride,
          larger(add(load(sums + i * stride), low), add(load(sums + i * stride + kLanes), high)));
}

inline const uint16_t* codes_of(const PackedCodes& packed, int64_t panel) {
  return reinterpret_cast<const uint16_t*>(packed.panels + panel * panel_bytes(packed.dim));
}

// Step 2 for one group and a chunk. A panel's maxima are taken after the next one's products are issued and before its
// sums are written: behind those, loads would wait wherever the low bits of their addresses are those of a store.
// sums: [rows][kScoreStride] where they are kept, else room for two panels'.
template <int Halves, bool Keep>
__attribute__((noinline)) void score_panels(const uint16_t* rows, const PackedCodes& packed, const Chunk& chunk,
                                            float* sums, float* maxima) {
  const int64_t n_steps = steps(packed.dim), stride = Keep ? kScoreStride : kWidth;
  const auto sums_of = [&](int p) { return sums + (Keep ? p * kWidth : p % 2 * kGroup * kWidth); };
  for (int p = 0; p <= chunk.n; ++p) {
    const int64_t panel = chunk.first + p;
    if (p < chunk.n) multiply_panel<Halves>(rows, codes_of(packed, panel), n_steps);
    if (p > 0)
      panel_maxima(sums_of(p - 1), stride, packed.bias + (panel - 1) * kWidth, 16 * Halves, maxima + (p - 1) * kLanes);
    if (p < chunk.n) write_panel<Halves>(sums_of(p), stride);
  }
}

inline void add_bias(const float* sums, const float* bias, float* scores) {
  for (int v = 0; v < kTileVectors; ++v) store(scores + v * kLanes, add(load(sums + v * kLanes), load(bias + v * kLanes)));
}

// The scores of row i of a group against one panel once more, without tiles: two chains of sums a vector.
inline void score_row(const uint16_t* group, int64_t i, const uint16_t* panel, const float* bias, int64_t n_steps,
                      float* scores) {
  V sums[2][kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) sums[0][v] = sums[1][v] = spread(0);
  const uint16_t* row = group + i * kStep;
  for (int64_t step = 0; step < n_steps; ++step, row += kGroup * kStep, panel += 2 * kTile)
#pragma GCC unroll 16
    for (int pair = 0; pair < kStep / 2; ++pair) {
      int32_t two;
      std::memcpy(&two, row + 2 * pair, 4);
      for (int v = 0; v < kTileVectors; ++v)
        sums[pair % 2][v] = tile::multiply_pairs(sums[pair % 2][v], _mm512_set1_epi32(two),
                                                 _mm512_loadu_si512(panel + v * kTile + pair * 2 * kLanes));
    }
  for (int v = 0; v < kTileVectors; ++v)
    store(scores + v * kLanes, add(add(sums[0][v], sums[1][v]), load(bias + v * kLanes)));
}

// Step 1 for a block of rows.
inline void pack_block(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                       FilterScratch& s, RowState* rows) {
  const int64_t D = packed.dim, group_elements = steps(D) * kGroup * kStep;
  const float* zeros = packed.mean + D;
  for (int64_t i0 = 0; i0 < n; i0 += 16) {
    const int64_t here = n - i0 < 16 ? n - i0 : 16;
    Measured measured[16];
    uint16_t* to = s.rows + i0 / kGroup * group_elements + i0 % kGroup * kStep;
    with_element(lookup.x->dtype, [&](auto e) {
      pack_rows<decltype(e)>(*lookup.x, h, first + i0, here,
                             lookup.metric == Metric::euclidean ? packed.mean : zeros, zeros, to, s, measured);
    });
    for (int64_t i = here; i < 16; ++i)  // rows that are not there: finite, or their sums would take an age
      for (int64_t step = 0; step < steps(D); ++step)
        for (int64_t d = 0; d < kStep; ++d) to[step * kGroup * kStep + i * kStep + d] = 0;
    for (int64_t i = 0; i < here; ++i)
      start_row(rows[i0 + i], packed, lookup.fast, std::sqrt(measured[i].square), std::sqrt(measured[i].lost));
  }
}

// All scores of a block of rows: visit(row, first code of a panel, its scores).
template <class Visit>
void score_block(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                 FilterScratch& s, RowState* rows, const Visit& visit) {
  const tile::Scope tiles;
  pack_block(lookup, packed, h, first, n, s, rows);
  for (int64_t i0 = 0; i0 < n; i0 += kGroup)
    for (int64_t p = 0; p < packed.n_panels; ++p) {
      score_panels<2, false>(s.rows + i0 * steps(packed.dim) * kStep, packed, chunk_at(packed, p, 1), s.scores, s.maxima);
      float scores[kWidth];
      for (int64_t i = 0; i < kGroup && i0 + i < n; ++i) {
        add_bias(s.scores + i * kWidth, packed.bias + p * kWidth, scores);
        visit(i0 + i, p * kWidth, scores);
      }
    }
}

// Steps 1 to 3 for a block of rows.
inline void filter_block(const Lookup& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                         FilterScratch& s, RowState* rows) {
  const tile::Scope tiles;
  pack_block(lookup, packed, h, first, n, s, rows);
  const int64_t D = packed.dim, group_elements = steps(D) * kGroup * kStep;
  const bool whole = packed.n_panels * panel_bytes(D) <= kWholeBytes;
  // Fast: no bound covers that a score made again is rounded otherwise than the largest was.
  const bool keep = D >= kKeepSumsDim || lookup.fast;
  const auto score = keep ? score_panels<2, true> : score_panels<2, false>;
  const auto score_half = keep ? score_panels<1, true> : score_panels<1, false>;
  const int64_t chunk_panels = keep ? kChunkPanels : kLongChunkPanels;
  for (int64_t p0 = 0; p0 < packed.n_panels; p0 += chunk_panels) {
    const Chunk chunk = chunk_at(packed, p0, chunk_panels);
    // After the last chunk comes the first, for the next block.
    const int64_t next = p0 + chunk_panels < packed.n_panels ? p0 + chunk_panels : 0, left = packed.n_panels - next;
    const int64_t next_bytes = whole ? 0 : (left < chunk_panels ? left : chunk_panels) * panel_bytes(D);
    const int64_t piece = next_bytes / ((n + kGroup - 1) / kGroup) + 64;
    for (int64_t i0 = 0; i0 < n; i0 += kGroup) {
      const int64_t here = n - i0 < kGroup ? n - i0 : kGroup, from = i0 / kGroup * piece;
      if (from < next_bytes)
        prefetch(packed.panels + next * panel_bytes(D) + from, next_bytes - from < piece ? next_bytes - from : piece);
      const uint16_t* group = s.rows + i0 / kGroup * group_elements;
      (here > 16 ? score : score_half)(group, packed, chunk, s.scores, s.maxima);
      for (int64_t i = 0; i < here; ++i) {
        RowState& row = rows[i0 + i];
        const float* maxima = s.maxima + i * kMaximaStride;
        const V top = top_of(maxima, chunk.n), bound = RowBound(row).of_chunk(chunk);
        if (at_least(add(top, bound), spread(row.lower)))
          search_chunk(row, packed, chunk, top, bound, maxima, lookup.fast, [&](int p, float* room) -> const float* {
            const float* bias = packed.bias + (p0 + p) * kWidth;
            if (keep)
              add_bias(s.scores + i * kScoreStride + p * kWidth, bias, room);
            else
              score_row(group, i, codes_of(packed, p0 + p), bias, steps(D), room);
            return room;
          });
      }
    }
  }
}

// The ceiling: four accumulators, nothing loaded. Returns the operations done.
double fma_chains(int64_t n, float* out) {
  alignas(64) float zeros[16] = {}, sums[16 * 16];
  const tile::Scope tiles;
  tile::load<0>(zeros, 0);
  tile::load<1>(zeros, 0);
  tile::load<2>(zeros, 0);
  tile::load<3>(zeros, 0);
  tile::load<4>(zeros, 0);
  tile::load<5>(zeros, 0);
  tile::load<6>(zeros, 0);
  tile::load<7>(zeros, 0);
  const int64_t rounds = n / 16 + 1;  // as long as the rounds of the other instruction sets
  for (int64_t i = 0; i < rounds; ++i) {
    tile::multiply<0, 0>();
    tile::multiply<0, 1>();
    tile::multiply<1, 0>();
    tile::multiply<1, 1>();
  }
  tile::store<0>(sums, 64);
  for (int i = 0; i < 16; ++i) out[i] = sums[i];
  return 2.0 * 4 * 16 * 16 * 32 * static_cast<double>(rounds);
}

}  // namespace
}  // namespace fastvq
