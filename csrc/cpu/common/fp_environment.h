// The default floating-point environment within a scope: rounding to nearest and gradual underflow. After the scope the
// caller's environment is back. torch.set_flush_denormal must not change which code is nearest.
#pragma once
#if defined(__SSE2__)
#include <xmmintrin.h>
#else
#include <cfenv>
#endif

namespace fastvq {

class DefaultFloatingPoint {
 public:
#if defined(__SSE2__)
  using Saved = unsigned;
  static Saved enter() {
    const Saved saved = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return saved;
  }
  static void leave(Saved saved) { _mm_setcsr(saved); }
#else
  // The rounding mode and, where the processor has one, the bit that flushes denormals.
  using Saved = std::fenv_t;
  static Saved enter() {
    Saved saved;
    std::fegetenv(&saved);
    std::fesetenv(FE_DFL_ENV);
    return saved;
  }
  static void leave(const Saved& saved) { std::fesetenv(&saved); }
#endif
  DefaultFloatingPoint() : saved_(enter()) {}
  ~DefaultFloatingPoint() { leave(saved_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  Saved saved_;
};

}  // namespace fastvq
