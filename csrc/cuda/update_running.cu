// Running statistics of both batch norms of a module:
//
//   running = (1 - momentum) * running + momentum * stat
//
// Tile map: a block owns a batch norm, a thread every 256th channel. A norm has only one block,
// because all threads read the counter of batches before thread 0 increments it.
// Binding resource: launch latency; a layer has at most a few thousand channels. One launch
// replaces the ten of PyTorch arithmetic on means, variances and counters.

#include "cuda/update_running.h"

#include "cuda/prim.cuh"

namespace ghost::cuda {
namespace {

constexpr int kThreads = 256;

template <typename Running, typename Stat>
struct Norm {
  Running* running_mean;  // [channels]
  Running* running_var;   // [channels]
  int64_t* batches;
  const Stat* mean;  // [channels]
  const Stat* var;   // [channels]
  int64_t channels;
  Stat momentum;
  bool average;
};

template <typename Running, typename Stat>
__device__ __forceinline__ void blend(Running& running, Stat share, Stat value) {
  running = prim::from_float<Running>((Stat(1) - share) * prim::to_float(running) + share * value);
}

template <typename Running, typename Stat>
__device__ __forceinline__ void update(const Norm<Running, Stat>& norm, Stat unbias) {
  Stat share = norm.momentum;
  if (norm.batches != nullptr) {
    const int64_t raised = *norm.batches + 1;
    if (norm.average) share = Stat(1) / static_cast<Stat>(raised);
    prim::sync_threads();
    if (threadIdx.x == 0) *norm.batches = raised;
  }
  for (int64_t c = threadIdx.x; c < norm.channels; c += kThreads) {
    blend(norm.running_mean[c], share, norm.mean[c]);
    blend(norm.running_var[c], share, unbias * norm.var[c]);
  }
}

// Two calls: a norm chosen at run time would be copied to the stack.
template <typename Running, typename Stat>
__global__ void __launch_bounds__(kThreads)
    update_running_kernel(Norm<Running, Stat> first, Norm<Running, Stat> second, Stat unbias) {
  prim::wait_for_previous_kernel();
  if (blockIdx.x == 0)
    update(first, unbias);
  else
    update(second, unbias);
}

template <typename Running, typename Stat>
cudaError_t launch(const RunningNorm (&norms)[2], int64_t count, cudaStream_t stream) {
  const auto typed = [&](const RunningNorm& norm) {
    const int64_t channels = norm.running_mean && count > 0 ? norm.channels : 0;
    return Norm<Running, Stat>{static_cast<Running*>(norm.running_mean),
                               static_cast<Running*>(norm.running_var),
                               norm.batches,
                               static_cast<const Stat*>(norm.mean),
                               static_cast<const Stat*>(norm.var),
                               channels,
                               static_cast<Stat>(norm.momentum),
                               norm.average};
  };
  const double n = static_cast<double>(count);
  const auto unbias = static_cast<Stat>(count > 1 ? n / (n - 1.0) : 1.0);
  return GHOST_LAUNCH_EARLY((update_running_kernel<Running, Stat>), 2, kThreads, 0, stream,
                            typed(norms[0]), typed(norms[1]), unbias);
}

}  // namespace

cudaError_t launch_update_running(const RunningNorm (&norms)[2], Storage storage, bool is_double,
                                  int64_t count, cudaStream_t stream) {
  if (is_double)
    return storage == Storage::kFloat64 ? launch<double, double>(norms, count, stream)
                                        : cudaErrorInvalidValue;
  switch (storage) {
    case Storage::kFloat32:
      return launch<float, float>(norms, count, stream);
    case Storage::kFloat16:
      return launch<prim::half_t, float>(norms, count, stream);
    case Storage::kBFloat16:
      return launch<prim::bfloat16_t, float>(norms, count, stream);
    case Storage::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace ghost::cuda
