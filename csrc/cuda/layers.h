// Launchers of the layers between the Ghost modules of a network, one launch each unless noted.
// They depend on CUDA, not on torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/cuda_plan_layers.h"
#include "core/problem.h"

namespace ghost::cuda {

// out = act(depthwise(x, weight) + shift)
struct DepthwiseArgs {
  Problem problem;
  DepthwisePlan plan;
  Activation act;
  const void* x = nullptr;       // [N, C, H, W] dense in problem.layout
  const void* weight = nullptr;  // [d * d, C], compute type
  const void* shift = nullptr;   // [C], compute type
  void* out = nullptr;           // [N, C, Ho, Wo] in the layout of x
  void* sums = nullptr;          // [N, plan.splits, C], compute type, or null
};
cudaError_t launch_depthwise_conv(const DepthwiseArgs& args, cudaStream_t stream);

// out = act(conv3x3(x, weight) + shift)
struct StemArgs {
  Problem problem;  // layout: of x
  StemPlan plan;
  Layout out_layout = Layout::kNCHW;
  Activation act;
  const void* x = nullptr;       // [N, C, H, W]
  const void* weight = nullptr;  // [3, 3, C, O], compute type
  const void* shift = nullptr;   // [O], compute type
  void* out = nullptr;           // [N, O, Ho, Wo]
};
cudaError_t launch_conv_stem(const StemArgs& args, cudaStream_t stream);

// gate = f(w_expand^T act(w_reduce mean(x) + b_reduce) + b_expand)
struct GateArgs {
  GatePlan plan;
  Layout layout = Layout::kNCHW;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, channels = 0, reduced = 0, pixels = 0;
  const void* x = nullptr;     // [N, C, H, W] dense in layout; not read if there are sums
  const void* sums = nullptr;  // [N, splits, C], compute type, or null
  int64_t splits = 0;
  const void* w_reduce = nullptr;  // [R, C] of dtype
  const void* b_reduce = nullptr;  // [R], compute type
  const void* w_expand = nullptr;  // [R, C] of dtype
  const void* b_expand = nullptr;  // [C], compute type
  Activation act;
  bool sigmoid = false;    // f: sigmoid or hard sigmoid
  void* hidden = nullptr;  // [N, R], compute type; scratch if plan.parts > 1
  void* gate = nullptr;    // [N, C] of dtype
};
// Two launches if plan.parts > 1.
cudaError_t launch_squeeze_excite_gate(const GateArgs& args, cudaStream_t stream);

}  // namespace ghost::cuda
