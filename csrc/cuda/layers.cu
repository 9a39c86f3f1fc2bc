// Launchers of layers.h: from plain data to typed kernel parameters, and to the kernel instance.
#include "cuda/layers.h"

#include <algorithm>

#include "cuda/layers_instances.cuh"

namespace ghost::cuda {
namespace {

// Calls f with a value of the storage type.
template <class F>
cudaError_t with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(prim::half_t{});
    case DType::kBFloat16:
      return f(prim::bfloat16_t{});
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat32:
      break;
  }
  return f(float{});
}

}  // namespace

cudaError_t launch_depthwise_conv(const DepthwiseArgs& args, cudaStream_t stream) {
  return with_type(args.problem.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const Problem& p = args.problem;
    DepthwiseParams<T> params;
    params.plan = args.plan;
    params.x = static_cast<const T*>(args.x);
    params.weight = static_cast<const A*>(args.weight);
    params.shift = static_cast<const A*>(args.shift);
    params.out = static_cast<T*>(args.out);
    params.sums = static_cast<A*>(args.sums);
    params.c = int32_t(p.channels);
    params.h = int32_t(p.height);
    params.w = int32_t(p.width);
    params.out_h = int32_t(p.out_height());
    params.out_w = int32_t(p.out_width());
    params.d = int32_t(p.dw_size);
    params.stride = int32_t(p.stride);
    params.act = args.act.act;
    params.slope = A(args.act.slope);
    return LayerKernels<T>::depthwise(params, p.layout, stream);
  });
}

cudaError_t launch_conv_stem(const StemArgs& args, cudaStream_t stream) {
  return with_type(args.problem.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const Problem& p = args.problem;
    StemParams<T> params;
    params.plan = args.plan;
    params.x = static_cast<const T*>(args.x);
    params.weight = static_cast<const A*>(args.weight);
    params.shift = static_cast<const A*>(args.shift);
    params.out = static_cast<T*>(args.out);
    params.c = int32_t(p.channels);
    params.o = int32_t(p.out_channels);
    params.h = int32_t(p.height);
    params.w = int32_t(p.width);
    params.out_h = int32_t(p.out_height());
    params.out_w = int32_t(p.out_width());
    params.stride = int32_t(p.stride);
    params.x_nhwc = p.layout == Layout::kNHWC;
    params.out_nhwc = args.out_layout == Layout::kNHWC;
    params.act = args.act.act;
    params.slope = A(args.act.slope);
    return LayerKernels<T>::stem(params, stream);
  });
}

cudaError_t launch_squeeze_excite_gate(const GateArgs& args, cudaStream_t stream) {
  return with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    GateParams<T> params;
    params.plan = args.plan;
    params.x = static_cast<const T*>(args.x);
    params.sums = static_cast<const A*>(args.sums);
    params.w_reduce = static_cast<const T*>(args.w_reduce);
    params.b_reduce = static_cast<const A*>(args.b_reduce);
    params.w_expand = static_cast<const T*>(args.w_expand);
    params.b_expand = static_cast<const A*>(args.b_expand);
    params.hidden = static_cast<A*>(args.hidden);
    params.gate = static_cast<T*>(args.gate);
    params.n = args.batch;
    params.c = int32_t(args.channels);
    params.r = int32_t(args.reduced);
    params.pixels = int32_t(args.pixels);
    params.splits = int32_t(args.splits);
    params.x_bytes = copy_bytes<T>(args.x, args.channels);
    params.w_bytes = std::min(copy_bytes<T>(args.w_reduce, args.channels),
                              copy_bytes<T>(args.w_expand, args.channels));
    params.act = args.act.act;
    params.slope = A(args.act.slope);
    params.sigmoid = args.sigmoid;
    if (args.plan.parts == 1) return LayerKernels<T>::gate(params, args.layout, stream);
    params.phase = GatePhase::kReduce;
    const cudaError_t status = LayerKernels<T>::gate(params, args.layout, stream);
    if (status != cudaSuccess) return status;
    params.phase = GatePhase::kExpand;
    return LayerKernels<T>::gate(params, args.layout, stream);
  });
}

}  // namespace ghost::cuda
