// Shared by all lookups over a whole tensor: blocks of rows for threads, and checks.
// For sources compiled for the baseline instruction set.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../common/fp_environment.h"
#include "packed_codebook.h"
#include "../common/parallel.h"

namespace fastvq {

// Calls body(head, first row, rows, block, thread, workspace) for every block, workspace made once a thread.
template <class Body>
void for_blocks(const Rows& x, int n_threads, size_t workspace_bytes, const Body& body, int64_t block) {
  const int64_t N = x.n_rows(), n_blocks = (N + block - 1) / block;
  std::vector<std::unique_ptr<Buffer>> workspace(static_cast<size_t>(n_threads));
  parallel_chunks(x.n_heads * n_blocks, n_threads, [&](int64_t i, int thread) {
    auto& mine = workspace[static_cast<size_t>(thread)];
    if (!mine) mine = std::make_unique<Buffer>(workspace_bytes, thread == 0 ? Buffer::rows_slot : Buffer::no_slot);
    const int64_t first = i % n_blocks * block;
    body(i / n_blocks, first, std::min(block, N - first), i, mine->data());
  });
}

template <class Body>
void for_blocks(const Rows& x, int n_threads, size_t workspace_bytes, const Body& body) {
  for_blocks(x, n_threads, workspace_bytes, body, block_rows(x.dim));
}

inline void check(const Rows& x, const Codes& codes) {
  if (x.dim < 1 || codes.n_codes < 1 || x.dim != codes.dim || x.n_heads != codes.n_heads)
    throw std::invalid_argument("fastvq: x and codes must agree in heads and width, with at least one code");
}
inline void check_output(const Rows& x, const Rows& out) {
  if (out.dtype != x.dtype || out.dim != x.dim || out.n_heads != x.n_heads || out.n_rows() != x.n_rows())
    throw std::invalid_argument("fastvq: vectors that go with x must have its shape and dtype");
}

inline double filter_work(const Rows& x, const Codes& codes) {
  return static_cast<double>(x.n_heads * x.n_rows()) * static_cast<double>(codes.n_codes) * static_cast<double>(x.dim);
}

}  // namespace fastvq
