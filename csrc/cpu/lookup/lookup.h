// What the parts of the nearest-code lookup share: the packed codebook, and the functions that every
// instruction set provides. The method is described at the top of lookup/filter.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../../fastvq.h"
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

// Bias of a code that cannot win. Products of rows and codes that the filter takes stay below 2^121.
constexpr float kNever = -0x1p127f;
constexpr float kRepeated = -0x1.8p127f;  // of one that cannot because it repeats an earlier one

// One head's codebook as the filter reads it: panels of `width` codes, for float32 filters [n_panels][dim][width].
// The score of code k for row x is bias + x'.c'; its error is at most |x'| * slope + offset (+ the row's own part, and
// lost * reach where the filter rounds its operands).
struct PackedCodes {
  int64_t n_codes, dim, width, n_panels;
  char* panels;                      // [n_panels] of panel_bytes each
  float *bias, *slope, *offset;      // [n_panels * width]
  float *panel_slope, *panel_offset; // [n_panels], the largest of the panel
  float *reach, *panel_reach;        // filters that round their operands: |c^|, what a row's rounding is worth
  float* zeros;                      // [n_panels * width]: the bounds where no certificate is asked for
  float* mean;                       // [2 dim]: what was subtracted from the codes (zero where nothing was), zeros
  bool centred;
  double mean_norm;
  float row_part;   // the row's own part of the error is row_part * |x'|^2
  float row_limit;  // rows of a larger norm are scored by the definition
  bool only_exact;  // every row is scored by the definition
};

struct Lookup {
  const Rows* x;
  const Codes* codes;
  Metric metric;
  bool fast;
  const uint8_t* mask;  // [H, N] or null; zero = no vector there
  int64_t* indices;     // [H, N]
};

// What an instruction set provides. Every function is called with the default floating-point environment.
struct NearestKernels {
  int64_t width;  // codes in a panel
  bool rounded;   // whether reach is needed
  int64_t (*panel_bytes)(int64_t dim);
  // Chooses the mean to subtract. scratch: 2 dim doubles.
  void (*centre)(const Codes&, int64_t head, Metric, double* scratch, PackedCodes&);
  // Packs panels [first, last); returns what the codes there mean for the whole codebook.
  // scratch: 5 dim doubles.
  struct Found {
    bool usable, excluded_large, irregular;
    double largest, smallest;
  };
  Found (*pack)(const Codes&, int64_t head, Metric, int64_t first, int64_t last, double* scratch, PackedCodes&);
  // Bytes of scratch for one thread of search.
  size_t (*search_bytes)(int64_t dim);
  void (*search)(const Lookup&, const PackedCodes&, int64_t head, int64_t first, int64_t n, char* scratch,
                 LookupCounts&);
  // Writes the chosen codes of rows [first, first + n) and returns their sum of (x - c)^2. room: 3 dim doubles.
  double (*gather)(const Lookup&, const Rows& quantized, int64_t head, int64_t first, int64_t n, int64_t& n_real,
                   double* room);
  // room: 4 dim doubles.
  void (*backward)(const Rows& x, const Codes&, const int64_t* indices, const Rows* grad_quantized, double scale,
                   bool rotation, const Rows& grad_x, int64_t head, int64_t first, int64_t n, double* room);
};

extern const NearestKernels nearest_generic;
#if defined(__x86_64__)
extern const NearestKernels nearest_avx2, nearest_avx512;
#if defined(FASTVQ_VNNI)
extern const NearestKernels nearest_avx512_vnni;
#endif
#if defined(FASTVQ_AMX)
extern const NearestKernels nearest_amx;
#endif
#if defined(FASTVQ_EMULATED)
extern const NearestKernels nearest_emulated;
#endif
#endif
const NearestKernels& nearest_kernels(Isa isa, int64_t dim);

}  // namespace fastvq
