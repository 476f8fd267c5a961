// When a kernel's call is left: between chunks, inside long chunks of helper threads, and never where it may not be.
#include "../../csrc/cpu/common/parallel.h"

#include <chrono>
#include <cstdio>

using namespace fastvq;
using Clock = std::chrono::steady_clock;

namespace {
std::atomic<int> asked{0};
bool always() {
  ++asked;
  return true;
}
void sleep_ms(int n) { std::this_thread::sleep_for(std::chrono::milliseconds(n)); }

// Seconds until a call of 400 chunks, 10 ms each, is left; negative: it was not.
double left_after(int n_threads) {
  begin_call();
  const auto start = Clock::now();
  try {
    parallel_chunks(400, n_threads, [&](int64_t, int) { sleep_ms(10); });
  } catch (const Interrupted&) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }
  return -1;
}
}  // namespace

int main() {
  set_interrupt_check(&always);
  for (int n_threads : {1, 4}) {
    const double seconds = left_after(n_threads);
    if (seconds < 0.03 || seconds > 1) return 1;
  }
  begin_call();
  try {  // one chunk a thread, so only its own checkpoints can end it
    parallel_chunks(4, 4, [&](int64_t, int) {
      for (int i = 0; i < 400; ++i) {
        sleep_ms(10);
        checkpoint();
      }
      asked = 1000;
    });
    return 2;
  } catch (const Interrupted&) {
    if (asked >= 1000) return 3;
  }
  const int before = asked;
  begin_call();
  {
    const Uninterrupted whole;
    parallel_chunks(16, 2, [&](int64_t, int) { sleep_ms(10); });
  }
  if (asked != before) return 4;
  set_interrupt_check(nullptr);
  begin_call();
  parallel_chunks(8, 1, [&](int64_t, int) { sleep_ms(10); });
  return 0;
}
