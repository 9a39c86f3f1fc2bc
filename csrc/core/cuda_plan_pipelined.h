// The tiles of ghost_apply_pipelined, which moves x and out through shared memory by one bulk copy
// each per tile. For sm_90 and later, 16-bit types in NHWC; off unless GHOST_OPS_CUDA_PIPELINE=1.
#pragma once

#include "core/cuda_plan.h"

namespace ghost {

// base.tile has one block of channels. Tiles are whole images or bands of rows across the full
// width, so that a tile reads one run of consecutive pixels and writes another.
struct PipelinedPlan {
  CudaPlan base;            // blocks = 0: the kernel does not support the problem
  int32_t stages = 0;       // of x, filled ahead
  int32_t pixel_swap = 0;   // lanes read pixels with bits 0 and pixel_swap of the index exchanged
  int32_t pair_stride = 0;  // pairs of values from two channels of the y tile to the next two
  int32_t positions_at = 0, x_at = 0, out_at = 0;  // offsets in shared memory
  int32_t x_stage = 0, out_stage = 0;              // bytes of one stage; out has two
};

inline constexpr int kPipelinedMostStages = 3;
inline constexpr int kPipelinedPixels = 32;    // of a warp's share of the product
inline constexpr int kPipelinedChannels = 32;  // intrinsic
inline constexpr int kPipelinedZerosAt = 32;   // 16 bytes of zeros, behind the mbarriers

// The best plan, or one without blocks if the problem or the architecture does not allow any.
PipelinedPlan plan_pipelined(const Problem& p, const CudaArch& arch);
// plan_pipelined if GHOST_OPS_CUDA_PIPELINE, read once, is 1, else a plan without blocks.
PipelinedPlan choose_pipelined(const Problem& p, const CudaArch& arch);

}  // namespace ghost
