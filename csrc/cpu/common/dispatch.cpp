// The instruction sets that this build holds and this machine runs.
#include "../../fastvq_cpu.h"

#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(FASTVQ_AMX) && defined(__linux__)
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

#if defined(__x86_64__)
// Asked of the processor itself: the builtin __builtin_cpu_supports answers "no" to everything in a shared library that
// clang links against its own runtime, as wheels are.
struct Processor {
  unsigned features = 0, features_b = 0, features_c = 0, features_d = 0;  // leaf 1: ECX; leaf 7: EBX, ECX, EDX
  unsigned saved = 0;  // registers that the operating system saves

  Processor() {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) features = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) features_b = b, features_c = c, features_d = d;
    constexpr unsigned kOsXsave = 1u << 27;
    if (features & kOsXsave) asm volatile("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  }
  static bool all(unsigned of, unsigned bits) { return (of & bits) == bits; }
  bool avx2() const {
    constexpr unsigned kFma = 1u << 12, kF16c = 1u << 29, kAvx2 = 1u << 5, kYmm = 0x06;
    return all(features, kFma | kF16c) && all(features_b, kAvx2) && all(saved, kYmm);
  }
  bool avx512() const {
#if defined(__APPLE__)
    constexpr unsigned kZmm = 0x06;  // Darwin saves the wide registers of a thread from their first use on
#else
    constexpr unsigned kZmm = 0xe6;
#endif
    constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
    return avx2() && all(features_b, kF | kDq | kBw | kVl) && all(saved, kZmm);
  }
  bool avx512_vnni() const { return avx512() && all(features_c, 1u << 11); }
  bool bf16_tiles() const { return all(features_d, 1u << 22 | 1u << 24); }
  bool tiles_saved() const { return all(saved, 3u << 17); }
};
#endif

#if defined(__x86_64__) && defined(FASTVQ_AMX) && defined(__linux__)
// The registers are large, so Linux lets a process use them only after it has asked. Threads inherit the permission.
std::string ask_for_tiles() {
  const Processor processor;
  if (!processor.bf16_tiles()) return "the processor has no bfloat16 matrix tiles";
  if (!processor.tiles_saved()) return "the operating system saves no tile registers";
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
  const Processor processor;
  if (processor.avx2()) isas.push_back(Isa::avx2);
  if (processor.avx512()) {
#if defined(FASTVQ_EMULATED)
    isas.insert(isas.begin() + 1, Isa::emulated);
#endif
    isas.push_back(Isa::avx512);
#if defined(FASTVQ_VNNI)
    if (processor.avx512_vnni()) isas.push_back(Isa::avx512_vnni);
#endif
    if (amx_unavailable().empty()) isas.push_back(Isa::amx);
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
