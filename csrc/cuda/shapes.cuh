// Which shape of block serves which width of vectors. None was timed on a GPU: wide enough that a stage of codes serves
// many rows, small enough that the shared memory of the card holds it, several blocks to a multiprocessor where it can.
#pragma once
#include "search.cuh"

namespace fastvq::cuda {

using Rows128By16 = Shape<128, 4, 2, 3, 1, 3>;  // dims up to 16
using Rows128By32 = Shape<128, 4, 2, 3, 2, 3>;  // dims up to 32
using Rows128 = Shape<128, 4, 2, 3, 4, 3>;
using Rows64 = Shape<64, 2, 2, 2, 4, 2>;
using Rows32 = Shape<32, 1, 2, 2, 4, 2>;
using Rows16 = Shape<16, 1, 1, 2, 4, 2>;

inline bool shape_fits(int width) { return SearchMemory<Rows16>::bytes(width) <= shared_limit(); }

template <class F>
int with_shape(const Packed& p, const F& f) {
  const int width = p.n_steps * 16;
  const size_t limit = shared_limit();
  if (p.unit == 1) return f(Rows128By16{});
  if (p.unit == 2) return f(Rows128By32{});
  if (SearchMemory<Rows128>::bytes(width) <= limit) return f(Rows128{});
  if (SearchMemory<Rows64>::bytes(width) <= limit) return f(Rows64{});
  if (SearchMemory<Rows32>::bytes(width) <= limit) return f(Rows32{});
  return f(Rows16{});
}

}  // namespace fastvq::cuda
