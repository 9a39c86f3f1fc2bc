// The instruction set that runs on this machine, and the description of the machine that the
// planner takes.
#pragma once

#include <string>
#include <vector>

#include "core/plan.h"
#include "cpu/kernels.h"
#include "cpu/layers.h"
#include "cpu/tail_kernels.h"

namespace ghost {

// An instruction set and the kernels compiled for it.
struct Isa {
  const char* name;
  const Kernels& ghost;
  const LayerKernels& layers;
  const TailKernels& tail;
  bool (*supported)();     // whether this machine runs it
  bool amx = false;        // products of bfloat16 run on tiles
  bool for_tests = false;  // absent from available_isas()
};

std::vector<std::string> available_isas();  // best first
// The instruction set in use: GHOST_OPS_CPU_ISA at first use, else the best available one.
const Isa& active_isa();
// Throws std::invalid_argument for a name that is not available here.
void set_isa(const std::string& name);
// The machine of the kernels in use: its caches, and `threads` cores unless force_machine set them.
CpuMachine cpu_machine(int64_t threads);
// Makes plans for these cache sizes and cores; 0 restores the machine's own value.
void force_machine(int64_t l1_bytes, int64_t l2_bytes, int64_t cores);

}  // namespace ghost
