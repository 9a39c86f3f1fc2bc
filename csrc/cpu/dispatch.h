// Which kernel table runs on this machine, and the description of it that the planner takes.
#pragma once

#include <string>
#include <vector>

#include "core/plan.h"
#include "cpu/kernels.h"

namespace ghost {

std::vector<std::string> available_isas();  // best first
// The table in use: GHOST_OPS_CPU_ISA at first use, else the best available.
const Kernels& active_kernels();
// Of the tables of other kernels that of the same vectors; null for those that were not built.
template <class T>
const T& table_in_use(const T* avx512, const T* avx2, const T* generic) {
  const int64_t lanes = active_kernels().lanes;
  return lanes == 16 && avx512 ? *avx512 : lanes == 8 && avx2 ? *avx2 : *generic;
}
// Throws std::invalid_argument for a name that is not available here.
void set_isa(const std::string& name);
// The machine of the kernels in use: its caches, and `threads` cores unless they are forced.
CpuMachine cpu_machine(int64_t threads);
// Makes the plans those of other caches or another number of cores; 0 for what the machine has.
void force_machine(int64_t l1_bytes, int64_t l2_bytes, int64_t cores);

}  // namespace ghost
