// checkpoint(), called between two pieces of long work, lets a call be interrupted. See ../../interrupt.h.
#pragma once
#include <atomic>

#include "../../interrupt.h"

namespace fastvq {

// Throws Interrupted if the call should stop. Costs about 5 ns: once for each 10 microseconds of work is plenty.
// Not inline: sources of any instruction set may call it.
void checkpoint();

// Within the scope checkpoint() on this thread only reads `stop`, which the thread that called the kernel sets.
class HelperThread {
 public:
  explicit HelperThread(const std::atomic<bool>& stop);
  ~HelperThread();
  HelperThread(const HelperThread&) = delete;
  HelperThread& operator=(const HelperThread&) = delete;
};

// Within the scope checkpoint() on this thread does nothing.
class Uninterrupted {
 public:
  Uninterrupted();
  ~Uninterrupted();
  Uninterrupted(const Uninterrupted&) = delete;
  Uninterrupted& operator=(const Uninterrupted&) = delete;

 private:
  bool before_;
};

}  // namespace fastvq
