// The layers between the Ghost modules of a network as a table of functions, one table for each
// instruction set. Arguments and items as in kernels.h.
#pragma once

#include <algorithm>
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
  NormArgs norm;     // mean and var are null if forward computes them
  void* mean;        // [C], results of forward with batch_stats, compute type
  void* var;         // biased
  const void* grad;  // [N, C, Ho, Wo] in layout: backward
  void* dx;          // [N, C, H, W] in layout, or null
  void* dw;          // [C, k * k], compute type, or null
  void* dgamma;      // [C], or null
  void* dbeta;
};

// NHWC: channels of an item, whole cache lines of float32.
inline constexpr int64_t kDepthwiseChannels = 16;
inline int64_t depthwise_norm_items(const DepthwiseNormArgs& a) {
  const int64_t block = a.conv.layout == Layout::kNHWC ? kDepthwiseChannels : 1;
  return (a.conv.channels + block - 1) / block;
}

// NCHW. plane_affine: out = scale * x + shift, with one scale and one shift for each channel of an
// image (the gradient of x *= gate, where the gate is a function of x's mean). plane_dot: out = the
// dot product of x and other over the pixels.
struct PlaneArgs {
  const void* x;      // [N, C, P]
  const void* other;  // [N, C, P], plane_dot
  const void* scale;  // [N, C], compute type
  const void* shift;  // [N, C]
  void* out;          // [N, C, P]; plane_dot: [N, C], compute type
  int64_t pixels;
};

// x *= gate, with one number for each channel of an image:
//   gate = f(w_expand^T act(w_reduce means(x) + b_reduce) + b_expand)
struct GateArgs {
  void* x;               // [N, C, P] (NCHW) or [N, P, C]
  const void* w_reduce;  // [R, C]; all parameters in the compute type
  const void* b_reduce;  // [R]
  const void* w_expand;  // [R, C]
  const void* b_expand;  // [C]
  void* means;           // [N, C] scratch: the means, then the gate
  void* hidden;          // [N, R] scratch
  int64_t batch, channels, reduced, pixels;
  Activation act;
  bool sigmoid;  // f: sigmoid, else hard sigmoid
  Layout layout;
};

// out = act(x + other); all three have one order of values in memory. out may be x.
struct SumArgs {
  const void* x;
  const void* other;  // null: out = act(x)
  void* out;
  int64_t count;
  Activation act;
};

// Values of an item: a multiple of the lanes of every vector, so that no result depends on the cut.
inline constexpr int64_t kSumValues = 4096;
inline int64_t sum_items(const SumArgs& a) {
  return (a.count + kSumValues - 1) / kSumValues;
}

// Channels of a thread's block, if threads share the channels of one image: a multiple of the lanes
// of every vector, so that no result depends on the cut.
inline constexpr int64_t kGateChannels = 64;
inline int64_t gate_blocks(const GateArgs& a) {
  return (a.channels + kGateChannels - 1) / kGateChannels;
}
// Images of an item, if threads share the images: as many, up to four, as stay in half of L2 from
// the means to the multiplication.
inline int64_t gate_images(const GateArgs& a, int64_t element_size, int64_t l2_bytes) {
  const int64_t image = a.channels * a.pixels * element_size;
  return std::clamp<int64_t>(l2_bytes / 2 / std::max<int64_t>(image, 1), 1, 4);
}

struct LayerKernels {
  const char* name;  // of the instruction set
  // Tables of four are indexed by DType, tables of two by (compute type is float64).
  Kernel<DepthwiseArgs> depthwise[4];
  Kernel<DepthwiseNormArgs> depthwise_norm[4];
  Kernel<PlaneArgs> plane_affine[4];  // items are planes
  Kernel<PlaneArgs> plane_dot[4];
  // The stages of the gate: the means of channels [c0, c1) of images [n0, n1); the gates of these
  // images; the multiplication of the same channels.
  void (*gate_means[4])(const GateArgs&, int64_t n0, int64_t n1, int64_t c0, int64_t c1);
  void (*gate_values[2])(const GateArgs&, int64_t n0, int64_t n1);
  void (*gate_scale[4])(const GateArgs&, int64_t n0, int64_t n1, int64_t c0, int64_t c1);
  Kernel<SumArgs> sum[4];
};

}  // namespace ghost
