#include "core/cuda_costs.h"

#include <algorithm>
#include <cmath>

namespace ghost {
namespace {

// Data sheets: A100, A10/L4 class, H100 SXM, B200.
constexpr CudaArch kArchs[] = {
    {80, 108, 164 << 10, 163 << 10, 40 << 20, 1555, 4500, 1.41, 2048},
    {86, 72, 100 << 10, 99 << 10, 6 << 20, 600, 2400, 1.70, 1024},
    {89, 58, 100 << 10, 99 << 10, 48 << 20, 300, 2400, 2.04, 1024},
    {90, 132, 228 << 10, 227 << 10, 50 << 20, 3350, 5500, 1.76, 4096},
    {100, 148, 228 << 10, 227 << 10, 126 << 20, 8000, 9000, 1.85, 4096},
};

constexpr int64_t kReservedSmem = 1024;  // bytes that the driver reserves in each block

// The share of the bandwidth that `blocks` blocks use: fewer blocks than multiprocessors have too
// few bytes in flight.
double filled(int64_t blocks, const CudaArch& arch) {
  return std::min(1.0, double(blocks) / double(arch.multiprocessors));
}

// The longest of three times plus the share `unhidden` of the other two.
double overlapped(double a, double b, double c, double unhidden) {
  const double most = std::max({a, b, c});
  return most + unhidden * (a + b + c - most);
}

}  // namespace

CudaArch cuda_arch(int sm, int64_t multiprocessors, int64_t smem_per_block) {
  CudaArch arch = kArchs[0];
  for (const CudaArch& known : kArchs)
    if (known.sm <= sm) arch = known;
  arch.sm = sm;
  if (multiprocessors > 0) {
    // Bandwidth is roughly proportional to the number of multiprocessors.
    const double share = double(multiprocessors) / double(arch.multiprocessors);
    arch.dram_gb_s *= share;
    arch.l2_gb_s *= share;
    arch.multiprocessors = multiprocessors;
  }
  if (smem_per_block > 0) {
    arch.smem_per_block = smem_per_block;
    arch.smem_per_sm = smem_per_block + kReservedSmem;
  }
  return arch;
}

int64_t blocks_per_sm(const CudaArch& arch, int64_t smem_bytes, int64_t by_registers) {
  return std::max<int64_t>(1,
                           std::min(by_registers, arch.smem_per_sm / (smem_bytes + kReservedSmem)));
}

CudaTurns::CudaTurns(int64_t tiles, int64_t most) {
  turns = std::max<int64_t>(
      1, ceil_div(tiles, std::clamp<int64_t>(tiles, 1, std::max<int64_t>(1, most))));
  blocks = std::max<int64_t>(1, ceil_div(tiles, turns));
}

double dram_seconds(double bytes, int64_t blocks, const CudaArch& arch, const CudaCosts& costs) {
  return bytes / (arch.dram_gb_s * costs.dram_share * 1e9 * filled(blocks, arch));
}

double cuda_seconds(const CudaWork& work, const CudaArch& arch, const CudaCosts& costs) {
  const double clock = arch.clock_ghz * 1e9;
  // One block cannot overlap its phases; several blocks overlap theirs.
  const double here = std::ceil(double(work.blocks) / double(arch.multiprocessors));
  const double side_by_side = std::min(here, double(work.blocks_per_sm));
  const double shared = side_by_side * overlapped(work.issue / costs.issue_share, work.product,
                                                  work.pipe, costs.unhidden_units_share);
  const double waves = std::ceil(here / double(work.blocks_per_sm));
  const double busy = double(work.turns) * waves * std::max(work.alone, shared) / clock;
  const double dram = dram_seconds(work.dram_bytes, work.blocks, arch, costs);
  const double l2 =
      work.l2_bytes / (arch.l2_gb_s * costs.l2_share * 1e9 * filled(work.blocks, arch));
  const double unhidden = costs.unhidden_memory_share + (1 - costs.unhidden_memory_share) *
                                                            costs.unhidden_turn_share /
                                                            double(work.turns);
  return overlapped(busy, dram, l2, unhidden) + work.prologue / clock;
}

}  // namespace ghost
