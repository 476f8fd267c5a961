// Measurements inside the kernels of fastvq._cpu, for tests and benchmarks: fastvq._cpu_testing. No wheel holds it.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../../fastvq_cpu.h"
#include "../lookup/lookup.h"

namespace fastvq {

// How much of its error bound the lookup's filter uses (bound_check.h).
struct BoundUse {
  double largest = 0;   // of |score - truth| / bound; NaN where one of them is
  int64_t n_pairs = 0;  // rows and codes that the filter scored, and that were compared
};
BoundUse bound_use(const Rows& x, const Codes& codes, Metric metric, Isa isa);

// GFLOP/s of the multiply-adds that an instruction set's filter is made of, on the calling thread.
double peak_gflops(Isa isa, double milliseconds);

// What an instruction set provides.
struct TestingKernels {
  // Bytes of workspace for check_bound.
  size_t (*workspace_bytes)(int64_t dim);
  BoundUse (*check_bound)(const LookupCall&, const PackedCodes&, int64_t head, int64_t first, int64_t n,
                          char* workspace);
  // n rounds of independent multiply-adds; out: 16 floats. Returns the operations done.
  double (*peak_fma)(int64_t n, float* out);
};

extern const TestingKernels testing_kernels_generic;
#if defined(__x86_64__)
extern const TestingKernels testing_kernels_avx2, testing_kernels_avx512;
#if defined(FASTVQ_VNNI)
extern const TestingKernels testing_kernels_avx512_vnni;
#endif
#if defined(FASTVQ_AMX)
extern const TestingKernels testing_kernels_amx;
#endif
#if defined(FASTVQ_EMULATED)
extern const TestingKernels testing_kernels_emulated;
#endif
#endif
// Those of the filter that a lookup of vectors of this width runs.
const TestingKernels& testing_kernels(Isa isa, int64_t dim);

}  // namespace fastvq
