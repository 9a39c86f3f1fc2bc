// Launchers of forward.h: from plain data to typed kernel parameters, and to the instance that the
// plan chose.
#include "cuda/forward.h"

#include <algorithm>
#include <numeric>

#include "cuda/forward_instances.cuh"
#include "cuda/pack.cuh"
#include "cuda/typed.cuh"

namespace ghost::cuda {
namespace {

// An output of `channels` maps; the blocks store the first m of them and the rest separately.
template <class T>
Output<T> output_of(const ForwardArgs& args, int64_t channels) {
  const Problem& p = args.problem;
  const CudaTile& t = args.plan.tile;
  Output<T> r;
  r.out = static_cast<T*>(args.out);
  r.residual = static_cast<const T*>(args.residual);
  r.gate = static_cast<const T*>(args.gate);
  r.channels = int32_t(channels);
  r.gate_h = int32_t(p.gate_height);
  r.gate_w = int32_t(p.gate_width);
  r.gate_rows = float(p.gate_height) / float(p.out_height());
  r.gate_cols = float(p.gate_width) / float(p.out_width());
  int64_t run;
  if (p.layout == Layout::kNHWC)
    run = t.ghost_blocks > 1 ? 1 : std::gcd(p.intrinsic, channels);
  else
    run = std::gcd(pixel_run(t, p.out_height(), p.out_width(), false),
                   p.out_height() * p.out_width());
  r.bytes = copy_bytes<T>(args.out, run);
  if (args.residual) r.bytes = std::min(r.bytes, copy_bytes<T>(args.residual, run));
  if (args.gate && p.layout == Layout::kNHWC)
    r.bytes = std::min(r.bytes, copy_bytes<T>(args.gate, run));
  return r;
}

// Whether the arguments satisfy the conditions of a lean instance: Scope::kLean in forward.cuh.
template <class T>
bool is_lean(const ForwardArgs& args, const Output<T>& output) {
  const Problem& p = args.problem;
  const auto simple = [](Act act) { return act == Act::kNone || act == Act::kReLU; };
  return args.norm1.source == NormSource::kReady && args.norm2.source == NormSource::kReady &&
         args.w2.dtype == DType::kFloat32 && p.dw_size == 3 && p.ratio == 2 && simple(p.act1.act) &&
         simple(p.act2.act) && !p.has_gate() && !p.pooled && output.bytes >= 8;
}

// Calls f with the policy and layout of a problem.
template <class F>
cudaError_t with_policy(const ForwardArgs& args, F&& f) {
  const auto with_layout = [&](auto policy) {
    using P = decltype(policy);
    return args.problem.layout == Layout::kNHWC ? f(policy, ForwardKernels<P, Layout::kNHWC>{})
                                                : f(policy, ForwardKernels<P, Layout::kNCHW>{});
  };
  switch (args.problem.dtype) {
    case DType::kFloat16:
      return with_layout(HalfPolicy{});
    case DType::kBFloat16:
      return with_layout(BFloat16Policy{});
    case DType::kFloat64:
      return with_layout(DoublePolicy{});
    case DType::kFloat32:
      break;
  }
  return args.plan.tensor_cores ? with_layout(Tf32Policy{}) : with_layout(FloatPolicy{});
}

}  // namespace

cudaError_t launch_ghost_apply(const ForwardArgs& args, cudaStream_t stream) {
  if (args.pipelined.base.blocks > 0) {
    const cudaError_t status = args.problem.dtype == DType::kFloat16
                                   ? launch_pipelined_half(args, stream)
                                   : launch_pipelined_bfloat16(args, stream);
    if (status != cudaErrorNotSupported) return status;
  }
  return with_policy(args, [&](auto policy, auto kernels) {
    using T = typename decltype(policy)::T;
    ApplyParams<T> params;
    params.tile = args.plan.tile;
    params.maps = maps_of(args.problem, args.plan.tile);
    params.windows = WindowGrid(args.plan.tile);
    params.intrinsic = intrinsic_of<T>(args);
    params.w2 = args.w2;
    params.norm2 = typed<T>(args.norm2);
    params.act2 = typed<T>(args.problem.act2, args.slopes2);
    params.output = output_of<T>(args, args.problem.out_channels);
    params.pooled = args.problem.pooled;
    return decltype(kernels)::apply(params, is_lean(args, params.output), stream);
  });
}

cudaError_t launch_ghost_cheap_stats(const ForwardArgs& args, cudaStream_t stream) {
  return with_policy(args, [&](auto policy, auto kernels) {
    using T = typename decltype(policy)::T;
    CheapStatsParams<T> params;
    params.tile = args.plan.tile;
    params.maps = maps_of(args.problem, args.plan.tile);
    params.windows = WindowGrid(args.plan.tile);
    params.intrinsic = intrinsic_of<T>(args);
    params.w2 = args.w2;
    params.partials = typed<T>(args.partials);
    return decltype(kernels)::cheap_stats(params, stream);
  });
}

cudaError_t launch_ghost_primary_stats(const ForwardArgs& args, cudaStream_t stream) {
  return with_policy(args, [&](auto policy, auto kernels) {
    using T = typename decltype(policy)::T;
    PrimaryStatsParams<T> params;
    params.tile = args.plan.tile;
    params.maps = maps_of(args.problem, args.plan.tile);
    params.in = primary_of<T>(args);
    params.u = output_of<T>(args, args.problem.intrinsic);
    params.partials = typed<T>(args.partials);
    return decltype(kernels)::primary_stats(params, stream);
  });
}

cudaError_t launch_combine_stats(const PartialsRef& partials, DType dtype, int64_t channels,
                                 void* mean, void* var, cudaStream_t stream) {
  if (channels == 0) return cudaSuccess;
  const unsigned blocks = unsigned((channels + kWarps - 1) / kWarps);
  if (dtype == DType::kFloat64)
    return GHOST_LAUNCH_EARLY(combine_stats_kernel<double>, dim3(blocks), dim3(kThreads), 0, stream,
                              typed<double>(partials), channels, static_cast<double*>(mean),
                              static_cast<double*>(var));
  return GHOST_LAUNCH_EARLY(combine_stats_kernel<float>, dim3(blocks), dim3(kThreads), 0, stream,
                            typed<float>(partials), channels, static_cast<float*>(mean),
                            static_cast<float*>(var));
}

namespace {

template <class T>
cudaError_t pack(const PackArgs& args, cudaStream_t stream) {
  using A = Accumulator<T>;
  const CudaPackedLayout at(args.dtype, args.channels, args.intrinsic, args.ghosts, args.dw_size,
                            args.w1 != nullptr, args.prelu1.data != nullptr,
                            args.prelu2.data != nullptr);
  unsigned char* base = static_cast<unsigned char*>(args.packed);
  PackParams<T> p;
  p.w1 = static_cast<const T*>(args.w1);
  p.w2 = args.w2;
  p.norm1 = typed<T>(args.norm1);
  p.norm2 = typed<T>(args.norm2);
  p.c = args.channels;
  p.m = args.intrinsic;
  p.g = args.ghosts;
  p.taps = args.dw_size * args.dw_size;
  p.w1_count = args.w1 != nullptr ? p.m * p.c : 0;
  p.folded = at.folded;
  p.w1_out = reinterpret_cast<T*>(base + at.w1);
  p.scale1 = reinterpret_cast<A*>(base + at.scale1);
  p.shift1 = reinterpret_cast<A*>(base + at.shift1);
  p.w2_out = reinterpret_cast<A*>(base + at.w2);
  p.shift2 = reinterpret_cast<A*>(base + at.shift2);
  p.slopes1 = args.prelu1;
  p.slopes2 = args.prelu2;
  p.slopes1_out = reinterpret_cast<A*>(base + at.slopes1);
  p.slopes2_out = reinterpret_cast<A*>(base + at.slopes2);
  p.rest = base + at.bytes;
  p.rest_bytes = args.packed_bytes - at.bytes;
  const int64_t most = std::max({p.w1_count, p.g * p.taps, p.rest_bytes, p.m, int64_t(1)});
  const unsigned blocks = unsigned(std::min<int64_t>((most + kThreads - 1) / kThreads, 1024));
  return GHOST_LAUNCH_EARLY(ghost_pack_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream, p);
}

}  // namespace

cudaError_t launch_ghost_pack(const PackArgs& args, cudaStream_t stream) {
  switch (args.dtype) {
    case DType::kFloat16:
      return pack<prim::half_t>(args, stream);
    case DType::kBFloat16:
      return pack<prim::bfloat16_t>(args, stream);
    case DType::kFloat64:
      return pack<double>(args, stream);
    case DType::kFloat32:
      break;
  }
  return pack<float>(args, stream);
}

}  // namespace ghost::cuda
