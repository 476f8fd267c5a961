// Leaving a long call: how a kernel learns that whoever called it wants it to stop (Ctrl-C).
//
// Kernels know nothing of Python. The binding hands them a function that says whether to stop, and the thread that
// called the kernel asks it between two pieces of work, at most every kInterruptPeriod. The kernel then throws
// Interrupted; helper threads see that at their next piece. A kernel that changes the caller's memory in place either
// puts back what it changed (pixelcnn_step) or asks nobody: a call must not leave that memory half changed.
#pragma once
#include <exception>

namespace fastvq {

struct Interrupted : std::exception {
  const char* what() const noexcept override { return "fastvq: interrupted"; }
};

// True: stop. It runs on the thread that called the kernel.
using InterruptCheck = bool (*)();
void set_interrupt_check(InterruptCheck check);  // null: no call is interrupted
// A call of this thread begins: its first question comes a period later.
void begin_call();

}  // namespace fastvq
