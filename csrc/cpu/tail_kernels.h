// Training of Ghost modules whose batch norm and activation follow the concatenation, as a table of
// functions, one table for each instruction set. Arguments and items as in kernels.h.
#pragma once

#include "cpu/kernels.h"

namespace ghost {

// The formula is in cpu/tail.h.
struct TailArgs {
  Problem problem;       // of y, height and width too; act2 and layout are those of out
  const void* y;         // [N, m, H, W]; this and the other maps are dense in problem.layout
  const void* w2;        // [g, d*d], compute type
  NormArgs norm;         // [out_channels]
  bool batch_stats;      // mean and var are functions of y; in forward they are results
  const void* residual;  // like out, added before the activation; or null
  // forward
  void* out;   // [N, out_channels, H, W]
  void* mean;  // [out_channels], compute type
  void* var;
  // backward
  const void* grad_out;  // like out
  void* dy;              // like y, or null
  void* dresidual;       // like out, or null
  void* dw2;             // [g, d*d], compute type
  void* dgamma;          // [out_channels], compute type
  void* dbeta;
  // NHWC: sums of the items, [items][2][out_channels]; kGrads: [items][d*d][kept], where the slice
  // keeps `kept` = out_channels - m ghosts.
  double* partial;
};

// The passes of NHWC over the images. A kMerge... pass has one item and merges the sums of the pass
// before it.
enum class TailStep {
  kMoments,
  kMergeMoments,
  kForward,
  kGradSums,
  kMergeGradSums,
  kGrads,
  kMergeGrads
};

// Items of these passes: `item` images each, taken `group` images at a time.
struct TailItems {
  int64_t batch, group, item, count;
  explicit TailItems(const Problem& p) : batch(p.batch) {
    const int64_t map = p.height * p.width * p.intrinsic;
    group = map < 8192 ? 8192 / (map + (map == 0)) : 1;
    const int64_t groups = 65536 / (group * map + 1);
    item = group * (groups > 1 ? groups : 1);
    count = (batch + item - 1) / item;
  }
  int64_t images(int64_t i) const { return batch - i * item < item ? batch - i * item : item; }
};

struct TailKernels {
  const char* name;  // of the instruction set
  // Indexed by DType. Items of forward and backward (NCHW) are channels of y, those of lanes (NHWC)
  // are TailItems.
  Kernel<TailArgs> forward[4];
  Kernel<TailArgs> backward[4];
  void (*lanes[4])(const TailArgs&, TailStep, int64_t begin, int64_t end);
};

}  // namespace ghost
