// Which instruction set the CPU kernels use: the best that the machine has, or the one that M3_CPU_ISA names.
#pragma once

#include <string>

namespace m3 {

enum class Isa { portable, avx2, avx512, avx512vnni, amx };

// Read anew in every call of an op, so that M3_CPU_ISA=portable|avx2|avx512|avx512vnni|amx may change while a process
// runs.
// Throws where M3_CPU_ISA names no instruction set, or one that the machine lacks.
Isa cpu_isa();

std::string isa_name(Isa isa);

}  // namespace m3
