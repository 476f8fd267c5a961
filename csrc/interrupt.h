// Interrupting a long call (Ctrl-C).
//
// Kernels know nothing of Python. The binding gives them a function that returns whether to stop, and the thread that
// called the kernel calls it between two pieces of work, at most every kInterruptPeriod. The kernel then throws
// Interrupted, and helper threads stop before their next piece. A kernel that changes the caller's memory in place is
// not interrupted, or may be called again, which writes all that it reads (pixelcnn_step): no call leaves that memory
// half changed.
#pragma once
#include <exception>

namespace fastvq {

struct Interrupted : std::exception {
  const char* what() const noexcept override { return "fastvq: interrupted"; }
};

// Returns true to stop. It runs on the thread that called the kernel.
using InterruptCheck = bool (*)();
void set_interrupt_check(InterruptCheck check);  // null: no call is interrupted
// Starts a call on this thread: its first check comes kInterruptPeriod later.
void begin_call();

}  // namespace fastvq
