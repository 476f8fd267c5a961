// The instruction sets that this build holds and this machine runs.
#include "../../fastvq_cpu.h"

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(FASTVQ_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#endif

namespace fastvq {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::generic:
      return "generic";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::amx:
      return "amx";
    case Isa::emulated:
      return "emulated";
  }
  return "unknown";
}

namespace {

#if defined(__x86_64__) && defined(FASTVQ_AMX) && defined(__linux__)
// The registers are large, so Linux lets a process use them only after it has asked. Threads inherit the permission.
std::string ask_for_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kOsXsave = 1u << 27;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile))
    return "the processor has no bfloat16 matrix tiles";
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsXsave)) return "the operating system saves no tile registers";
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return "the operating system saves no tile registers";
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0)
    return std::string("the operating system refused tile registers to this process (") + std::strerror(errno) + ")";
  return "";
}
#endif

}  // namespace

std::string amx_unavailable() {
#if defined(__x86_64__) && defined(FASTVQ_AMX) && defined(__linux__)
  static const std::string reason = ask_for_tiles();
  return reason;
#else
  return "this build has no kernels for it: they need x86-64, Linux and a compiler with -mamx-bf16";
#endif
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::generic};
#if defined(__x86_64__)
  // The builtin also asks the operating system whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(FASTVQ_EMULATED)
      isas.insert(isas.begin() + 1, Isa::emulated);
#endif
      isas.push_back(Isa::avx512);
#if defined(FASTVQ_VNNI)
      if (__builtin_cpu_supports("avx512vnni")) isas.push_back(Isa::avx512_vnni);
#endif
      if (amx_unavailable().empty()) isas.push_back(Isa::amx);
    }
  }
#endif
  return isas;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace fastvq
