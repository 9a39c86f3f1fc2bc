// Running statistics of batch norms on the GPU. Depends on CUDA, not on torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ghost::cuda {

// Storage type of a per-channel buffer.
enum class Storage { kFloat32, kFloat64, kFloat16, kBFloat16 };

// One batch norm. All vectors are dense [channels].
struct RunningNorm {
  void* running_mean = nullptr;  // of the storage type; null: this norm keeps no statistics
  void* running_var = nullptr;
  int64_t* batches = nullptr;  // counter on the device, incremented by one; may be null
  const void* mean = nullptr;  // biased statistics of the batch, of the compute type
  const void* var = nullptr;
  int64_t channels = 0;
  double momentum = 0.0;
  bool average = false;  // the momentum is 1 / (new counter): the average over all batches
};

// running_mean = (1 - momentum) * running_mean + momentum * mean
// running_var  = (1 - momentum) * running_var  + momentum * var * count / (count - 1)
// With count 1 var is not scaled; with count 0 (an empty batch) only the counters change, as
// in torch. The compute type is float64 if is_double, else float32.
cudaError_t launch_update_running(const RunningNorm (&norms)[2], Storage storage, bool is_double,
                                  int64_t count, cudaStream_t stream);

}  // namespace ghost::cuda
