// The instances of the forward kernels for one policy and layout, and the choice among their
// channel widths. Each file in instances/ defines one set with GHOST_FORWARD_INSTANCES.
#pragma once

#include "cuda/apply.cuh"
#include "cuda/cheap_stats.cuh"
#include "cuda/primary_stats.cuh"
#include "cuda/typed.cuh"

namespace ghost::cuda {

template <class P, Layout kLayout>
struct ForwardKernels {
  using T = typename P::T;
  // lean: the arguments satisfy the conditions of Scope::kLean.
  static cudaError_t apply(const ApplyParams<T>& params, bool lean, cudaStream_t stream);
  static cudaError_t cheap_stats(const CheapStatsParams<T>& params, cudaStream_t stream);
  static cudaError_t primary_stats(const PrimaryStatsParams<T>& params, cudaStream_t stream);
};

#define GHOST_DECLARE_FORWARD(P, L)                                                           \
  template <>                                                                                 \
  cudaError_t ForwardKernels<P, L>::apply(const ApplyParams<P::T>&, bool, cudaStream_t);      \
  template <>                                                                                 \
  cudaError_t ForwardKernels<P, L>::cheap_stats(const CheapStatsParams<P::T>&, cudaStream_t); \
  template <>                                                                                 \
  cudaError_t ForwardKernels<P, L>::primary_stats(const PrimaryStatsParams<P::T>&, cudaStream_t);
#define GHOST_DECLARE_FORWARD_LAYOUTS(P)  \
  GHOST_DECLARE_FORWARD(P, Layout::kNCHW) \
  GHOST_DECLARE_FORWARD(P, Layout::kNHWC)
GHOST_DECLARE_FORWARD_LAYOUTS(HalfPolicy)
GHOST_DECLARE_FORWARD_LAYOUTS(BFloat16Policy)
GHOST_DECLARE_FORWARD_LAYOUTS(Tf32Policy)
GHOST_DECLARE_FORWARD_LAYOUTS(FloatPolicy)
GHOST_DECLARE_FORWARD_LAYOUTS(DoublePolicy)
#undef GHOST_DECLARE_FORWARD_LAYOUTS
#undef GHOST_DECLARE_FORWARD

}  // namespace ghost::cuda

// An instance by its scope and channel width.
#define GHOST_LAUNCH_CASE(kernel, P, L, width, scope)                                             \
  if (chosen == scope && params.tile.instance == width)                                           \
    return GHOST_LAUNCH_EARLY((kernel<P, L, width, scope>), grid_of(params.tile), dim3(kThreads), \
                              size_t(params.tile.smem_bytes), stream, params);

// The widths that the plan may choose.
#define GHOST_PLAIN_CASES(kernel, P, L) GHOST_LAUNCH_CASE(kernel, P, L, 32, Scope::kAny)
#define GHOST_NARROW_CASES(kernel, P, L) \
  GHOST_PLAIN_CASES(kernel, P, L) GHOST_LAUNCH_CASE(kernel, P, L, 64, Scope::kAny)
#define GHOST_TENSOR_CASES(kernel, P, L) \
  GHOST_NARROW_CASES(kernel, P, L) GHOST_LAUNCH_CASE(kernel, P, L, 128, Scope::kAny)
#define GHOST_DIRECT_CASES(kernel, P, L)              \
  GHOST_NARROW_CASES(kernel, P, L)                    \
  GHOST_LAUNCH_CASE(kernel, P, L, 32, Scope::kDirect) \
  GHOST_LAUNCH_CASE(kernel, P, L, 64, Scope::kDirect) \
  GHOST_LAUNCH_CASE(kernel, P, L, 128, Scope::kDirect)
#define GHOST_APPLY_CASES(kernel, P, L)               \
  GHOST_DIRECT_CASES(kernel, P, L)                    \
  GHOST_LAUNCH_CASE(kernel, P, L, 16, Scope::kDirect) \
  GHOST_LAUNCH_CASE(kernel, P, L, 16, Scope::kLean)   \
  GHOST_LAUNCH_CASE(kernel, P, L, 32, Scope::kLean)   \
  GHOST_LAUNCH_CASE(kernel, P, L, 64, Scope::kLean)   \
  GHOST_LAUNCH_CASE(kernel, P, L, 128, Scope::kLean)

#define GHOST_FORWARD_LAUNCHER(P, L, name, Arguments, kernel, CASES, SCOPE) \
  template <>                                                               \
  cudaError_t ForwardKernels<P, L>::name Arguments {                        \
    const Scope chosen = params.tile.direct ? (SCOPE) : Scope::kAny;        \
    CASES(kernel, P, L)                                                     \
    return cudaErrorInvalidValue;                                           \
  }

// APPLY_CASES, CASES: of ghost_apply and of the others.
#define GHOST_FORWARD_INSTANCES(P, L, APPLY_CASES, CASES)                                       \
  namespace ghost::cuda {                                                                       \
  GHOST_FORWARD_LAUNCHER(P, L, apply,                                                           \
                         (const ApplyParams<P::T>& params, bool lean, cudaStream_t stream),     \
                         ghost_apply_kernel, APPLY_CASES, lean ? Scope::kLean : Scope::kDirect) \
  GHOST_FORWARD_LAUNCHER(P, L, cheap_stats,                                                     \
                         (const CheapStatsParams<P::T>& params, cudaStream_t stream),           \
                         ghost_cheap_stats_kernel, CASES, Scope::kDirect)                       \
  GHOST_FORWARD_LAUNCHER(P, L, primary_stats,                                                   \
                         (const PrimaryStatsParams<P::T>& params, cudaStream_t stream),         \
                         ghost_primary_stats_kernel, CASES, Scope::kDirect)                     \
  }
