// The CPU kernels as a table of functions, one table an instruction set. Everything here is plain
// data and raw pointers. A kernel runs a range of items of its parallel loop; results do not depend
// on how the range was cut.
#pragma once

#include <cstdint>

#include "core/plan.h"
#include "core/problem.h"

namespace ghost {

// One pass of conv1x1 (+ affine + act) and, for ratio > 1, its depthwise ghosts. Also used with
// ratio 1 for the GEMMs of training: x -> u, and du -> dx with the weights transposed.
struct ApplyArgs {
  Problem problem;
  ApplyPlan plan;
  const void* x;          // [N, C, H, W] in problem.layout; u itself if !problem.has_primary
  int64_t x_image = 0;    // elements from image to image of x
  int64_t x_channel = 0;  // and from channel to channel, if NCHW
  const void* packed;     // PackedLayout, compute type
  const void* residual;   // like out, or null
  const void* slopes1 = nullptr;  // of a PReLU, [m] and [m * (ratio - 1)], compute type
  const void* slopes2 = nullptr;
  const void* gate = nullptr;  // [N, oup, Hg, Wg] in out_layout, or null
  void* out;                   // [N, oup, Ho, Wo] in out_layout
  Layout out_layout = Layout::kNCHW;
  int64_t out_image = 0;  // as for x
  int64_t out_channel = 0;
  int64_t scatter =
      1;  // pixel (h, w) goes to (h * scatter, w * scatter): dx of a strided convolution
  int64_t scatter_width = 0;  // width of out then
};

// Per-channel parameters of one batch norm, compute type; gamma and beta may be null (1 and 0).
struct NormArgs {
  const void* gamma;
  const void* beta;
  const void* mean;  // forward: null for the batch's; backward: the statistics the forward used
  const void* var;   // biased
  double eps;
  const void* slopes = nullptr;  // of a PReLU behind it
  // Backward.
  bool batch_stats = false;  // mean and var are functions of x
  const void* means =
      nullptr;  // [2][channels]: the means of g = dL/d(norm's output) and of g times
                // the normalised input, over more than this batch; null: its own
};

// Gradients of one batch norm's parameters and of the slopes behind it, per channel, compute type;
// null where not needed.
struct NormGrads {
  void* dgamma = nullptr;
  void* dbeta = nullptr;
  void* dslopes = nullptr;
};

// The part of training that goes channel by channel, all images of a channel at once, so that a
// channel's planes stay in L2 between the statistics and their use. Between the passes u and du are
// channel-major, [m, N, P]: the images of a channel are one row of pixels, whatever their size.
struct ChannelArgs {
  Problem problem;  // height and width are those of u; layout that of out / grad_out
  void* u;          // [m, N, P] compute type: u in. Backward: du out, if need_du.
  int64_t u_step;   // elements from channel to channel of u
  const void* w2;   // [g, d*d], compute type
  NormArgs norm1, norm2;
  // forward
  void* out;    // [N, oup, P], or null where only statistics are wanted
  bool u_is_y;  // u already holds y: only v and its statistics are wanted
  void* mean1;  // results, compute type; null where norm1 or norm2 has them given
  void* var1;
  void* mean2;
  void* var2;
  // backward
  const void* grad_out;  // [N, oup, P] dense in problem.layout
  bool need_du;
  void* dw2;  // [g, d*d], compute type; null: not needed
  NormGrads grads1, grads2;
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

// Images of a pass of training in NHWC with channels along the lanes, cpu/lane_train.h.
struct LaneItems {
  int64_t count = 0, images = 0;       // items, and images of each
  int64_t chunk_images = 0, band = 0;  // of a chunk: images, or rows of one
};
LaneItems lane_items(const Problem& p, const CpuMachine& cpu);

struct LaneTrainArgs {
  Problem problem;  // as in ChannelArgs, of ratio 2 with all ghosts
  LaneItems items;
  const void* u;   // [N, P, m]
  const void* w2;  // [m, d*d], all of the compute type; null for the moments of u alone
  NormArgs norm1, norm2;
  double* partial;  // [items.count][2 + d*d][m]
  // forward
  void* out;  // [N, P, oup]
  void *mean1, *var1, *mean2, *var2;
  // backward
  const void* grad_out;  // [N, P, oup]
  double* totals;        // [4][m]: sums of bn2's gradient and of bn1's
  void* g1;              // [N, P, m]: gradient of bn1's output, then du; null: not needed
  void* dw2;             // [m, d*d]; null: not needed
  NormGrads grads1, grads2;
};
// Passes over the items, and merges, of one item, of their sums.
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

struct Kernels {
  const char* name;
  int64_t lanes;      // of float32
  int64_t registers;  // vector registers
  bool amx;           // products of bfloat16 on tiles
  // Indexed by DType. Ranges are of items of the respective parallel loop.
  void (*apply[4])(const ApplyArgs&, int64_t begin, int64_t end);
  void (*apply_to_compute[4])(const ApplyArgs&, int64_t begin,
                              int64_t end);  // out is of the compute type
  void (*apply_from_compute[4])(const ApplyArgs&, int64_t begin,
                                int64_t end);  // x is of the compute type
  void (*channels_forward[4])(const ChannelArgs&, int64_t begin, int64_t end);
  void (*channels_backward[4])(const ChannelArgs&, int64_t begin, int64_t end);
  void (*primary_stats[2])(const ChannelArgs&, int64_t begin,
                           int64_t end);  // indexed by (compute is float64)
  void (*weight_grad[4])(const WeightGradArgs&, int64_t begin, int64_t end);
  void (*lane_train[2])(const LaneTrainArgs&, LaneStep, int64_t begin,
                        int64_t end);  // indexed by (compute is float64)
};

// Items of the two channel loops and of the weight gradient's.
inline constexpr int64_t kGradRowsPerItem =
    2 * kPanel;  // rows of dw1 an item of the weight gradient owns
int64_t channel_block(const Problem& p);
int64_t channel_items(const Problem& p);
int64_t weight_grad_items(const Problem& p);

// amx: with products of bfloat16 on tiles; null if the compiler has no such instructions.
const Kernels* kernels_generic(bool amx);
const Kernels* kernels_avx2(bool amx);
const Kernels* kernels_avx512(bool amx);

}  // namespace ghost
