// The Ghost kernels as a table of functions, one table for each instruction set. Arguments are
// plain data and raw pointers. A kernel runs a range of items of its parallel loop; results do not
// depend on how the loop is cut into ranges.
#pragma once

#include <cstdint>

#include "core/plan.h"
#include "core/problem.h"

namespace ghost {

// One pass of the primary convolution with its affine map and activation and, for ratio > 1, its
// depthwise ghosts. With ratio 1 also the GEMMs of training: x -> u, and du -> dx with the weights
// transposed.
struct ApplyArgs {
  Problem problem;
  ApplyPlan plan;
  const void* packed = nullptr;    // PackedLayout, compute type
  const void* residual = nullptr;  // like out, or null
  const void* slopes1 = nullptr;   // of a PReLU, [m], compute type; or null
  const void* slopes2 = nullptr;   // [ghosts]
  const void* gate = nullptr;      // [N, out_channels, Hg, Wg] in out_layout, or null
  const void* x = nullptr;         // [N, C, H, W] in problem.layout; u if !problem.has_primary
  int64_t x_image = 0;             // elements from image to image of x
  int64_t x_channel = 0;           // elements from channel to channel of x, if NCHW
  void* out = nullptr;             // [N, out_channels, Ho, Wo] in out_layout
  Layout out_layout = Layout::kNCHW;
  int64_t out_image = 0;  // elements from image to image of out
  int64_t out_channel = 0;
  // Pixel (h, w) of the result is stored at (h * scatter, w * scatter) of an out of scatter_width
  // columns: dx of a strided convolution.
  int64_t scatter = 1;
  int64_t scatter_width = 0;
};

// Per-channel parameters of one batch norm, compute type; gamma and beta may be null (1 and 0).
struct NormArgs {
  const void* gamma;
  const void* beta;
  const void* mean;  // forward: null for those of the batch; backward: the statistics of forward
  const void* var;   // biased
  double eps;
  const void* slopes = nullptr;  // of a PReLU behind the norm
  // Backward.
  bool batch_stats = false;  // mean and var are functions of x
  // [2][channels]: the means of g = dL/d(norm's output) and of g times the normalised input, over
  // more than this batch. Null: the kernel computes them from this batch.
  const void* means = nullptr;
};

// Gradients of one batch norm's parameters and of the slopes behind it, per channel, compute type;
// null if not needed.
struct NormGrads {
  void* dgamma = nullptr;
  void* dbeta = nullptr;
  void* dslopes = nullptr;
};

// Arguments that both layouts of training share. Pointers are to the compute type if not said
// otherwise.
struct TrainArgs {
  Problem problem;  // height and width are those of u; layout that of out and grad_out
  const void* w2;   // [g, d*d]; null for statistics of u alone
  NormArgs norm1, norm2;
  // forward
  void* out;  // [N, out_channels, P] in the element type, or null for statistics alone
  void *mean1, *var1, *mean2, *var2;  // results; null if the norm's statistics are given
  // backward
  const void* grad_out;  // [N, out_channels, P] in the element type, dense in problem.layout
  void* dw2;             // [g, d*d], or null if not needed
  NormGrads grads1, grads2;
};

// The part of training that goes channel by channel, all images of a channel at once, so that a
// channel's planes stay in L2 between the statistics and their use. Between the passes u and du are
// channel-major, [m, N, P]: the images of a channel are one row of pixels, whatever their size.
struct ChannelArgs : TrainArgs {
  void* u;         // [m, N, P], compute type. Backward: replaced by du if need_du.
  int64_t u_step;  // elements from channel to channel of u
  bool u_is_y;     // forward: u already holds y; only v and its statistics are computed
  bool need_du;
};

// dw1[i][k] = sum over images and pixels of du[i] x[k].
struct WeightGradArgs {
  Problem problem;  // channels = C, intrinsic = m, geometry of x
  const void* du;   // [m, N, P], compute type; or [N, P, m]: du_step 1
  int64_t du_step;  // elements from channel to channel of du
  const void* x;    // [N, C, H, W], element type, problem.layout
  void* dw1;        // [m, C], compute type
  WeightGradPath path;
};

// Training in NHWC with channels along the lanes, cpu/lane_train.h; of ratio 2 with all ghosts.
struct LaneTrainArgs : TrainArgs {
  LaneItems items;
  const void* u;    // [N, P, m]
  double* partial;  // [items.count][2 + d*d][m]
  double* totals;   // backward: [4][m], sums of bn2's gradient and of bn1's
  void* g1;         // backward: [N, P, m], gradient of bn1's output, then du; null: not needed
};
// Passes over the items. A kMerge... pass has one item and merges the sums of the pass before it.
enum class LaneStep {
  kMoments1,
  kMergeMoments1,
  kMoments2,
  kMergeMoments2,
  kForward,
  kSums2,
  kMergeSums2,
  kGrads,
  kMergeGrads,
  kInput
};

// A kernel, run over the items [begin, end) of its parallel loop.
template <class Args>
using Kernel = void (*)(const Args&, int64_t begin, int64_t end);

struct Kernels {
  const char* name;   // of the instruction set
  int64_t lanes;      // float32 lanes of a vector register
  int64_t registers;  // vector registers
  bool has_tiles;     // the compiler has the instructions of AMX, cpu/amx.h
  // Tables of four are indexed by DType, tables of two by (compute type is float64).
  Kernel<ApplyArgs> apply[4];
  Kernel<ApplyArgs> apply_to_compute[4];    // out is of the compute type
  Kernel<ApplyArgs> apply_from_compute[4];  // x is of the compute type
  Kernel<ChannelArgs> channels_forward[4];
  Kernel<ChannelArgs> channels_backward[4];
  Kernel<ChannelArgs> primary_stats[2];
  Kernel<WeightGradArgs> weight_grad[4];
  void (*lane_train[2])(const LaneTrainArgs&, LaneStep, int64_t begin, int64_t end);
};

}  // namespace ghost
