#include "micro/dispatch.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>

namespace m3 {
namespace {

struct Named {
  Isa isa;
  const char* name;
};
constexpr Named kIsas[] = {
    {Isa::avx512vnni, "avx512vnni"}, {Isa::avx512, "avx512"}, {Isa::avx2, "avx2"}, {Isa::portable, "portable"}};

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
  STD_TORCH_CHECK(false, "M3_CPU_ISA is ", forced, "; accepted: portable, avx2, avx512, avx512vnni");
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
