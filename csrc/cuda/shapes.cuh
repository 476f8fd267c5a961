// Which shape of block serves which width of vectors. Not tuned: wide enough that a stage of codes serves
// many rows, small enough that the shared memory of the card holds it, several blocks to a multiprocessor where it can.
#pragma once
#include <type_traits>

#include "search.cuh"

namespace fastvq::cuda {

using Rows128Of4 = Shape<128, 4, 2, 3, 1, 2, 4>;  // dims up to 4
using Rows128Of8 = Shape<128, 4, 2, 3, 2, 2, 8>;  // dims up to 8
using Rows128By16 = Shape<128, 4, 2, 3, 1, 2>;  // dims up to 16
using Rows128By32 = Shape<128, 4, 2, 3, 2, 2>;  // dims up to 32
using Rows128 = Shape<128, 4, 2, 3, 4, 2>;
using Rows64 = Shape<64, 2, 2, 2, 4, 2>;
using Rows32 = Shape<32, 1, 2, 2, 4, 2>;
using Rows16 = Shape<16, 1, 1, 2, 4, 2>;

// Shared memory of a block that keeps `own` bytes of each element of its rows beside what the search does.
template <class S>
size_t block_bytes(int width, size_t own) {
  return SearchMemory<S>::bytes(width) + static_cast<size_t>(S::kRows) * static_cast<size_t>(width) * own;
}

template <class Smallest>
bool shape_fits(int width, size_t own) {
  return block_bytes<Smallest>(width, own) <= shared_limit();
}

// The largest block of at most `limit` bytes; the smallest where there is none.
template <class Smallest, class F>
auto with_shape(const PackedCodebook& p, size_t limit, size_t own, const F& f) {
  const int width = p.n_steps * 16;
  if (p.part == 4) return f(Rows128Of4{});
  if (p.part == 8) return f(Rows128Of8{});
  if (p.unit == 1) return f(Rows128By16{});
  if (p.unit == 2) return f(Rows128By32{});
  if (block_bytes<Rows128>(width, own) <= limit) return f(Rows128{});
  if (block_bytes<Rows64>(width, own) <= limit) return f(Rows64{});
  if constexpr (!std::is_same<Smallest, Rows32>::value)
    if (block_bytes<Rows32>(width, own) <= limit) return f(Rows32{});
  return f(Smallest{});
}

}  // namespace fastvq::cuda
