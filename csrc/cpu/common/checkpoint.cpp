#include "checkpoint.h"

#include <chrono>
#include <cstdint>
#include <ctime>

namespace fastvq {
namespace {

constexpr int64_t kInterruptPeriod = 50'000'000;  // nanoseconds

std::atomic<InterruptCheck> interrupt_check{nullptr};
thread_local const std::atomic<bool>* stop_of_call = nullptr;  // null on the thread that called the kernel
thread_local bool uninterrupted = false;
thread_local int64_t last_check = 0;  // or the start of the call

// A clock that is cheap to read; a resolution of some milliseconds is enough.
int64_t nanoseconds() {
#if defined(CLOCK_MONOTONIC_COARSE)
  timespec now;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
#else
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
#endif
}

}  // namespace

void set_interrupt_check(InterruptCheck check) { interrupt_check.store(check); }

void begin_call() { last_check = nanoseconds(); }

void checkpoint() {
  if (stop_of_call) {
    if (stop_of_call->load(std::memory_order_relaxed)) throw Interrupted();
    return;
  }
  if (uninterrupted) return;
  const int64_t now = nanoseconds();
  if (now - last_check < kInterruptPeriod) return;
  last_check = now;
  const InterruptCheck check = interrupt_check.load(std::memory_order_relaxed);
  if (!check) return;
  if (check()) throw Interrupted();
}

HelperThread::HelperThread(const std::atomic<bool>& stop) { stop_of_call = &stop; }
HelperThread::~HelperThread() { stop_of_call = nullptr; }

Uninterrupted::Uninterrupted() : before_(uninterrupted) { uninterrupted = true; }
Uninterrupted::~Uninterrupted() { uninterrupted = before_; }

}  // namespace fastvq
