// The model of time of the CUDA kernels: figures of the architectures, the constants of the model
// in one table (cuda_costs.inc), and the expressions that all planners share.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace ghost {

// The figures of a GPU that the model uses. Bandwidths are data sheet values: they weigh bytes
// against arithmetic and are no measured result.
struct CudaArch {
  int sm = 80;  // compute capability, 10 * major + minor
  int64_t multiprocessors = 108;
  int64_t smem_per_sm = 164 << 10, smem_per_block = 163 << 10;
  int64_t l2_bytes = 40 << 20;
  double dram_gb_s = 1555, l2_gb_s = 4500;
  double clock_ghz = 1.41;
  int64_t tensor_flops_clock = 2048;  // float16 operations a clock per multiprocessor; FMA: 2
};

// The nearest entry of the table at or below the compute capability. multiprocessors and
// smem_per_block replace those of the entry if they are positive.
CudaArch cuda_arch(int sm, int64_t multiprocessors = 0, int64_t smem_per_block = 0);

enum class CostOrigin { kDataSheet, kCounted, kChosen, kEstimate, kFitted };

struct CudaCosts {
#define GHOST_COST(name, value, origin, meaning) double name = value;
#include "core/cuda_costs.inc"
#undef GHOST_COST
};
inline constexpr CudaCosts kCudaCosts;

// The table, for code that prints or fits it.
struct CudaCost {
  const char* name;
  double CudaCosts::* value;
  CostOrigin origin;
  const char* meaning;
};
inline constexpr CudaCost kCudaCostTable[] = {
#define GHOST_COST(name, value, origin, meaning) \
  {#name, &CudaCosts::name, CostOrigin::origin, meaning},
#include "core/cuda_costs.inc"
#undef GHOST_COST
};

// A multiprocessor has four schedulers that issue an instruction of 32 lanes each.
inline constexpr double kCudaSchedulers = 4, kCudaLanes = 128;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The limit by shared memory, of which the driver reserves 1 KiB per block, and by registers.
int64_t blocks_per_sm(const CudaArch& arch, int64_t smem_bytes, int64_t by_registers = 2);

// The distribution of `tiles` tiles over at most `most` blocks: the fewest turns (tiles of a
// block), then the fewest blocks that need no more turns.
struct CudaTurns {
  int64_t blocks, turns;
  CudaTurns(int64_t tiles, int64_t most);
};

// The work of a launch. Cycles are those of a multiprocessor for one tile of one block.
struct CudaWork {
  int64_t blocks = 1, blocks_per_sm = 1;
  int64_t turns = 1;      // tiles of a block
  double issue = 0;       // instructions of a scheduler
  double product = 0;     // cycles of the units that multiply
  double pipe = 0;        // cycles of the pipe to shared memory and L1
  double alone = 0;       // cycles of a tile if one block has the multiprocessor to itself
  double prologue = 0;    // cycles before the first tile
  double dram_bytes = 0;  // of the launch
  double l2_bytes = 0;
};
// The predicted time without launch_us, which is the same for all plans of a launch.
double cuda_seconds(const CudaWork& work, const CudaArch& arch, const CudaCosts& costs);

// The time of `bytes` at the bandwidth of the memory, reduced if there are fewer blocks than
// multiprocessors.
double dram_seconds(double bytes, int64_t blocks, const CudaArch& arch, const CudaCosts& costs);

}  // namespace ghost
