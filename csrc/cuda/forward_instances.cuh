// The instances of the forward kernels for one policy and layout, and the choice among their
// channel widths. A file in instances/ defines them with GHOST_FORWARD_INSTANCES.
#pragma once

#include "cuda/apply.cuh"
#include "cuda/cheap_stats.cuh"
#include "cuda/primary_stats.cuh"

namespace ghost::cuda {

template <class P, Layout kLayout>
struct ForwardKernels {
  using T = typename P::T;
  static cudaError_t apply(const ApplyParams<T>& params, unsigned blocks, cudaStream_t stream);
  static cudaError_t cheap_stats(const CheapStatsParams<T>& params, unsigned blocks,
                                 cudaStream_t stream);
  static cudaError_t primary_stats(const PrimaryStatsParams<T>& params, unsigned blocks,
                                   cudaStream_t stream);
};

#define GHOST_DECLARE_FORWARD(P, L)                                                          \
  template <>                                                                                \
  cudaError_t ForwardKernels<P, L>::apply(const ApplyParams<P::T>&, unsigned, cudaStream_t); \
  template <>                                                                                \
  cudaError_t ForwardKernels<P, L>::cheap_stats(const CheapStatsParams<P::T>&, unsigned,     \
                                                cudaStream_t);                               \
  template <>                                                                                \
  cudaError_t ForwardKernels<P, L>::primary_stats(const PrimaryStatsParams<P::T>&, unsigned, \
                                                  cudaStream_t);
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

#define GHOST_LAUNCH_CASE(kernel, P, L, width)                               \
  case width:                                                                \
    return GHOST_LAUNCH((kernel<P, L, width>), dim3(blocks), dim3(kThreads), \
                        size_t(params.tile.smem_bytes), stream, params);
#define GHOST_TENSOR_CASES(kernel, P, L) \
  GHOST_LAUNCH_CASE(kernel, P, L, 32)    \
  GHOST_LAUNCH_CASE(kernel, P, L, 64) GHOST_LAUNCH_CASE(kernel, P, L, 128)
#define GHOST_DIRECT_CASES(kernel, P, L) \
  GHOST_LAUNCH_CASE(kernel, P, L, 16) GHOST_TENSOR_CASES(kernel, P, L)
#define GHOST_PLAIN_CASES(kernel, P, L) GHOST_LAUNCH_CASE(kernel, P, L, 32)

#define GHOST_FORWARD_LAUNCHER(name, Params, kernel, P, L, CASES)                     \
  template <>                                                                         \
  cudaError_t ForwardKernels<P, L>::name(const Params<P::T>& params, unsigned blocks, \
                                         cudaStream_t stream) {                       \
    switch (params.tile.instance) {                                                   \
      CASES(kernel, P, L)                                                             \
      default:                                                                        \
        return cudaErrorInvalidValue;                                                 \
    }                                                                                 \
  }

// The widths that the plan may choose for ghost_apply and for the others: GHOST_DIRECT_CASES,
// GHOST_TENSOR_CASES or GHOST_PLAIN_CASES.
#define GHOST_FORWARD_INSTANCES(P, L, APPLY_CASES, CASES)                                      \
  namespace ghost::cuda {                                                                      \
  GHOST_FORWARD_LAUNCHER(apply, ApplyParams, ghost_apply_kernel, P, L, APPLY_CASES)            \
  GHOST_FORWARD_LAUNCHER(cheap_stats, CheapStatsParams, ghost_cheap_stats_kernel, P, L, CASES) \
  GHOST_FORWARD_LAUNCHER(primary_stats, PrimaryStatsParams, ghost_primary_stats_kernel, P, L,  \
                         CASES)                                                                \
  }
