#include "testing.h"

#include <algorithm>
#include <chrono>

#include "../lookup/driver.h"

namespace fastvq {

const TestingKernels& testing_kernels(Isa isa, int64_t dim) {
  const LookupKernels* lookup = &lookup_kernels(isa, dim);
#if defined(__x86_64__)
#if defined(FASTVQ_AMX)
  if (lookup == &lookup_kernels_amx) return testing_kernels_amx;
#endif
#if defined(FASTVQ_EMULATED)
  if (lookup == &lookup_kernels_emulated) return testing_kernels_emulated;
#endif
#if defined(FASTVQ_VNNI)
  if (lookup == &lookup_kernels_avx512_vnni) return testing_kernels_avx512_vnni;
#endif
  if (lookup == &lookup_kernels_avx512) return testing_kernels_avx512;
  if (lookup == &lookup_kernels_avx2) return testing_kernels_avx2;
#endif
  (void)lookup;
  return testing_kernels_generic;
}

BoundUse bound_use(const Rows& x, const Codes& codes, Metric metric, Isa isa) {
  check(x, codes);
  BoundUse use;
  if (x.n_heads * x.n_rows() == 0) return use;
  const TestingKernels& kernels = testing_kernels(isa, x.dim);
  const PackedCodebook packed(lookup_kernels(isa, x.dim), codes, metric, false, 1);
  const LookupCall lookup{&x, &codes, metric, false, nullptr, nullptr};
  for_blocks(x, 1, kernels.workspace_bytes(x.dim), [&](int64_t h, int64_t first, int64_t n, int64_t, char* workspace) {
    const BoundUse here = kernels.check_bound(lookup, packed[h], h, first, n, workspace);
    use.largest = here.largest <= use.largest ? use.largest : here.largest;
    use.n_pairs += here.n_pairs;
  });
  return use;
}

double peak_gflops(Isa isa, double milliseconds) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  constexpr int64_t kAnyWide = 64;  // elements: of vectors that every instruction set serves at its best
  const TestingKernels& kernels = testing_kernels(isa, kAnyWide);
  float out[16] = {};
  double best = 0;
  const auto start = Clock::now();
  do {
    const auto lap = Clock::now();
    const double operations = kernels.peak_fma(20000, out);
    best = std::max(best, operations / seconds_since(lap) * 1e-9);
  } while (seconds_since(start) < milliseconds * 1e-3);
  return best;
}

}  // namespace fastvq
