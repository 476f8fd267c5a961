// The ceiling of lookup/filter_bf16_tiles.h: four accumulators, nothing loaded.
#pragma once
#include <cstdint>

#include "../lookup/filter_bf16_tiles.h"

namespace fastvq {
namespace {

double peak_fma(int64_t n, float* out) {
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
