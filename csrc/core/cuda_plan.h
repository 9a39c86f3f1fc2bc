// How the CUDA kernels cut a problem into tiles: the choice per architecture, from bytes moved,
// matrix work and how evenly the blocks fill the multiprocessors. Plain data: all decisions are
// made here, the launchers and kernels only read them.
#pragma once

#include <cstdint>
#include <optional>

#include "core/cuda_costs.h"
#include "core/problem.h"

namespace ghost {

// kPrimaryStatsKeep also writes u, as does kBackwardSums, the first launch of the backward pass.
enum class CudaKernel : int {
  kApply = 0,
  kCheapStats = 1,
  kPrimaryStats = 2,
  kPrimaryStatsKeep = 3,
  kBackwardSums = 4
};

// A tile is a set of output pixels (several whole images, or a band of rows and columns of one)
// times a block of intrinsic channels with their ghosts. Strides in elements, offsets in bytes.
struct CudaTile {
  int32_t instance = 64;  // width of the kernel instance in channels: 16 ... 128
  int32_t direct = 0;     // x goes straight to registers, not through shared memory
  int32_t channels = 64;  // intrinsic channels a block owns: a multiple of 8
  int32_t channel_blocks = 1;
  int32_t ghosts = 1;  // ghost maps per intrinsic map a block computes
  int32_t ghost_blocks = 1;
  int32_t images = 1, rows = 0, cols = 0;  // output pixels of a tile
  int32_t halo = 0;                        // rows and columns of y around these pixels
  int32_t tiles_h = 1, tiles_w = 1;        // of an image
  int64_t tiles = 0;
  int32_t workers = 1;                 // blocks that share the tiles of one channel block, in turn
  int32_t window_rows = 1;             // of a thread's depthwise window, 1 or 2
  int32_t slice = 32, slice_log2 = 5;  // channels of x in one stage of the pipeline
  int32_t resident = 1;                // w1 stays in shared memory; 0: it passes through in stages
  int32_t pitch = 0;                   // y positions from one row of the tile to the next
  int32_t image_rows = 0;              // rows of y positions from one image to the next
  int32_t positions = 0;               // y positions in shared memory, slack included
  int32_t y_stride = 0, z_stride = 0;  // elements from one position (pixel) to the next
  int32_t a_stride = 0, b_stride = 0;  // of the operands in shared memory
  int32_t max_source = 0, max_inner = 0;  // most pixels of y, and of out, in a tile
  int32_t in_gate_stride = 0;  // elements from the gates of one image's input to the next's
  int32_t source_at = 0, inner_at = 0, gate_at = 0, in_gate_at = 0, affine_at = 0, taps_at = 0,
          moments_at = 0, b_at = 0, y_at = 0, stage_at = 0, norm2_at = 0, grad_at = 0;
  int32_t a_stage = 0, b_stage = 0;  // bytes of one pipeline stage
  int32_t smem_bytes = 0;
};

inline constexpr int kCudaThreads = 256;
inline constexpr int kCudaStages = 3;
inline constexpr int kCudaRing = 128;       // columns of w1 in a stage of the direct product
inline constexpr int kCudaGatePad = 32;     // the gates of an image: padded to a multiple
inline constexpr int kCudaStrip = 7;        // pixels of a depthwise register window
inline constexpr int kCudaSpareRows = 128;  // spare source pixels of a last, partial chunk

// Whether the pixels of x in NHWC, and the rows of w1, are whole vectors of 16 bytes.
inline bool has_wide_rows(const Problem& p) {
  return p.aligned && p.channels * element_size(p.dtype) % 16 == 0;
}

struct CudaPlan {
  CudaTile tile;
  int64_t blocks = 0;
  int64_t blocks_per_sm = 0;  // by shared memory and registers
  bool tensor_cores = false;
  int64_t dram_bytes = 0, l2_bytes = 0;  // modelled traffic, halo and repeated reads included
  double seconds = 0;                    // the model's estimate, used to rank candidates
};

// The most pixels of a map of a pooled problem: its tiles are whole images, which must fit into the
// shared memory of every architecture and dtype.
inline constexpr int64_t kCudaMostPooled = 512;

// The rank of the plan that the launchers take: the value 1, 2 or 3 of GHOST_OPS_CUDA_PLAN, read
// once; 1 if it is not set. Raises std::runtime_error for any other value.
int cuda_plan_rank();

// The plan with the rank-th least predicted time, or the last one if there are fewer; cached.
// Raises std::runtime_error if no tile fits into shared memory.
CudaPlan plan_cuda(const Problem& p, CudaKernel kernel, const CudaArch& arch, bool allow_tf32,
                   int rank = cuda_plan_rank());

// The free choices of a tile; all other members follow from them.
struct CudaChoice {
  int64_t instance, channel_blocks, ghost_blocks, images, rows, cols, slice;
  bool resident;
};
bool operator==(const CudaChoice& a, const CudaChoice& b);
CudaChoice choice_of(const CudaTile& tile);

// The plan of a choice, with its time predicted by the given constants; nullopt if the kernels have
// no such tile.
std::optional<CudaPlan> plan_cuda_choice(const Problem& p, CudaKernel kernel, const CudaArch& arch,
                                         bool allow_tf32, const CudaChoice& choice,
                                         const CudaCosts& costs);

// Tiles of 8 pixels x 16 channels that a warp of the direct product computes.
int64_t direct_tiles(int64_t instance, CudaKernel kernel);

// Whether the first pass of training writes u for the passes after it: if reading x three times
// moves more bytes than reading x once, writing u once and reading u twice.
bool cuda_stashes_u(const Problem& p);

// The problem of each pass of a training forward. u is written if cuda_stashes_u, or if it is kept
// for backward; the later passes then read u instead of x. batch1: batch norm 1 has statistics of
// the batch; without them u is written only if it is kept.
struct CudaTraining {
  Problem primary, cheap, apply;
  bool writes_u = false;
};
CudaTraining cuda_training(const Problem& p, bool keep_u, bool batch1 = true);

// Offsets in bytes inside the packed parameters of the CUDA kernels: w1 [m, C] in the dtype of x;
// scale1, shift1 and slopes1 [m], w2 [g, d * d], shift2 and slopes2 [g] in the compute type. 16-bit
// types keep w1 unscaled (a folded scale would cost digits). float32, float64, and 16-bit types
// with a single input channel have scale1 folded into w1, and no scale1 vector.
struct CudaPackedLayout {
  bool folded = false;
  int64_t w1 = 0, scale1 = 0, shift1 = 0, w2 = 0, shift2 = 0, slopes1 = 0, slopes2 = 0, bytes = 0;
  CudaPackedLayout(DType dtype, int64_t channels, int64_t intrinsic, int64_t ghosts,
                   int64_t dw_size, bool has_primary, bool prelu1, bool prelu2);
};

}  // namespace ghost
