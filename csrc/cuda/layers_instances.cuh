// The instances of the layer kernels for one storage type. Each file in instances/ defines one set
// with GHOST_LAYER_INSTANCES.
#pragma once

#include "cuda/conv_stem.cuh"
#include "cuda/squeeze_excite.cuh"
#include "cuda/typed.cuh"

namespace ghost::cuda {

template <class T>
struct LayerKernels {
  static cudaError_t depthwise(const DepthwiseParams<T>& params, Layout layout,
                               cudaStream_t stream);
  static cudaError_t stem(const StemParams<T>& params, cudaStream_t stream);
  static cudaError_t gate(const GateParams<T>& params, Layout layout, cudaStream_t stream);
};

template <Layout kLayout, int kD, int kStride, class T>
cudaError_t depthwise_instance(const DepthwiseParams<T>& params, cudaStream_t stream) {
  return GHOST_LAUNCH_EARLY((ghost_depthwise_conv_kernel<T, kLayout, kD, kStride>),
                            dim3(unsigned(params.plan.blocks)), dim3(kThreads),
                            size_t(params.plan.smem_bytes), stream, params);
}

// The kernels by strips exist for 3x3, 5x5 and 7x7, stride 1 and 2, but not for double.
template <class T>
cudaError_t choose_depthwise(const DepthwiseParams<T>& params, Layout layout, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    if (params.plan.windowed) {
      switch (10 * params.d + params.stride) {
        case 31:
          return depthwise_instance<Layout::kNHWC, 3, 1>(params, stream);
        case 32:
          return depthwise_instance<Layout::kNHWC, 3, 2>(params, stream);
        case 51:
          return depthwise_instance<Layout::kNHWC, 5, 1>(params, stream);
        case 52:
          return depthwise_instance<Layout::kNHWC, 5, 2>(params, stream);
        case 71:
          return depthwise_instance<Layout::kNHWC, 7, 1>(params, stream);
        case 72:
          return depthwise_instance<Layout::kNHWC, 7, 2>(params, stream);
        default:
          return cudaErrorInvalidValue;
      }
    }
  }
  return layout == Layout::kNHWC ? depthwise_instance<Layout::kNHWC, 0, 0>(params, stream)
                                 : depthwise_instance<Layout::kNCHW, 0, 0>(params, stream);
}

template <Layout kLayout, class T>
cudaError_t gate_instance(const GateParams<T>& params, cudaStream_t stream) {
  return GHOST_LAUNCH_EARLY((ghost_squeeze_excite_gate_kernel<T, kLayout>),
                            dim3(unsigned(params.plan.blocks)), dim3(kGateThreads),
                            size_t(params.plan.smem_bytes), stream, params);
}

#define GHOST_LAYER_INSTANCES(T)                                                             \
  namespace ghost::cuda {                                                                    \
  template <>                                                                                \
  cudaError_t LayerKernels<T>::depthwise(const DepthwiseParams<T>& params, Layout layout,    \
                                         cudaStream_t stream) {                              \
    return choose_depthwise(params, layout, stream);                                         \
  }                                                                                          \
  template <>                                                                                \
  cudaError_t LayerKernels<T>::stem(const StemParams<T>& params, cudaStream_t stream) {      \
    return GHOST_LAUNCH_EARLY(ghost_conv_stem_kernel<T>, dim3(unsigned(params.plan.blocks)), \
                              dim3(kThreads), 0, stream, params);                            \
  }                                                                                          \
  template <>                                                                                \
  cudaError_t LayerKernels<T>::gate(const GateParams<T>& params, Layout layout,              \
                                    cudaStream_t stream) {                                   \
    return layout == Layout::kNHWC ? gate_instance<Layout::kNHWC>(params, stream)            \
                                   : gate_instance<Layout::kNCHW>(params, stream);           \
  }                                                                                          \
  }

#define GHOST_DECLARE_LAYERS(T)                                                            \
  template <>                                                                              \
  cudaError_t LayerKernels<T>::depthwise(const DepthwiseParams<T>&, Layout, cudaStream_t); \
  template <>                                                                              \
  cudaError_t LayerKernels<T>::stem(const StemParams<T>&, cudaStream_t);                   \
  template <>                                                                              \
  cudaError_t LayerKernels<T>::gate(const GateParams<T>&, Layout, cudaStream_t);
GHOST_DECLARE_LAYERS(prim::half_t)
GHOST_DECLARE_LAYERS(prim::bfloat16_t)
GHOST_DECLARE_LAYERS(float)
GHOST_DECLARE_LAYERS(double)
#undef GHOST_DECLARE_LAYERS

}  // namespace ghost::cuda
