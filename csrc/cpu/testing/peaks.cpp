// The machine's ceilings, measured: what a benchmark sets a kernel's speed against.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../lookup/lookup.h"
#include "../common/parallel.h"

namespace fastvq {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double fma_peak(Isa isa, double milliseconds) {
  constexpr int64_t kAnyWide = 64;  // elements: of vectors that every instruction set serves at its best
  const NearestKernels& kernels = nearest_kernels(isa, kAnyWide);
  float out[16] = {};
  double best = 0;
  const auto start = std::chrono::steady_clock::now();
  do {
    const auto lap = std::chrono::steady_clock::now();
    const double operations = kernels.fma_chains(20000, out);
    best = std::max(best, operations / seconds_since(lap) * 1e-9);
  } while (seconds_since(start) < milliseconds * 1e-3);
  return best;
}

double read_peak(int64_t n_bytes, int n_threads) {
  const int64_t n = std::max<int64_t>(n_bytes / 8, 1 << 13), n_chunks = n >> 13;
  std::vector<uint64_t> memory(static_cast<size_t>(n), 1), sums(static_cast<size_t>(n_chunks));
  double best = 0;
  for (int lap = 0; lap < 5; ++lap) {
    const auto start = std::chrono::steady_clock::now();
    parallel_chunks(n_chunks, n_threads, [&](int64_t c, int) {
      const uint64_t* p = memory.data() + (c << 13);
      uint64_t lanes[32] = {};
      for (int64_t i = 0; i < 1 << 13; i += 32)
        for (int j = 0; j < 32; ++j) lanes[j] += p[i + j];
      uint64_t sum = 0;
      for (uint64_t lane : lanes) sum += lane;
      sums[static_cast<size_t>(c)] += sum;  // stored, or the reads would be removed
    });
    best = std::max(best, static_cast<double>(n_chunks << 16) / seconds_since(start) * 1e-9);
  }
  return best;
}

}  // namespace fastvq
