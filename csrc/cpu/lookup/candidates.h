// The codes that may still be nearest to a row (candidates), and the lower bound that a candidate has to reach.
#pragma once
#include <cstdint>

namespace fastvq {
namespace {

template <class Real, int Most>
struct CandidateList {
  Real lower;  // a code whose upper bound lies below this is not the nearest
  int32_t n;   // listed codes; -1: the list overflowed, or the filter cannot bound this row
  Real upper[Most];
  int64_t code[Most];
};

// Removes the codes that list.lower rules out.
template <class Real, int Most>
inline void prune(CandidateList<Real, Most>& list) {
  int kept = 0;
  for (int i = 0; i < list.n; ++i)
    if (list.upper[i] >= list.lower) {
      list.upper[kept] = list.upper[i];
      list.code[kept++] = list.code[i];
    }
  list.n = kept;
}

// Returns false where the list stays full after pruning.
template <class Real, int Most>
inline bool push(CandidateList<Real, Most>& list, int64_t code, Real upper) {
  if (list.n == Most) prune(list);
  if (list.n == Most) return false;
  list.upper[list.n] = upper;
  list.code[list.n++] = code;
  return true;
}

}  // namespace
}  // namespace fastvq
