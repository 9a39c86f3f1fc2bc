// Running statistics of a batch norm on the GPU. Knows CUDA, does not know torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ghost::cuda {

// Storage type of a per-channel buffer.
enum class Storage { kFloat32, kFloat64, kFloat16, kBFloat16 };

// running_mean = (1 - momentum) * running_mean + momentum * mean
// running_var  = (1 - momentum) * running_var  + momentum * var * count / (count - 1)
// With count 1 var is taken as it is; with count 0 (an empty batch) nothing changes, as in torch.
// All four are dense [channels]. mean and var are the biased batch statistics in float64 if
// stat_is_double, else in float32, which is also the type of the arithmetic.
cudaError_t launch_update_running(void* running_mean,  // [channels], of running_storage
                                  void* running_var,   // [channels], of running_storage
                                  const void* mean,    // [channels], float32 or float64
                                  const void* var,     // [channels], float32 or float64
                                  Storage running_storage, bool stat_is_double, int64_t channels,
                                  double momentum, int64_t count, cudaStream_t stream);

}  // namespace ghost::cuda
