// How the CPU kernels cut a problem into tiles, from a model of bytes moved and cache sizes. Plans
// are plain data that Python prints and tests; no other file chooses a tile of these kernels.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace ghost {

// The machine that a plan is for: a value, so that any machine can plan for any other.
struct CpuMachine {
  int64_t lanes = 16;      // float32 lanes of a vector register
  int64_t registers = 32;  // vector registers
  int64_t l1_bytes = 32 << 10;
  int64_t l2_bytes = 1 << 20;
  int64_t cores = 1;  // threads that share the items of a plan
  bool amx = false;   // products of bfloat16 run on tiles
};

// Widest GEMM block, in vectors of pixels.
constexpr int max_vecs(int64_t registers) {
  return registers >= 32 ? 6 : registers >= 16 ? 3 : 2;
}

// Memory that a product prefetches from beyond L2.
enum class Fetch : int {
  kNothing,
  kColumns,  // the next columns of x
  kImages,   // evenly over the product: the next image of x and the place of the results
};

// At most this many pixels past the last whole vector are computed with channels along the lanes:
// cheaper than a vector of pixels with idle lanes.
inline constexpr int64_t kMostPixels = 4;

struct ApplyPlan {
  // Channels along the lanes, cpu/lane_tile.h; else pixels, cpu/apply.h.
  bool channel_lanes = false;
  bool in_place = false;   // channel lanes: y and z are computed in out itself
  int64_t depth = 1;       // channel lanes: input values of a slice of the product's K
  bool amx = false;        // channel lanes: the product of bfloat16 on tiles, cpu/amx.h
  bool pack = false;       // the tile of x is first converted, transposed or gathered into scratch
  int64_t images = 1;      // whole images joined in one tile (small maps)
  int64_t band_rows = 0;   // output rows computed at a time
  int64_t row_splits = 1;  // independent parts of an image (each recomputes its halo of y)
  int64_t channel_splits = 1;  // independent parts of the intrinsic channels
  int64_t group = 0;           // intrinsic channels computed before their ghosts: a multiple of
                               // kPanel, or all
  int vecs = 4;                // GEMM block width in vectors
  Fetch fetch = Fetch::kNothing;
  bool fetch_results = false;  // the product prefetches the place of its next results and, with
                               // channel lanes, the next pixels of x
  bool stream = false;         // non-temporal stores for the output
  int64_t items = 0;           // tiles * row_splits * channel_splits: the parallel loop's length
  int64_t scratch_bytes = 0;   // per thread
};

// The part of a problem that one item computes.
struct Share {
  int64_t image0, image1;      // images
  int64_t row0, row1;          // rows of the output
  int64_t channel0, channel1;  // intrinsic channels; cuts lie between panels
};

struct Traffic {
  int64_t bytes_fused = 0;  // x read once, out written once, parameters
  int64_t bytes_eager = 0;  // six kernels and a concat, each reading and writing its maps
  int64_t flops = 0;        // multiplications and additions of both convolutions
};

ApplyPlan plan_apply(const Problem& p, const CpuMachine& cpu);
Share share_of(const Problem& p, const ApplyPlan& plan, int64_t item);
Traffic traffic(const Problem& p);
// Whether training keeps u for backward: only if u has at most a quarter of the elements of x, so
// that little memory saves one GEMM.
bool keep_primary(const Problem& p);

// ---------------------------------------------------------------- training

// Elements from channel to channel of u, [m, N, P] of the compute type: an odd number of cache
// lines, so that the rows of a column do not share the sets of a cache.
int64_t channel_stride(int64_t pixels, DType dtype);

// Items of the loop over channels (NCHW: one channel; NHWC: 16) of cpu/channels.h and cpu/tail.h.
int64_t channel_block(const Problem& p);
int64_t channel_items(const Problem& p);

// How dw1[i][k] = sum over pixels of du[i] x[k] is computed, see cpu/weight_grad.h.
enum class WeightGradPath : int {
  kDot,         // dot products over pixels of du and x in their places: few rows or columns
  kTransposed,  // du and x transposed: x is not read as planes of the compute type
  kBroadcast,   // the narrower of du and x transposed, the other one broadcast from its planes
};
WeightGradPath plan_weight_grad(const Problem& p, const CpuMachine& cpu);
inline constexpr int64_t kGradRowsPerItem = 2 * kPanel;  // rows of dw1 of an item
int64_t weight_grad_items(const Problem& p);

// Whether statistics (first) and the other passes (second) of training in NHWC run with channels
// along the lanes, cpu/lane_train.h.
bool sums_by_lanes(const Problem& p);
bool trains_by_lanes(const Problem& p);
// The images of a pass of cpu/lane_train.h. They do not depend on the number of threads.
struct LaneItems {
  int64_t count = 0, images = 0;  // items, and images of an item
  int64_t chunk_images = 0;       // images computed at a time
  int64_t band = 0;               // rows computed at a time; all of them if chunk_images > 1
};
LaneItems lane_items(const Problem& p, const CpuMachine& cpu);

}  // namespace ghost
