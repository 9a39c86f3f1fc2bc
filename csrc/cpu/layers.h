// What stands between the Ghost modules of a bottleneck, as a table of functions, one
// table an instruction set. Plain data and raw pointers, as in kernels.h; a kernel runs a range of
// items of its parallel loop, and results do not depend on how the range was cut.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cpu/kernels.h"

namespace ghost {

// out = act(depthwise(x, weight) + shift), zero padding of k / 2 on every side.
struct DepthwiseArgs {
  const void* x;       // [N, C, H, W] in layout
  const void* weight;  // [C, k * k] for NCHW, [k * k, C] for NHWC; compute type
  const void* shift;   // [C], compute type
  void* out;           // [N, C, Ho, Wo] in layout
  int64_t batch, channels, height, width, out_height, out_width;
  int64_t kernel, stride;  // 1, 3, 5 or 7; 1 or 2
  Activation act;
  Layout layout;
};

// Items of the depthwise loop: planes (NCHW) or rows of out (NHWC).
inline int64_t depthwise_items(const DepthwiseArgs& a) {
  return a.layout == Layout::kNCHW ? a.batch * a.channels : a.batch * a.out_height;
}

// Training: out = act(norm(depthwise(x, weight))), and its gradients.
struct DepthwiseNormArgs {
  DepthwiseArgs conv;  // without shift; weight [C, k * k] in both layouts; out null in backward
  bool has_norm, batch_stats;
  NormArgs norm;     // mean and var null where forward computes them
  void* mean;        // [C], results of forward with batch_stats, compute type
  void* var;         // biased
  const void* grad;  // [N, C, Ho, Wo] in layout: backward
  void* dx;          // [N, C, H, W] in layout, or null
  void* dw;          // [C, k * k], compute type, or null
  void* dgamma;      // [C], or null
  void* dbeta;
};

// Channels of an item, NHWC: whole cache lines of float32.
inline constexpr int64_t kDepthwiseChannels = 16;
inline int64_t depthwise_norm_items(const DepthwiseNormArgs& a) {
  const int64_t block = a.conv.layout == Layout::kNHWC ? kDepthwiseChannels : 1;
  return (a.conv.channels + block - 1) / block;
}

// out = scale * x + shift, one scale and one shift a channel of an image (the gradient of x *= gate
// with the gate a function of x's mean); NCHW. And the dot products that it needs.
struct PlaneArgs {
  const void* x;      // [N, C, P]
  const void* other;  // [N, C, P], of the dot product
  const void* scale;  // [N, C], compute type
  const void* shift;  // [N, C]
  void* out;          // [N, C, P]; of the dot product [N, C] of the compute type
  int64_t pixels;
};

// x *= gate, one number a channel of an image; the gate from the channel's mean.
struct GateArgs {
  void* x;               // [N, C, P] (NCHW) or [N, P, C]
  const void* w_reduce;  // [R, C]; all parameters in the compute type
  const void* b_reduce;  // [R]
  const void* w_expand;  // [R, C]
  const void* b_expand;  // [C]
  void* means;           // [N, C] scratch: means, then the gate
  void* hidden;          // [N, R] scratch
  int64_t batch, channels, reduced, pixels;
  Activation act;
  bool sigmoid;  // the gate's function: sigmoid or hard sigmoid
  Layout layout;
};

// out = act(x + other) over values that lie in one order in all three. In place is allowed.
struct SumArgs {
  const void* x;
  const void* other;  // or null: out = act(x)
  void* out;
  int64_t count;
  Activation act;
};

// Values of an item: a multiple of every vector's lanes, so that a cut changes no bit.
inline constexpr int64_t kSumValues = 4096;
inline int64_t sum_items(const SumArgs& a) {
  return (a.count + kSumValues - 1) / kSumValues;
}

// Channels of one image are cut into this many for threads. A multiple of every vector's lanes, so
// that a cut changes no bit.
inline constexpr int64_t kGateChannels = 64;

struct LayerKernels {
  const char* name;
  // Indexed by DType.
  void (*depthwise[4])(const DepthwiseArgs&, int64_t begin, int64_t end);
  void (*depthwise_norm[4])(const DepthwiseNormArgs&, int64_t begin, int64_t end);
  // Items are planes.
  void (*plane_affine[4])(const PlaneArgs&, int64_t begin, int64_t end);
  void (*plane_dot[4])(const PlaneArgs&, int64_t begin, int64_t end);
  // Three stages: means of channels [c0, c1) of images [n0, n1); gates of images [n0, n1);
  // multiplication, as the first.
  void (*gate_means[4])(const GateArgs&, int64_t n0, int64_t n1, int64_t c0, int64_t c1);
  void (*gate_values[2])(const GateArgs&, int64_t n0, int64_t n1);  // indexed by (is float64)
  void (*gate_scale[4])(const GateArgs&, int64_t n0, int64_t n1, int64_t c0, int64_t c1);
  void (*sum[4])(const SumArgs&, int64_t begin, int64_t end);
};

const LayerKernels* layers_generic();
const LayerKernels* layers_avx2();
const LayerKernels* layers_avx512();

// The table of the instruction set that the Ghost kernels run with.
const LayerKernels& active_layers();

}  // namespace ghost
