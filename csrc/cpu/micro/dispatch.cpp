#include "micro/dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace m3 {
namespace {

struct Named {
  Isa isa;
  const char* name;
};
constexpr Named kIsas[] = {
    {Isa::amx, "amx"}, {Isa::avx512vnni, "avx512vnni"}, {Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::portable, "portable"}};

// Linux saves the tiles of a process only once it has asked for them.
bool system_saves_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// The compiler's CPUID look-up also asks the operating system whether it saves the wide registers.
bool has(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512vnni:
      return avx512 && __builtin_cpu_supports("avx512vnni");
    case Isa::amx:
      return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
          __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
          __builtin_cpu_supports("amx-int8") && system_saves_tiles();
  }
  return false;
#else
  return isa == Isa::portable;
#endif
}

std::string cpu_isa_name() { return isa_name(cpu_isa()); }

}  // namespace

Isa cpu_isa() {
  static const Isa best = [] {
    for (const Named& entry : kIsas) {
      if (has(entry.isa)) return entry.isa;
    }
    return Isa::portable;
  }();
  const char* forced = std::getenv("M3_CPU_ISA");
  if (forced == nullptr || *forced == 0) return best;
  for (const Named& entry : kIsas) {
    if (forced != std::string(entry.name)) continue;
    STD_TORCH_CHECK(has(entry.isa), "M3_CPU_ISA is ", forced, ", which this machine lacks; it has ", isa_name(best));
    return entry.isa;
  }
  STD_TORCH_CHECK(false, "M3_CPU_ISA is ", forced, "; accepted: portable, avx2, avx512, avx512vnni, amx");
}

std::string isa_name(Isa isa) {
  for (const Named& entry : kIsas) {
    if (entry.isa == isa) return entry.name;
  }
  return "";
}

}  // namespace m3

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) { m.def("cpu_isa() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&m3::cpu_isa_name)); }
