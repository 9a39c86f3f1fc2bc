// How the backward pass on a GPU is cut into blocks. Plain data: all decisions on the tiles of the
// backward kernels are made here. csrc/cuda/backward.h has the formulas of the launches.
#pragma once

#include <cstdint>

#include "core/cuda_plan.h"
#include "core/needs.h"
#include "core/problem.h"

namespace ghost {

// Tile of the second launch (grads): some intrinsic channels of some pixels. A persistent block is
// one of `workers` along the pixels and one of `channel_blocks` along the channels; a worker takes
// every workers-th tile, which bounds the number of partial sums.
struct GradsTile {
  int32_t channels = 8;                    // intrinsic channels of a block, a multiple of 8
  int32_t images = 1, rows = 1, cols = 1;  // pixels of which a tile gives results
  // Pixels around them where dv is computed too: none along an axis that the tile spans, because dv
  // is 0 outside the image.
  int32_t halo_rows = 0, halo_cols = 0;
  int32_t tiles_n = 0, tiles_h = 0, tiles_w = 0;
  int64_t tiles = 0;
  int32_t workers = 0, channel_blocks = 0;
  // Ghosts of a channel whose parameters and sums of dw2 stay in shared memory: all; or 1 if they
  // do not fit. Then every tile loads the parameters of each ghost and adds its sums to memory.
  int32_t ghosts = 1;
  int32_t tap_splits = 1;  // threads that share a row of taps of a channel pair's weight gradient
  // Bytes in shared memory.
  int32_t y_at = 0, grad_at = 0, dy_at = 0, norm1_at = 0, norm2_at = 0, taps_at = 0, slots_at = 0,
          combine_at = 0, slopes_at = 0, smem_bytes = 0;
};

// Sums of dw1 that the blocks of an instance of ghost_backward_du_kernel keep in registers:
// intrinsic channels x channels of x, and how many groups of warps share them.
struct DuInstance {
  int32_t intrinsic, channels, warp_groups;

  constexpr int32_t sums() const { return intrinsic * channels * warp_groups; }
  // Rows of a warp's unit of u or dx: bounded by the registers that the sums leave free.
  constexpr int32_t unit_rows() const { return sums() > 8192 ? 16 : 32; }
};
inline constexpr DuInstance kDuInstances[] = {
    {32, 32, 8}, {64, 64, 2}, {32, 128, 2}, {128, 64, 1}, {128, 128, 1}, {64, 256, 1}, {256, 64, 1},
};
// The third launch if one block makes dx and dw1 of a slice of the channels of x: workers * slices
// blocks, each of which takes every workers-th tile of pixels.
struct DuTile {
  int32_t instance = 0;  // of kDuInstances
  int32_t channels = 0, slices = 1;
  int32_t pixels = 0, tiles = 0, workers = 0;  // workers = 0: dx and dw1 have separate blocks
  bool makes_u = false;  // u is computed from x, of which a block has all channels; else read
  // Channels in shared memory, multiples of 16, and log2 of the number of threads that copy a row
  // of these channels.
  int32_t padded_m = 0, padded_c = 0, m_shift = 0, c_shift = 0;
  // Bytes in shared memory: w1 is at 0, then come two stages.
  int32_t coefficients_at = 0, combine_at = 0, stages_at = 0, stage_bytes = 0;
};
inline constexpr int kMostDuPixels = 256;

// The two products of the third launch: in the blocks of `du`, or in dx_blocks blocks for dx,
// followed by dw1_tiles_m * dw1_tiles_n * dw1_splits blocks for dw1, which make
// kProductRows x kProductCols results at a time.
struct PrimaryGradPlan {
  DuTile du;
  int32_t dx_blocks = 0;
  int32_t dx_depth = 0;  // intrinsic channels of a tile of du that stay in shared memory
  // Intrinsic channels whose coefficients stay in shared memory: all; or, if they do not fit, those
  // of a tile of du, loaded with each tile.
  int32_t dx_coefficients = 0;
  int32_t dx_groups = 1;   // independent parts of the channels of x
  int64_t dx_items = 0;    // tiles of kProductRows pixels, times dx_groups
  int32_t dw1_pixels = 0;  // summed at a time, a power of two
  int32_t dw1_tiles_m = 0, dw1_tiles_n = 0;
  int32_t dw1_splits = 0;                                             // partial sums of dw1
  int32_t left_at = 0, right_at = 0, combine_at = 0, smem_bytes = 0;  // bytes in shared memory

  int64_t dw1_blocks() const { return int64_t{dw1_tiles_m} * dw1_tiles_n * dw1_splits; }
  int64_t blocks() const {
    return du.workers > 0 ? int64_t{du.workers} * du.slices : dx_blocks + dw1_blocks();
  }
};
inline constexpr int kProductRows = 128;
template <int kElementBytes>
inline constexpr int kProductCols = kElementBytes == 8 ? 32 : 64;
// Most intrinsic channels of a tile of du in shared memory.
inline int product_depth(int64_t element_bytes) {
  return static_cast<int>(element_bytes == 8 ? 32 : 256 / element_bytes);
}

// Inputs and outputs of a backward pass.
struct BackwardTask {
  bool u_given = false;     // u is given, in any layout
  bool u_rows = false;      // u is given, pixel-major and aligned to 16 bytes
  bool reads_sums2 = true;  // the gradient of v takes the sums of this batch, not given means
  int needs = kNeedAll;
};

struct BackwardPlan {
  bool tensor_cores = false;
  int needs = 0;             // backward_needs of the task
  bool stores_u = false;     // u goes to scratch, pixel-major, for the later launches
  bool runs_sums = false;    // the first launch is needed, for u or for the sums
  bool sums_ghosts = false;  // the first launch is needed for the sums
  bool runs_grads = false;   // the second launch is needed
  CudaPlan sums;
  GradsTile grads;
  PrimaryGradPlan primary;
  int32_t launches = 0;
  int64_t row_channels = 0;  // elements from row to row of u
  // Sections of the scratch memory, in bytes. Rows of da1 have round_up(m, 8) elements.
  int64_t u = 0, da1 = 0, sums2 = 0, sums1 = 0, dw2_sums = 0, dw1_sums = 0, slope_sums2 = 0,
          slope_sums1 = 0, scratch_bytes = 0;
};

// The gradients of a task that the problem has.
int backward_needs(const Problem& problem, int needs);

// Plans are cached. Raises std::runtime_error if no tile fits into shared memory.
BackwardPlan plan_cuda_backward(const Problem& problem, const CudaArch& arch, bool allow_tf32,
                                const BackwardTask& task);

}  // namespace ghost
