// One way to use several threads.
//
// Plain threads, made for the call and joined before it returns, rather than a pool: a pool (OpenMP's, say)
// does not survive fork(), and a DataLoader worker that inherits one hangs. Starting a thread costs 10 to 30
// microseconds, so callers ask for more than one only when there is work to share. With one thread none is
// started at all.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "checkpoint.h"
#include "fp_environment.h"

namespace fastvq {

// Threads that are joined wherever the scope is left, by an exception too.
struct JoinedThreads {
  std::vector<std::thread> threads;
  ~JoinedThreads() {
    for (std::thread& t : threads) t.join();
  }
};

// Calls body(chunk, thread) for every chunk in [0, n_chunks), chunks handed out in order to whichever thread is free.
// Bodies run in the default floating-point environment. An exception in a body stops the hand-out and is thrown again
// here; so does an interruption, which is asked for before every chunk but a thread's first.
template <class Body>
void parallel_chunks(int64_t n_chunks, int n_threads, const Body& body) {
  if (n_threads > n_chunks) n_threads = static_cast<int>(n_chunks);
  if (n_threads <= 1) {
    const DefaultFloatingPoint environment;
    for (int64_t c = 0; c < n_chunks; ++c) {
      if (c > 0) checkpoint();
      body(c, 0);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false}, stopped{false};
  std::exception_ptr error;  // of the first body that throws; read once all threads are joined
  const auto stop = [&] {
    next.store(n_chunks, std::memory_order_relaxed);
    stopped.store(true, std::memory_order_relaxed);
  };
  const auto work = [&](int thread) noexcept {
    const DefaultFloatingPoint environment;
    try {
      for (int64_t c, done = 0; (c = next.fetch_add(1, std::memory_order_relaxed)) < n_chunks; ++done) {
        if (done > 0) checkpoint();
        body(c, thread);
      }
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
      stop();
    }
  };
  const auto help = [&](int thread) {
    const HelperThread helper(stopped);
    work(thread);
  };
  {
    JoinedThreads joined;
    joined.threads.reserve(static_cast<size_t>(n_threads) - 1);
    try {
      for (int t = 1; t < n_threads; ++t) joined.threads.emplace_back(help, t);
    } catch (const std::system_error&) {
      // The system gives no more threads: the ones made so far do the work.
    } catch (...) {
      stop();
      throw;
    }
    work(0);
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace fastvq
