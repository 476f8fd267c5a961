// parallel_chunks when the n-th allocation fails, for every n: an exception each time, and every thread joined.
#include "../../csrc/cpu/common/parallel.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

namespace {
std::atomic<long> left{-1};  // allocations until one fails; negative: none does
}

void* operator new(std::size_t n) {
  if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
  void* p = std::malloc(n ? n : 1);
  if (!p) throw std::bad_alloc();
  return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

int main() {
  int failures = 0;
  for (long n = 0;; ++n) {
    std::atomic<int> running{0}, done{0};
    bool thrown = false;
    left = n;
    try {
      fastvq::parallel_chunks(32, 4, [&](int64_t, int) {
        ++running;
        struct Leave {
          std::atomic<int>& running;
          ~Leave() { --running; }
        } leave{running};
        const std::unique_ptr<int> mine(new int(1));
        done += *mine;
      });
    } catch (const std::bad_alloc&) {
      thrown = true;
    }
    const bool untouched = left.exchange(-1) >= 0;  // the call makes fewer than n allocations
    if (running != 0 || (thrown ? untouched : done != 32)) return 1;
    failures += thrown;
    if (untouched) break;
    if (!thrown) return 2;
  }
  std::printf("%d", failures);
  return failures >= 32 ? 0 : 3;
}
