// The lookup's filter on matrix tiles: operands rounded to bfloat16, sums in float32. The including file names its tiles
// first (simd/amx.h, or testing/emulated_tiles/emulated.h).
//
//            codes, 32 a panel [step][2][16 pairs][16 codes]       a step is 32 elements of D, one instruction deep
//   rows     +-------+-------+                                     1. pack a block of rows, measuring the rounding error
//   32 a     | sum 0 | sum 1 |                                     2. panel by 32 rows: sums are kept for the chunk. Adding
//   group    +-------+-------+                                        the bias and taking the largest of each lane overlaps
//   [step]   | sum 2 | sum 3 |                                        with the products of the next panel
//   [32][32] +-------+-------+                                     3., 4. as in lookup/filter.h
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "bounds.h"
#include "rounded_operands.h"

namespace fastvq {
namespace {
constexpr int kTileVectors = 2;
}  // namespace
}  // namespace fastvq

#include "rows.h"

namespace fastvq {
namespace {

constexpr int kGroup = 32, kStep = 32;
constexpr int64_t kRelistRows = kGroup;  // rows that lookup/relist.h processes together
constexpr int kTile = 16 * 32;  // bfloat16 elements of a register
constexpr int kChunkPanels = 16;
constexpr int kScoreStride = kChunkPanels * kWidth + 16;  // off a multiple of the first-level cache's sets
constexpr int kMaximaStride = kChunkPanels * kLanes + 16;
constexpr int64_t kWholeBytes = 512 << 10;  // a codebook that stays in the second-level cache

inline int64_t steps(int64_t D) { return (D + kStep - 1) / kStep; }
inline int64_t panel_bytes(int64_t D) { return steps(D) * 2 * kTile * 2; }

// The nearest bfloat16, ties to even, small numbers flushed as the unit does it. For numbers below 2^127.
inline uint32_t round_bits(float v) {
  const uint32_t bits = float_to_bits(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  return (rounded & 0x7f800000) ? rounded : 0;
}
inline float round_to_bf16(float v) { return bits_to_float(round_bits(v)); }

// c^ are the rounded codes, e = c' - c^; the same for rows, x' = x^ + lost:
//   x'.c' - x^.c^ = lost.c^ + x'.e  <=  |lost| |c^| + |x'| |e|
// Sums: a product goes through at most the 32 multiply-adds of a step, in any order, and two additions for each step after
// it. Products of rounded operands are up to 1.02 times the exact ones (1.01 each), hence the factor. Flushing takes up to
// 2^-126 going in and coming out of each of these.
struct CodeLayout {
  static double chain(int64_t D) { return 1.02 * static_cast<double>(34 + 2 * steps(D) + 4); }
  static double underflow(int64_t D) { return static_cast<double>(steps(D) * 4 * (kStep + 2)) * 0x1p-126; }

  static Placed put(const PackedCodes& packed, int64_t p, int j, const float* code, double norm, float*) {
    const int64_t D = packed.dim, n = steps(D) * kStep;
    uint16_t* to = reinterpret_cast<uint16_t*>(packed.panels + p * panel_bytes(D)) + j / 16 * kTile + j % 16 * 2;
    double square = 0;
    for (int64_t d = 0; d < n; ++d) {
      const float c = d < D ? code[d] : 0, rounded = round_to_bf16(c), rest = c - rounded;
      to[d / kStep * 2 * kTile + d % kStep / 2 * 32 + (d & 1)] = static_cast<uint16_t>(float_to_bits(rounded) >> 16);
      square += static_cast<double>(rest) * static_cast<double>(rest);
    }
    const double rest = std::sqrt(square);
    return {rest, norm + rest};
  }
};

struct FilterWorkspace {
  uint16_t* rows;  // [groups][steps][kGroup][kStep]
  float *scores, *maxima, *placed;
  double* doubles;  // [2 D]
};

template <class Take>
FilterWorkspace filter_workspace(int64_t D, const Take& take) {
  const int64_t rows = (block_rows(D) + kGroup - 1) / kGroup * kGroup;
  FilterWorkspace s;
  s.rows = reinterpret_cast<uint16_t*>(take(2 * rows * steps(D) * kStep));
  s.scores = reinterpret_cast<float*>(take(4 * kGroup * kScoreStride));
  s.maxima = reinterpret_cast<float*>(take(4 * kGroup * kMaximaStride));
  s.placed = reinterpret_cast<float*>(take(4 * (16 * D + 16)));
  s.doubles = reinterpret_cast<double*>(take(8 * 2 * D));
  return s;
}

// A row of float32 less the mean, rounded, into its group. `to` is its place in the group's first step.
inline Measured round_row(const float* x, const float* mean, int64_t D, uint16_t* to) {
  const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000)), exponent = _mm512_set1_epi32(0x7f800000);
  V squares = broadcast(0), losts = broadcast(0);
  for (int64_t d0 = 0; d0 < steps(D) * kStep; d0 += kLanes) {
    const int64_t left = D - d0;
    const __mmask16 mask = left >= kLanes ? 0xffff : left > 0 ? static_cast<__mmask16>((1u << left) - 1) : 0;
    const V v = sub(_mm512_maskz_loadu_ps(mask, x + d0), _mm512_maskz_loadu_ps(mask, mean + d0));
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i r = _mm512_and_si512(_mm512_add_epi32(_mm512_add_epi32(bits, half), odd), high);
    r = _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(r, exponent), r);
    const V rest = sub(v, _mm512_castsi512_ps(r));
    squares = fma(v, v, squares);
    losts = fma(rest, rest, losts);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + d0 / kStep * kGroup * kStep + d0 % kStep),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
  }
  const float square = _mm512_reduce_add_ps(squares);
  if (square >= 0x1p-40f && square < 0x1p116f) return {square, _mm512_reduce_add_ps(losts)};
  // Squares beyond float32: again in double.
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
void pack_rows(const Rows& x, int64_t h, int64_t first, int64_t n, const float* mean, const float* zeros, uint16_t* to,
               FilterWorkspace& s, Measured* measured) {
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
      place_code<E>(contiguous(row_at<E>(x, h, first + i), x.stride_d, D, s.doubles), D, mean, 0, s.placed + i * D);
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
inline void keep_panel(float* sums) {
  tile::store<0>(sums, 4 * kScoreStride);
  tile::store<1>(sums + 16, 4 * kScoreStride);
  if constexpr (Halves == 2) {
    tile::store<2>(sums + 16 * kScoreStride, 4 * kScoreStride);
    tile::store<3>(sums + 16 * kScoreStride + 16, 4 * kScoreStride);
  }
}

inline void panel_maxima(const float* sums, const float* bias, int n_rows, float* maxima) {
  const V low = load(bias), high = load(bias + kLanes);
#pragma GCC unroll 4
  for (int i = 0; i < n_rows; ++i)
    store(maxima + i * kMaximaStride,
          max(add(load(sums + i * kScoreStride), low), add(load(sums + i * kScoreStride + kLanes), high)));
}

// Step 2 for one group and a chunk. A panel's maxima are taken after the next one's products are issued and before its
// sums are stored: loads after these stores would wait wherever the low bits of the addresses agree.
template <int Halves>
__attribute__((noinline)) void score_panels(const uint16_t* rows, const PackedCodes& packed, const Chunk& chunk,
                                            float* sums, float* maxima) {
  const int64_t n_steps = steps(packed.dim), bytes = panel_bytes(packed.dim);
  for (int p = 0; p <= chunk.n; ++p) {
    const int64_t panel = chunk.first + p;
    if (p < chunk.n)
      multiply_panel<Halves>(rows, reinterpret_cast<const uint16_t*>(packed.panels + panel * bytes), n_steps);
    if (p > 0)
      panel_maxima(sums + (p - 1) * kWidth, packed.bias + (panel - 1) * kWidth, 16 * Halves, maxima + (p - 1) * kLanes);
    if (p < chunk.n) keep_panel<Halves>(sums + p * kWidth);
  }
}

inline void add_bias(const float* sums, const float* bias, float* scores) {
  for (int v = 0; v < kTileVectors; ++v)
    store(scores + v * kLanes, add(load(sums + v * kLanes), load(bias + v * kLanes)));
}

// Step 1 for a block of rows.
inline void pack_block(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                       FilterWorkspace& s, RowBounds* rows) {
  const int64_t D = packed.dim, group_elements = steps(D) * kGroup * kStep;
  const float* zeros = packed.mean + D;
  for (int64_t i0 = 0; i0 < n; i0 += 16) {
    const int64_t here = n - i0 < 16 ? n - i0 : 16;
    Measured measured[16];
    uint16_t* to = s.rows + i0 / kGroup * group_elements + i0 % kGroup * kStep;
    with_element(lookup.x->dtype, [&](auto e) {
      pack_rows<decltype(e)>(*lookup.x, h, first + i0, here, lookup.metric == Metric::euclidean ? packed.mean : zeros,
                             zeros, to, s, measured);
    });
    for (int64_t i = here; i < 16; ++i)  // padding: denormals or NaN would slow the sums down
      for (int64_t step = 0; step < steps(D); ++step)
        for (int64_t d = 0; d < kStep; ++d) to[step * kGroup * kStep + i * kStep + d] = 0;
    for (int64_t i = 0; i < here; ++i)
      start_row(rows[i0 + i], packed, lookup.fast, std::sqrt(measured[i].square), std::sqrt(measured[i].lost));
  }
}

// All scores of a block of rows: visit(row, first code of a panel, its scores).
template <class Visit>
void score_block(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                 FilterWorkspace& s, RowBounds* rows, const Visit& visit) {
  const tile::Scope tiles;
  pack_block(lookup, packed, h, first, n, s, rows);
  for (int64_t i0 = 0; i0 < n; i0 += kGroup)
    for (int64_t p = 0; p < packed.n_panels; ++p) {
      score_panels<2>(s.rows + i0 * steps(packed.dim) * kStep, packed, chunk_at(packed, p, 1), s.scores, s.maxima);
      float scores[kWidth];
      for (int64_t i = 0; i < kGroup && i0 + i < n; ++i) {
        add_bias(s.scores + i * kScoreStride, packed.bias + p * kWidth, scores);
        visit(i0 + i, p * kWidth, scores);
      }
    }
}

// Steps 1 to 3 for a block of rows.
inline void filter_block(const LookupCall& lookup, const PackedCodes& packed, int64_t h, int64_t first, int64_t n,
                         FilterWorkspace& s, RowBounds* rows) {
  pack_block(lookup, packed, h, first, n, s, rows);
  const int64_t D = packed.dim, group_elements = steps(D) * kGroup * kStep;
  const bool whole = packed.n_panels * panel_bytes(D) <= kWholeBytes;
  for (int64_t p0 = 0; p0 < packed.n_panels; p0 += kChunkPanels) {
    if (p0 > 0) checkpoint();  // may run Python, so it is outside the scope of the tiles
    const tile::Scope tiles;
    const Chunk chunk = chunk_at(packed, p0, kChunkPanels);
    // After the last chunk comes the first, for the next block.
    const int64_t next = p0 + kChunkPanels < packed.n_panels ? p0 + kChunkPanels : 0, left = packed.n_panels - next;
    const int64_t next_bytes = whole ? 0 : (left < kChunkPanels ? left : kChunkPanels) * panel_bytes(D);
    const int64_t piece = next_bytes / ((n + kGroup - 1) / kGroup) + 64;
    for (int64_t i0 = 0; i0 < n; i0 += kGroup) {
      const int64_t here = n - i0 < kGroup ? n - i0 : kGroup, from = i0 / kGroup * piece;
      if (from < next_bytes)
        prefetch(packed.panels + next * panel_bytes(D) + from, next_bytes - from < piece ? next_bytes - from : piece);
      const uint16_t* group = s.rows + i0 / kGroup * group_elements;
      here > 16 ? score_panels<2>(group, packed, chunk, s.scores, s.maxima)
                : score_panels<1>(group, packed, chunk, s.scores, s.maxima);
      for (int64_t i = 0; i < here; ++i) {
        RowBounds& row = rows[i0 + i];
        const float* maxima = s.maxima + i * kMaximaStride;
        const V top = top_of(maxima, chunk.n), bound = RowBound(row).of_chunk(chunk);
        if (at_least(add(top, bound), broadcast(row.lower)))
          search_chunk(row, packed, chunk, top, bound, maxima, lookup.fast, [&](int p, float* buffer) -> const float* {
            add_bias(s.scores + i * kScoreStride + p * kWidth, packed.bias + (p0 + p) * kWidth, buffer);
            return buffer;
          });
      }
    }
  }
}

}  // namespace
}  // namespace fastvq
