// running = (1 - momentum) * running + momentum * stat, one thread a channel.
//
// Bound by launch latency: a layer has at most a few thousand channels. One kernel replaces the
// four that PyTorch arithmetic on mean, var and the unbiased variance would launch.

#include "cuda/update_running.h"

#include "cuda/prim.cuh"

namespace ghost::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Running, typename Stat>
__global__ void __launch_bounds__(kThreads)
    update_running_kernel(Running* __restrict__ running_mean,  // [channels]
                          Running* __restrict__ running_var,   // [channels]
                          const Stat* __restrict__ mean,       // [channels]
                          const Stat* __restrict__ var,        // [channels]
                          int64_t channels, Stat momentum, Stat unbiased_momentum) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= channels) return;
  const Stat keep = Stat(1) - momentum;
  running_mean[c] =
      prim::from_float<Running>(keep * prim::to_float(running_mean[c]) + momentum * mean[c]);
  running_var[c] =
      prim::from_float<Running>(keep * prim::to_float(running_var[c]) + unbiased_momentum * var[c]);
}

template <typename Running, typename Stat>
cudaError_t launch(void* running_mean, void* running_var, const void* mean, const void* var,
                   int64_t channels, double momentum, int64_t count, cudaStream_t stream) {
  if (channels == 0 || count == 0) return cudaSuccess;
  const double n = static_cast<double>(count);
  const double unbiased_momentum = count > 1 ? momentum * (n / (n - 1.0)) : momentum;
  const auto blocks = static_cast<unsigned>((channels + kThreads - 1) / kThreads);
  return GHOST_LAUNCH((update_running_kernel<Running, Stat>), blocks, kThreads, 0, stream,
                      static_cast<Running*>(running_mean), static_cast<Running*>(running_var),
                      static_cast<const Stat*>(mean), static_cast<const Stat*>(var), channels,
                      static_cast<Stat>(momentum), static_cast<Stat>(unbiased_momentum));
}

}  // namespace

cudaError_t launch_update_running(void* running_mean, void* running_var, const void* mean,
                                  const void* var, Storage running_storage, bool stat_is_double,
                                  int64_t channels, double momentum, int64_t count,
                                  cudaStream_t stream) {
  const auto run = [&](auto launcher) {
    return launcher(running_mean, running_var, mean, var, channels, momentum, count, stream);
  };
  if (stat_is_double) {
    if (running_storage != Storage::kFloat64) return cudaErrorInvalidValue;
    return run(launch<double, double>);
  }
  switch (running_storage) {
    case Storage::kFloat32:
      return run(launch<float, float>);
    case Storage::kFloat16:
      return run(launch<prim::half_t, float>);
    case Storage::kBFloat16:
      return run(launch<prim::bfloat16_t, float>);
    case Storage::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace ghost::cuda
