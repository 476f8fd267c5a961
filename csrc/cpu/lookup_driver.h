// What every lookup over a whole tensor needs: memory, the packed codebooks, blocks of rows handed to threads.
// For sources compiled for the baseline instruction set.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "fp_environment.h"
#include "nearest.h"
#include "parallel.h"

namespace fastvq {

constexpr size_t kAlign = 64;
constexpr size_t kKeep = size_t{1} << 20;

// Uninitialised memory. The calling thread keeps up to 1 MiB in each slot from call to call: fresh pages would cost
// a small lookup more than its arithmetic.
class Buffer {
 public:
  enum Slot { codes_slot, rows_slot, no_slot };
  Buffer(size_t bytes, Slot slot) {
    bytes = (bytes + kAlign - 1) / kAlign * kAlign + kAlign;
    if (slot == no_slot || bytes > kKeep) {
      own_ = data_ = allocate(bytes);
      return;
    }
    thread_local Kept kept[no_slot];
    if (kept[slot].bytes < bytes) {
      std::free(kept[slot].memory);
      kept[slot].memory = nullptr;
      kept[slot].bytes = 0;
      kept[slot].memory = allocate(bytes);
      kept[slot].bytes = bytes;
    }
    data_ = kept[slot].memory;
  }
  ~Buffer() { std::free(own_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  struct Kept {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Kept() { std::free(memory); }
  };
  static void* allocate(size_t bytes) {
    void* p = std::aligned_alloc(kAlign, bytes);
    if (!p) throw std::bad_alloc();
    return p;
  }
  void* own_ = nullptr;
  void* data_ = nullptr;
};

inline size_t padded(int64_t bytes) { return (static_cast<size_t>(bytes) + kAlign - 1) / kAlign * kAlign; }

// A thread must have this much to do, in multiply-adds of the filter, to be worth starting.
constexpr double kWorkPerThread = 4e6;
inline int useful_threads(double work, int n_threads) {
  const double useful = work / kWorkPerThread;
  return useful < n_threads ? (useful < 1 ? 1 : static_cast<int>(useful)) : n_threads;
}

// The packed codebooks of all heads. Heads that share one (stride 0) share the packing.
class PackedHeads {
 public:
  PackedHeads(const NearestKernels& kernels, const Codes& codes, Metric metric, bool fast, int n_threads)
      : shared_(codes.n_heads > 1 && codes.stride_head == 0),
        heads_(static_cast<size_t>(shared_ ? 1 : codes.n_heads)),
        memory_(prepare(kernels, codes), Buffer::codes_slot) {
    const int64_t D = codes.dim, H = static_cast<int64_t>(heads_.size());
    if (heads_[0].only_exact) return;
    char* at = memory_.data();
    const auto take = [&](int64_t n) {
      float* p = reinterpret_cast<float*>(at);
      at += padded(4 * n);
      return p;
    };
    for (PackedCodes& p : heads_) {
      const int64_t padded_codes = p.n_panels * p.width;
      p.panels = take(padded_codes * D);
      p.bias = take(padded_codes);
      p.slope = take(padded_codes);
      p.offset = take(padded_codes);
      p.panel_slope = take(p.n_panels);
      p.panel_offset = take(p.n_panels);
      p.mean = take(2 * D);
    }
    const int64_t per_chunk = std::max<int64_t>(1, (int64_t{1} << 15) / (D * heads_[0].width));
    const int64_t n_chunks = (heads_[0].n_panels + per_chunk - 1) / per_chunk;
    std::vector<NearestKernels::Found> found(static_cast<size_t>(H * n_chunks));
    n_threads = useful_threads(8.0 * static_cast<double>(H * codes.n_codes) * static_cast<double>(D), n_threads);
    std::vector<char> scratch(padded(8 * 5 * D) * static_cast<size_t>(n_threads));
    const auto room = [&](int thread) {
      return reinterpret_cast<double*>(scratch.data() + padded(8 * 5 * D) * static_cast<size_t>(thread));
    };
    parallel_chunks(H, n_threads, [&](int64_t h, int thread) {
      const DefaultFloatingPoint scope;
      kernels.centre(codes, h, metric, room(thread), heads_[static_cast<size_t>(h)]);
    });
    parallel_chunks(H * n_chunks, n_threads, [&](int64_t i, int thread) {
      const DefaultFloatingPoint scope;
      PackedCodes& p = heads_[static_cast<size_t>(i / n_chunks)];
      const int64_t first = i % n_chunks * per_chunk;
      found[static_cast<size_t>(i)] = kernels.pack(codes, i / n_chunks, metric, fast, first,
                                                   std::min(first + per_chunk, p.n_panels), room(thread), p);
    });
    for (int64_t h = 0; h < H; ++h) finish(heads_[static_cast<size_t>(h)], metric, fast, &found[static_cast<size_t>(h * n_chunks)], n_chunks);
  }
  const PackedCodes& operator[](int64_t h) const { return heads_[static_cast<size_t>(shared_ ? 0 : h)]; }

 private:
  size_t prepare(const NearestKernels& kernels, const Codes& codes) {
    size_t bytes = 0;
    for (PackedCodes& p : heads_) {
      p = PackedCodes{};
      p.n_codes = codes.n_codes;
      p.dim = codes.dim;
      p.width = kernels.width;
      p.n_panels = (codes.n_codes + p.width - 1) / p.width;
      p.only_exact = codes.dim > kMaxFilterDim;
      if (!p.only_exact)
        bytes += padded(4 * p.n_panels * p.width * p.dim) + 3 * padded(4 * p.n_panels * p.width) +
                 2 * padded(4 * p.n_panels) + padded(8 * p.dim);
    }
    return bytes;
  }

  // A code of norm beyond 2^60 was left out under the euclidean metric. It cannot be nearest to a row of norm below
  // 2^58 if there is a code of norm up to 2^58, which is nearer: 2^59 at most against more than 2^59.4.
  static void finish(PackedCodes& p, Metric metric, bool fast, const NearestKernels::Found* found, int64_t n) {
    bool usable = false, excluded = false, irregular = false;
    double largest = 0, smallest = HUGE_VAL;
    for (int64_t i = 0; i < n; ++i) {
      usable |= found[i].usable;
      excluded |= found[i].excluded_large;
      irregular |= found[i].irregular;
      largest = std::max(largest, found[i].largest);
      smallest = std::min(smallest, found[i].smallest);
    }
    p.only_exact = irregular || !usable || (excluded && !(smallest <= 0x1p58));
    p.row_part = 0;
    if (metric == Metric::euclidean) {
      p.row_limit = 0x1p58f;
      if (!fast) p.row_part = static_cast<float>((1 + 0x1p-10) * (static_cast<double>(p.dim) + 3) * 0x1p-53);
    } else {
      p.row_limit = static_cast<float>(std::min(0x1p100, 0x1p120 / (largest + p.mean_norm)));
    }
  }

  bool shared_;
  std::vector<PackedCodes> heads_;
  Buffer memory_;
};

// Calls body(head, first row, rows, block, thread, scratch) for every block, scratch made once a thread.
template <class Body>
void for_blocks(const Rows& x, int n_threads, size_t scratch_bytes, const Body& body, int64_t block) {
  const int64_t N = x.n_rows(), n_blocks = (N + block - 1) / block;
  std::vector<std::unique_ptr<Buffer>> scratch(static_cast<size_t>(n_threads));
  parallel_chunks(x.n_heads * n_blocks, n_threads, [&](int64_t i, int thread) {
    const DefaultFloatingPoint scope;
    auto& mine = scratch[static_cast<size_t>(thread)];
    if (!mine) mine = std::make_unique<Buffer>(scratch_bytes, thread == 0 ? Buffer::rows_slot : Buffer::no_slot);
    const int64_t first = i % n_blocks * block;
    body(i / n_blocks, first, std::min(block, N - first), i, mine->data());
  });
}

template <class Body>
void for_blocks(const Rows& x, int n_threads, size_t scratch_bytes, const Body& body) {
  for_blocks(x, n_threads, scratch_bytes, body, block_rows(x.dim));
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
  return static_cast<double>(x.n_heads * x.n_rows()) * static_cast<double>(codes.n_codes) *
         static_cast<double>(x.dim);
}

}  // namespace fastvq
