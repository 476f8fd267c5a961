// Sums of rows per code, in double and in row order: shared by code_statistics and by the blocks of a training step.
// For sources compiled for the baseline instruction set.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../common/checkpoint.h"
#include "kernels.h"
#include "saturate.h"

namespace fastvq {

// Offsets of the rows of a head from `row` on, without a division a row.
class RowWalk {
 public:
  RowWalk(const Rows& x, int64_t head, int64_t row)
      : x_(x), inner_(row % x.n_inner), base_(head * x.stride_head + (row / x.n_inner) * x.stride_outer) {}
  int64_t offset() const { return base_ + inner_ * x_.stride_inner; }
  void next() {
    if (++inner_ == x_.n_inner) {
      inner_ = 0;
      base_ += x_.stride_outer;
    }
  }

 private:
  const Rows& x_;
  int64_t inner_, base_;
};

struct CodeRange {
  int64_t code_begin, code_end, d_begin, d_end;
};

// Adds rows to a table [code_end - code_begin, d_end - d_begin] of sums.
class RowAdder {
 public:
  RowAdder(const Rows& x, const StatisticsKernels& kernels) : x_(x), kernels_(kernels) {}

  // Rows [begin, end) of a head. index and keep (null: all rows) are those of the head.
  void add(const CodeRange& range, int64_t head, int64_t begin, int64_t end, const int64_t* index, const uint8_t* keep,
           double* table) {
    if (begin >= end) return;  // without rows n_inner may be 0, which RowWalk divides by
    const int64_t width = range.d_end - range.d_begin;
    const bool is_double = x_.dtype == DType::f64;
    const bool direct = x_.stride_d == 1 && (is_double || x_.dtype == DType::f32);
    if (!direct) staged_.resize(static_cast<size_t>(kListed * width));
    const char* data = static_cast<const char*>(x_.data) + range.d_begin * x_.stride_d * element_size(x_.dtype);
    const auto add_rows = is_double ? kernels_.add_f64 : kernels_.add_f32;
    RowWalk walk(x_, head, begin);
    for (int64_t first = begin; first < end; first += kListed) {
      if (first > begin) checkpoint();
      int64_t n = 0;
      for (int64_t r = first; r < std::min(first + kListed, end); ++r, walk.next()) {
        offsets_[n] = walk.offset();
        slots_[n] = (index[r] - range.code_begin) * width;
        n += (index[r] >= range.code_begin) & (index[r] < range.code_end) & (keep == nullptr || keep[r] != 0);
      }
      if (direct) {
        add_rows(data, offsets_, slots_, n, width, table);
        continue;
      }
      kernels_.stage(data, x_.dtype, offsets_, n, width, x_.stride_d, staged_.data());
      for (int64_t i = 0; i < n; ++i) offsets_[i] = i * width;
      add_rows(staged_.data(), offsets_, slots_, n, width, table);
    }
  }

 private:
  static constexpr int64_t kListed = 512;  // rows listed before they are added: the lists stay in the first-level cache

  const Rows& x_;
  const StatisticsKernels& kernels_;
  int64_t offsets_[kListed], slots_[kListed];
  std::vector<double> staged_;  // of float where x is not double
};

// Rounds a table to sums [n_codes, row]; returns whether all of the table is finite.
template <class Out>
bool store_sums(const double* table, int64_t n_codes, int64_t width, Out* sums, int64_t row) {
  double pollution = 0.0;  // 0 while every sum is finite, else NaN
  for (int64_t k = 0; k < n_codes; ++k)
    for (int64_t d = 0; d < width; ++d) {
      const double sum = table[k * width + d];
      sums[k * row + d] = saturated<Out>(sum);
      pollution += sum * 0.0;
    }
  return pollution == 0.0;
}

// The statistics of a whole codebook, block after block of rows in their order.
class BlockStatistics {
 public:
  BlockStatistics(const Rows& x, int64_t n_codes, const StatisticsOut& out, Isa isa)
      : x_(x),
        n_codes_(n_codes),
        out_(out),
        adder_(x, statistics_kernels(isa)),
        table_(static_cast<size_t>(x.n_heads * n_codes * x.dim), 0.0) {
    std::fill(out.counts, out.counts + x.n_heads * n_codes, int64_t{0});
  }

  // Rows [begin, end) of a head; every index is -1 or a code.
  void add(int64_t head, int64_t begin, int64_t end, const int64_t* indices) {
    const int64_t* index = indices + head * x_.n_rows();
    int64_t* counts = out_.counts + head * n_codes_;
    for (int64_t r = begin; r < end; ++r)
      if (index[r] >= 0) ++counts[index[r]];
    adder_.add({0, n_codes_, 0, x_.dim}, head, begin, end, index, nullptr, table_.data() + head * n_codes_ * x_.dim);
  }

  // Returns whether all sums are finite. If not, a row is not finite, and the statistics have to be computed without it.
  bool finish() const {
    const int64_t n = x_.n_heads * n_codes_;
    return out_.sums_double ? store_sums(table_.data(), n, x_.dim, static_cast<double*>(out_.sums), x_.dim)
                            : store_sums(table_.data(), n, x_.dim, static_cast<float*>(out_.sums), x_.dim);
  }

 private:
  const Rows& x_;
  const int64_t n_codes_;
  const StatisticsOut out_;
  RowAdder adder_;
  std::vector<double> table_;
};

}  // namespace fastvq
