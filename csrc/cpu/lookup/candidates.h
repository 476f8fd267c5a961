// The codes that may still be nearest to a row, and the bound that they have to reach.
#pragma once
#include <cstdint>

namespace fastvq {
namespace {

template <class Real, int Most>
struct Noted {
  Real lower;  // a code whose upper bound lies below is not the nearest
  int32_t n;   // codes noted; -1: too many, or none can be
  Real upper[Most];
  int64_t code[Most];
};

template <class Real, int Most>
inline void drop_beaten(Noted<Real, Most>& noted) {
  int kept = 0;
  for (int i = 0; i < noted.n; ++i)
    if (noted.upper[i] >= noted.lower) {
      noted.upper[kept] = noted.upper[i];
      noted.code[kept++] = noted.code[i];
    }
  noted.n = kept;
}

// Returns whether there was room.
template <class Real, int Most>
inline bool note(Noted<Real, Most>& noted, int64_t code, Real upper) {
  if (noted.n == Most) drop_beaten(noted);
  if (noted.n == Most) return false;
  noted.upper[noted.n] = upper;
  noted.code[noted.n++] = code;
  return true;
}

}  // namespace
}  // namespace fastvq
