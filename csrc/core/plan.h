// How a problem is cut into tiles, from a model of bytes moved and cache sizes. Plain data:
// printable, testable, and the only place where a kernel's tile is decided.
#pragma once

#include <cstdint>
#include <string>

#include "core/problem.h"

namespace ghost {

// What the plans depend on, besides the problem: a value, so that the plans of any machine can be
// made on any other.
struct CpuMachine {
  int64_t lanes = 16;      // float32 lanes of a vector register
  int64_t registers = 32;  // vector registers
  int64_t l1_bytes = 32 << 10;
  int64_t l2_bytes = 1 << 20;
  int64_t cores = 1;  // threads that share the items of a plan
  bool amx = false;   // tiles for products of bfloat16
};
// Widest GEMM block, in vectors of pixels.
constexpr int max_vecs(int64_t registers) {
  return registers >= 32 ? 6 : registers >= 16 ? 3 : 2;
}

// What a product fetches from beyond L2 meanwhile.
enum class Fetch : int {
  kNothing,
  kColumns,  // the next columns of x
  kImages,   // evenly over the product: the next image of x and the results' place
};

// Pixels past the last whole vector that the GEMM takes by channels: cheaper than idle lanes.
inline constexpr int64_t kMostPixels = 4;

struct ApplyPlan {
  bool channel_lanes =
      false;              // channels along the lanes, cpu/lane_tile.h; else pixels, cpu/apply.h
  bool in_place = false;  // channel lanes: y and z are computed in out itself
  int64_t depth = 1;      // channel lanes: input values of a slice of the product's K
  bool amx = false;       // channel lanes: the product of bfloat16 on tiles, cpu/amx.h
  bool pack = false;   // x tile converted / transposed / gathered into channel-major scratch first
  int64_t images = 1;  // whole images joined in one tile (small maps)
  int64_t band_rows = 0;       // output rows computed at a time
  int64_t row_splits = 1;      // independent parts of an image (their halo of y is recomputed)
  int64_t channel_splits = 1;  // independent parts of the intrinsic channels
  int64_t group =
      0;  // intrinsic channels computed before their ghosts are (a multiple of kPanel, or all)
  int vecs = 4;  // GEMM block width in vectors
  Fetch fetch = Fetch::kNothing;
  bool fetch_results = false;  // the product prefetches the place of its next results (channel
                               // lanes: and the next pixels of x)
  bool stream = false;         // non-temporal stores for the output
  int64_t items = 0;           // tiles * row_splits * channel_splits: the parallel loop's length
  int64_t scratch_bytes = 0;   // per thread
};

// The part of a problem that one item computes.
struct Share {
  int64_t image0, image1;      // images
  int64_t row0, row1;          // rows of the output
  int64_t channel0, channel1;  // intrinsic channels, cut at panels
};

struct Traffic {
  int64_t bytes_fused = 0;  // x read once, out written once, parameters
  int64_t bytes_eager = 0;  // seven kernels and a concat, each reading and writing its maps
  int64_t flops = 0;        // multiplications and additions of both convolutions
};

ApplyPlan plan_apply(const Problem& p, const CpuMachine& cpu);
Share share_of(const Problem& p, const ApplyPlan& plan, int64_t item);
Traffic traffic(const Problem& p);
// Keep u for backward? Only where it is a quarter of x or less: one GEMM saved for little memory.
bool keep_primary(const Problem& p);
// How dw1[i][k] = sum over pixels of du[i] x[k] is computed, see cpu/weight_grad.h.
enum class WeightGradPath : int {
  kDot,         // dot products over pixels of du and x where they are: few rows or columns
  kTransposed,  // du and x transposed: where x is not read as planes of the compute type
  kBroadcast,   // the narrower of du and x transposed, the other one broadcast from its planes
};
WeightGradPath plan_weight_grad(const Problem& p, const CpuMachine& cpu);

}  // namespace ghost
