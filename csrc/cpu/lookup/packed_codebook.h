// The packed codebook of all heads: made for one call, or kept by the caller from call to call.
// For sources compiled for the baseline instruction set.
//
// Kept memory holds a PackedHeader, one PackedCodes a head and each head's arrays. The pointers in PackedCodes are set
// again at every use, because the memory may have been copied. The arrays depend on the instruction set.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "duplicate_codes.h"
#include "lookup.h"
#include "../common/parallel.h"

namespace fastvq {

struct PackedHeader {
  uint64_t mark;
  int64_t isa, metric, n_heads, n_codes, dim, bytes;
};
constexpr uint64_t kPackedMark = 0x31515666'6b636170;  // "packfVQ1"; another number for another layout

// Heads that share one codebook (stride 0) share the packing.
class PackedCodebook {
 public:
  PackedCodebook(const LookupKernels& kernels, const Codes& codes, Metric metric, bool fast, int n_threads)
      : heads_(describe(kernels, codes)), memory_(arrays_bytes(kernels, heads_), Buffer::codes_slot) {
    if (!heads_[0].skip_filter) {
      place(kernels, heads_, memory_.data());
      fill(kernels, codes, metric, n_threads);
    }
    if (fast) drop_bounds();
  }
  // From memory that `keep` wrote for the same codes, metric and instruction set.
  PackedCodebook(const LookupKernels& kernels, const Codes& codes, Isa isa, Metric metric, bool fast, void* kept)
      : heads_(describe(kernels, codes)), memory_(0, Buffer::no_slot) {
    PackedHeader header;
    std::memcpy(&header, kept, sizeof header);
    const PackedHeader expected = header_of(kernels, codes, isa, metric);
    if (std::memcmp(&header, &expected, sizeof header) != 0)
      throw std::invalid_argument("fastvq: this packed codebook is of another codebook, metric or instruction set");
    char* at = static_cast<char*>(kept) + padded(sizeof header);
    const PackedCodes described = heads_[0];
    std::memcpy(heads_.data(), at, heads_.size() * sizeof(PackedCodes));
    for (const PackedCodes& p : heads_)
      if (p.n_codes != described.n_codes || p.dim != described.dim || p.width != described.width ||
          p.n_panels != described.n_panels)
        throw std::invalid_argument("fastvq: this packed codebook was changed since pack_codebook made it");
    place(kernels, heads_, at + padded(static_cast<int64_t>(heads_.size() * sizeof(PackedCodes))));
    if (fast) drop_bounds();
  }
  const PackedCodes& operator[](int64_t h) const { return heads_[heads_.size() == 1 ? 0 : static_cast<size_t>(h)]; }

  // Whether the kept memory was packed for this instruction set.
  static bool is_for(const void* kept, Isa isa) {
    PackedHeader header;
    std::memcpy(&header, kept, sizeof header);
    return header.mark == kPackedMark && header.isa == static_cast<int64_t>(isa);
  }

  // The size that `keep` recorded in kept memory; -1 where `keep` did not write it.
  static int64_t recorded_bytes(const void* kept) {
    PackedHeader header;
    std::memcpy(&header, kept, sizeof header);
    return header.mark == kPackedMark ? header.bytes : -1;
  }

  static int64_t kept_bytes(const LookupKernels& kernels, const Codes& codes) {
    const std::vector<PackedCodes> heads = describe(kernels, codes);
    return static_cast<int64_t>(padded(sizeof(PackedHeader)) +
                                padded(static_cast<int64_t>(heads.size() * sizeof(PackedCodes))) +
                                arrays_bytes(kernels, heads));
  }
  static void keep(const LookupKernels& kernels, const Codes& codes, Isa isa, Metric metric, int n_threads, void* to) {
    const PackedHeader header = header_of(kernels, codes, isa, metric);
    std::memcpy(to, &header, sizeof header);
    char* at = static_cast<char*>(to) + padded(sizeof header);
    PackedCodebook packed(describe(kernels, codes));
    const size_t described = packed.heads_.size() * sizeof(PackedCodes);
    if (!packed.heads_[0].skip_filter) {
      place(kernels, packed.heads_, at + padded(static_cast<int64_t>(described)));
      packed.fill(kernels, codes, metric, n_threads);
    }
    std::memcpy(at, packed.heads_.data(), described);
  }

 private:
  explicit PackedCodebook(std::vector<PackedCodes> heads) : heads_(std::move(heads)), memory_(0, Buffer::no_slot) {}

  static PackedHeader header_of(const LookupKernels& kernels, const Codes& codes, Isa isa, Metric metric) {
    return {kPackedMark, static_cast<int64_t>(isa), static_cast<int64_t>(metric), codes.n_heads, codes.n_codes,
            codes.dim,   kept_bytes(kernels, codes)};
  }

  static std::vector<PackedCodes> describe(const LookupKernels& kernels, const Codes& codes) {
    const bool shared = codes.n_heads > 1 && codes.stride_head == 0;
    PackedCodes p{};
    p.n_codes = codes.n_codes;
    p.dim = codes.dim;
    p.width = kernels.width;
    p.n_panels = (codes.n_codes + p.width - 1) / p.width;
    p.skip_filter = codes.dim > kMaxFilterDim;
    return std::vector<PackedCodes>(static_cast<size_t>(shared ? 1 : codes.n_heads), p);
  }

  // Lays one head's arrays out from `base` (null: for their size alone); returns the bytes.
  static size_t lay_out(const LookupKernels& kernels, PackedCodes& p, char* base) {
    size_t used = 0;
    const auto take = [&](int64_t bytes) {
      char* at = base ? base + used : nullptr;
      used += padded(bytes);
      return at;
    };
    const auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(4 * n)); };
    const int64_t padded_codes = p.n_panels * p.width;
    p.panels = take(p.n_panels * kernels.panel_bytes(p.dim));
    p.bias = floats(padded_codes);
    p.slope = floats(padded_codes);
    p.offset = floats(padded_codes);
    p.panel_slope = floats(p.n_panels);
    p.panel_offset = floats(p.n_panels);
    if (kernels.rounded) {
      p.reach = floats(padded_codes);
      p.panel_reach = floats(p.n_panels);
    }
    p.zeros = floats(padded_codes);
    p.mean = floats(2 * p.dim);
    return used;
  }
  static size_t arrays_bytes(const LookupKernels& kernels, const std::vector<PackedCodes>& heads) {
    PackedCodes one = heads[0];
    return one.skip_filter ? 0 : heads.size() * lay_out(kernels, one, nullptr);
  }
  static void place(const LookupKernels& kernels, std::vector<PackedCodes>& heads, char* at) {
    for (PackedCodes& p : heads) at += lay_out(kernels, p, at);
  }

  void fill(const LookupKernels& kernels, const Codes& codes, Metric metric, int n_threads) {
    const int64_t D = codes.dim, H = static_cast<int64_t>(heads_.size());
    const int64_t per_chunk = std::max<int64_t>(1, (int64_t{1} << 15) / (D * heads_[0].width));
    const int64_t n_chunks = (heads_[0].n_panels + per_chunk - 1) / per_chunk;
    std::vector<LookupKernels::Found> found(static_cast<size_t>(H * n_chunks));
    n_threads = useful_threads(8.0 * static_cast<double>(H * codes.n_codes) * static_cast<double>(D), n_threads);
    std::vector<char> workspace(padded(8 * 5 * D) * static_cast<size_t>(n_threads));
    const auto of_thread = [&](int thread) {
      return reinterpret_cast<double*>(workspace.data() + padded(8 * 5 * D) * static_cast<size_t>(thread));
    };
    parallel_chunks(H, n_threads, [&](int64_t h, int thread) {
      kernels.centre(codes, h, metric, of_thread(thread), heads_[static_cast<size_t>(h)]);
    });
    parallel_chunks(H * n_chunks, n_threads, [&](int64_t i, int thread) {
      PackedCodes& p = heads_[static_cast<size_t>(i / n_chunks)];
      const int64_t first = i % n_chunks * per_chunk;
      found[static_cast<size_t>(i)] = kernels.pack(codes, i / n_chunks, metric, first,
                                                   std::min(first + per_chunk, p.n_panels), of_thread(thread), p);
    });
    parallel_chunks(H, n_threads, [&](int64_t h, int) {
      PackedCodes& p = heads_[static_cast<size_t>(h)];
      finish(p, metric, &found[static_cast<size_t>(h * n_chunks)], n_chunks);
      leave_out_duplicates(codes, h, p);
    });
  }

  // A code of norm beyond 2^60 was left out under the euclidean metric. It cannot be nearest to a row of norm below
  // 2^58 if there is a code of norm up to 2^58, which is nearer: 2^59 at most against more than 2^59.4.
  static void finish(PackedCodes& p, Metric metric, const LookupKernels::Found* found, int64_t n) {
    bool usable = false, excluded = false, irregular = false;
    double largest = 0, smallest = HUGE_VAL;
    for (int64_t i = 0; i < n; ++i) {
      usable |= found[i].usable;
      excluded |= found[i].excluded_large;
      irregular |= found[i].irregular;
      largest = std::max(largest, found[i].largest);
      smallest = std::min(smallest, found[i].smallest);
    }
    p.skip_filter = irregular || !usable || (excluded && !(smallest <= 0x1p58));
    p.row_part = 0;
    if (metric == Metric::euclidean) {
      p.row_limit = 0x1p58f;
      p.row_part = static_cast<float>((1 + 0x1p-10) * (static_cast<double>(p.dim) + 3) * 0x1p-53);
    } else {
      p.row_limit = static_cast<float>(std::min(0x1p100, 0x1p120 / (largest + p.mean_norm)));
    }
    std::fill(p.zeros, p.zeros + p.n_panels * p.width, 0.0f);
  }

  // Without a certificate a bound is zero.
  void drop_bounds() {
    for (PackedCodes& p : heads_) {
      p.slope = p.offset = p.panel_slope = p.panel_offset = p.reach = p.panel_reach = p.zeros;
      p.row_part = 0;
    }
  }

  std::vector<PackedCodes> heads_;
  Buffer memory_;
};

}  // namespace fastvq
