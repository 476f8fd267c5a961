// Threads of a call: started for the call and joined before it returns. A pool (such as OpenMP's) would not survive fork(),
// and a DataLoader worker that inherits one hangs. With one thread none is started.
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

// How many threads are worth starting for this much work: one costs 10 to 30 microseconds, and kWorkPerThread takes longer.
constexpr double kWorkPerThread = 4e6;  // multiply-adds
inline int useful_threads(double multiply_adds, int n_threads) {
  const double useful = multiply_adds / kWorkPerThread;
  return useful < n_threads ? (useful < 1 ? 1 : static_cast<int>(useful)) : n_threads;
}

// Joins its threads when the scope is left, also by an exception.
struct JoinedThreads {
  std::vector<std::thread> threads;
  ~JoinedThreads() {
    for (std::thread& t : threads) t.join();
  }
};

// Calls body(chunk, thread) for every chunk in [0, n_chunks). Free threads take the chunks in order. Bodies run in the
// default floating-point environment. After an exception in a body no thread takes another chunk, and the exception is
// thrown again here. The same holds for an interruption, which is checked before every chunk but a thread's first.
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
      // The system starts no more threads: those that run do the work.
    } catch (...) {
      stop();
      throw;
    }
    work(0);
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace fastvq
