// What this library was compiled with, for `m3 doctor`.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {
std::string compiled_with() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(m3_cpu, m) { m.def("compiled_with() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(m3_cpu, CompositeExplicitAutograd, m) { m.impl("compiled_with", TORCH_BOX(&compiled_with)); }
