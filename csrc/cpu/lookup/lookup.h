// Shared by all parts of the nearest-code lookup: the packed codebook, and the functions that every instruction set
// provides. lookup/filter.h describes the method.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../../fastvq_cpu.h"
#include "../common/checkpoint.h"

namespace fastvq {

// Rows are searched in blocks. The size depends on D alone, so that neither threads nor instruction sets
// change the order in which a loss is added up. 24 is a multiple of every kernel's tile of rows.
constexpr int64_t kMaxBlockRows = 240;
inline int64_t block_rows(int64_t dim) {
  const int64_t fit = 65536 / dim / 24 * 24;  // 256 KiB of float32 rows
  return fit < 24 ? 24 : fit > kMaxBlockRows ? kMaxBlockRows : fit;
}

// Wider vectors would need a bound whose first-order form no longer holds; they are scored by the definition.
constexpr int64_t kMaxFilterDim = 16384;

// Bias of a code that cannot win: products of the rows and codes of a filter stay below 2^121.
constexpr float kUnreachable = -0x1p127f;
constexpr float kDuplicate = -0x1.8p127f;  // of a code that cannot win because it repeats an earlier one

// One head's codebook as the filter reads it: panels of `width` codes, for float32 filters [n_panels][dim][width].
// The score of code k for row x is bias + x'.c'; bounds.h derives its error bound.
struct PackedCodes {
  int64_t n_codes, dim, width, n_panels;
  char* panels;                      // [n_panels] of panel_bytes each
  float *bias, *slope, *offset;      // [n_panels * width]
  float *panel_slope, *panel_offset; // [n_panels], the largest of the panel
  float *reach, *panel_reach;        // null where the filter does not round its operands
  float* zeros;                      // [n_panels * width]: the bounds of a fast lookup
  float* mean;  // [2 dim]: the vector subtracted from the codes (zero unless centred), then zeros
  bool centred;
  double mean_norm;
  float row_part;  // own = row_part * |x'|^2
  float row_limit;  // rows of a larger norm are scored by the definition
  bool skip_filter;  // every row is scored by the definition
};

struct LookupCall {
  const Rows* x;
  const Codes* codes;
  Metric metric;
  bool fast;
  const uint8_t* mask;  // [H, N] or null; zero: no vector
  int64_t* indices;  // [H, N]
};

// Every function is called in the default floating-point environment.
struct LookupKernels {
  int64_t width;  // codes in a panel
  bool rounded;  // whether reach is needed
  int64_t (*panel_bytes)(int64_t dim);
  // Chooses the mean to subtract. workspace: 2 dim doubles.
  void (*centre)(const Codes&, int64_t head, Metric, double* workspace, PackedCodes&);
  // Packs panels [first, last). workspace: 5 dim doubles.
  struct Found {
    bool usable, excluded_large, irregular;
    double largest, smallest;
  };
  Found (*pack)(const Codes&, int64_t head, Metric, int64_t first, int64_t last, double* workspace, PackedCodes&);
  // Bytes of workspace for one thread of search.
  size_t (*search_bytes)(int64_t dim);
  void (*search)(const LookupCall&, const PackedCodes&, int64_t head, int64_t first, int64_t n, char* workspace,
                 LookupCounts&);
  // Writes the chosen codes of rows [first, first + n) and returns their sum of (x - c)^2. workspace: 3 dim doubles.
  double (*gather)(const LookupCall&, const Rows& quantized, int64_t head, int64_t first, int64_t n, int64_t& n_real,
                   double* workspace);
  // workspace: 4 dim doubles.
  void (*backward)(const Rows& x, const Codes&, const int64_t* indices, const Rows* grad_quantized, double scale,
                   bool rotation, const Rows& grad_x, int64_t head, int64_t first, int64_t n, double* workspace);
};

extern const LookupKernels lookup_kernels_generic;
#if defined(__x86_64__)
extern const LookupKernels lookup_kernels_avx2, lookup_kernels_avx512;
#if defined(FASTVQ_VNNI)
extern const LookupKernels lookup_kernels_avx512_vnni;
#endif
#if defined(FASTVQ_AMX)
extern const LookupKernels lookup_kernels_amx;
#endif
#if defined(FASTVQ_EMULATED)
extern const LookupKernels lookup_kernels_emulated;
#endif
#endif
const LookupKernels& lookup_kernels(Isa isa, int64_t dim);

}  // namespace fastvq
