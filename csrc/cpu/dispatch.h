// Which kernel table runs on this machine, and what the planner should know about it.
#pragma once

#include <string>
#include <vector>

#include "core/plan.h"
#include "cpu/kernels.h"

namespace ghost {

std::vector<std::string> available_isas();  // best first
// The table in use: GHOST_OPS_CPU_ISA at first use, else the best available.
const Kernels& active_kernels();
// Throws std::invalid_argument for a name that is not available here.
void set_isa(const std::string& name);
CpuInfo cpu_info(int64_t threads);

}  // namespace ghost
