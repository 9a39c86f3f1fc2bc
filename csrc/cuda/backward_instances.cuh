// The instances of the backward kernels, and the choice among them. Each file in instances/ defines
// some of them with GHOST_BACKWARD_*_INSTANCES.
#pragma once

#include "cuda/backward_du.cuh"
#include "cuda/backward_finish.cuh"
#include "cuda/backward_grads.cuh"
#include "cuda/backward_primary.cuh"
#include "cuda/backward_sums.cuh"
#include "cuda/typed.cuh"

namespace ghost::cuda {

// Kernels that depend on the storage type alone.
template <class T>
struct BackwardKernels {
  static cudaError_t grads(const CheapParams& params, cudaStream_t stream);
  static cudaError_t finish(const FinishParams& params, cudaStream_t stream);
};
// Kernels that depend on the storage type and the arithmetic.
template <class P>
struct BackwardProducts {
  static cudaError_t primary(const PrimaryParams& params, cudaStream_t stream);
  static cudaError_t du(const PrimaryParams& params, cudaStream_t stream);  // of 16-bit types
};
template <class P, Layout kLayout>
struct BackwardSums {
  static cudaError_t run(const SumsParams<typename P::T>& params, cudaStream_t stream);
};

}  // namespace ghost::cuda

#define GHOST_BACKWARD_TYPE_INSTANCES(T)                                                    \
  namespace ghost::cuda {                                                                   \
  template <>                                                                               \
  cudaError_t BackwardKernels<T>::grads(const CheapParams& params, cudaStream_t stream) {   \
    const GradsTile& t = params.tile;                                                       \
    const unsigned blocks = unsigned(t.workers) * unsigned(t.channel_blocks);               \
    return GHOST_LAUNCH((ghost_backward_grads_kernel<T>), dim3(blocks), dim3(kThreads),     \
                        size_t(t.smem_bytes), stream, params);                              \
  }                                                                                         \
  template <>                                                                               \
  cudaError_t BackwardKernels<T>::finish(const FinishParams& params, cudaStream_t stream) { \
    return GHOST_LAUNCH((ghost_backward_finish_kernel<T>), dim3(unsigned(params.blocks)),   \
                        dim3(kThreads), sizeof(Accumulator<T>) * kThreads, stream, params); \
  }                                                                                         \
  }

#define GHOST_BACKWARD_PRODUCT_INSTANCES(P)                                                       \
  namespace ghost::cuda {                                                                         \
  template <>                                                                                     \
  cudaError_t BackwardProducts<P>::primary(const PrimaryParams& params, cudaStream_t stream) {    \
    return GHOST_LAUNCH((ghost_backward_primary_kernel<P>), dim3(unsigned(params.plan.blocks())), \
                        dim3(kThreads), size_t(params.plan.smem_bytes), stream, params);          \
  }                                                                                               \
  }

// Instance number `place` of kDuInstances, by the share of a warp in dw1 (TileGrid).
#define GHOST_BACKWARD_DU_CASE(P, place, tiles_m, tiles_n, warps_m, warps_n)                 \
  case place: {                                                                              \
    using Grid = TileGrid<tiles_m, tiles_n, warps_m, warps_n>;                               \
    constexpr DuInstance kInstance = kDuInstances[place];                                    \
    using Unit = TileGrid<kInstance.unit_rows() / 16, 4, 1, 1>;                              \
    static_assert(kInstance.intrinsic == Grid::kRows && kInstance.channels == Grid::kCols && \
                  kInstance.warp_groups == Grid::kWarpsK);                                   \
    return GHOST_LAUNCH((ghost_backward_du_kernel<P, Grid, Unit>),                           \
                        dim3(unsigned(params.plan.blocks())), dim3(kThreads),                \
                        size_t(params.plan.smem_bytes), stream, params);                     \
  }
#define GHOST_BACKWARD_DU_INSTANCES(P)                                                    \
  namespace ghost::cuda {                                                                 \
  template <>                                                                             \
  cudaError_t BackwardProducts<P>::du(const PrimaryParams& params, cudaStream_t stream) { \
    switch (params.plan.du.instance) {                                                    \
      GHOST_BACKWARD_DU_CASE(P, 0, 2, 4, 1, 1)                                            \
      GHOST_BACKWARD_DU_CASE(P, 1, 2, 4, 2, 2)                                            \
      GHOST_BACKWARD_DU_CASE(P, 2, 2, 4, 1, 4)                                            \
      GHOST_BACKWARD_DU_CASE(P, 3, 2, 4, 4, 2)                                            \
      GHOST_BACKWARD_DU_CASE(P, 4, 4, 4, 2, 4)                                            \
      GHOST_BACKWARD_DU_CASE(P, 5, 2, 8, 2, 4)                                            \
      GHOST_BACKWARD_DU_CASE(P, 6, 4, 4, 4, 2)                                            \
      default:                                                                            \
        return cudaErrorInvalidValue;                                                     \
    }                                                                                     \
  }                                                                                       \
  }

#define GHOST_BACKWARD_SUMS_CASE(P, L, width, scope)                                            \
  if (chosen == scope && params.tile.instance == width)                                         \
    return GHOST_LAUNCH((ghost_backward_sums_kernel<P, L, width, scope>), grid_of(params.tile), \
                        dim3(kThreads), size_t(params.tile.smem_bytes), stream, params);
#define GHOST_BACKWARD_WIDE_CASES(P, L) GHOST_BACKWARD_SUMS_CASE(P, L, 32, Scope::kAny)
#define GHOST_BACKWARD_HALF_CASES(P, L) \
  GHOST_BACKWARD_WIDE_CASES(P, L) GHOST_BACKWARD_SUMS_CASE(P, L, 64, Scope::kAny)
#define GHOST_BACKWARD_DIRECT_CASES(P, L)            \
  GHOST_BACKWARD_HALF_CASES(P, L)                    \
  GHOST_BACKWARD_SUMS_CASE(P, L, 32, Scope::kDirect) \
  GHOST_BACKWARD_SUMS_CASE(P, L, 64, Scope::kDirect)

// CASES: the channel widths and scopes that the plan may choose.
#define GHOST_BACKWARD_SUMS_INSTANCES(P, L, CASES)                                           \
  namespace ghost::cuda {                                                                    \
  template <>                                                                                \
  cudaError_t BackwardSums<P, L>::run(const SumsParams<P::T>& params, cudaStream_t stream) { \
    const Scope chosen = params.tile.direct ? Scope::kDirect : Scope::kAny;                  \
    CASES(P, L)                                                                              \
    return cudaErrorInvalidValue;                                                            \
  }                                                                                          \
  }
