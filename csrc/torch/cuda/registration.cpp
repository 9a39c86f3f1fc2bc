// ghost_update_running_ on CUDA. Operators that are not registered for CUDA keep their composite
// implementation.
#include "cuda/update_running.h"
#include "torch/cuda/common.h"

namespace ghost {
namespace {

void check_per_channel(const Tensor& tensor, const char* name, int64_t channels, ScalarType type,
                       const Tensor& like) {
  check_device(tensor, like, name);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels, name, " must have shape [",
                  channels, "], the one of running_mean");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype: all running ",
                  "statistics must share one, and mean and var its compute type");
}

cuda::Storage storage_of(DType type) {
  switch (type) {
    case DType::kFloat64:
      return cuda::Storage::kFloat64;
    case DType::kFloat16:
      return cuda::Storage::kFloat16;
    case DType::kBFloat16:
      return cuda::Storage::kBFloat16;
    case DType::kFloat32:
      break;
  }
  return cuda::Storage::kFloat32;
}

// One batch norm, checked against the one whose running statistics set the dtype.
cuda::RunningNorm running_norm(const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& batches,
                               const Tensor& mean, const Tensor& var,
                               std::optional<double> momentum, ScalarType storage) {
  cuda::RunningNorm norm;
  if (batches) {
    check_device(*batches, mean, "the counter of batches");
    norm.batches = counter_of(*batches);
  }
  if (!running_mean || !running_var) return norm;
  STD_TORCH_CHECK(momentum || batches, "a momentum of None needs the counter of batches");
  STD_TORCH_CHECK(running_mean->dim() == 1, "running_mean must have one dimension");
  const int64_t channels = running_mean->size(0);
  const ScalarType compute = compute_type(dtype_of(*running_mean, "running_mean"));
  check_per_channel(*running_mean, "running_mean", channels, storage, mean);
  check_per_channel(*running_var, "running_var", channels, storage, mean);
  check_per_channel(mean, "mean", channels, compute, mean);
  check_per_channel(var, "var", channels, compute, mean);
  norm.running_mean = Tensor(*running_mean).mutable_data_ptr();
  norm.running_var = Tensor(*running_var).mutable_data_ptr();
  norm.mean = mean.const_data_ptr();
  norm.var = var.const_data_ptr();
  norm.channels = channels;
  norm.momentum = momentum.value_or(0.0);
  norm.average = !momentum;
  return norm;
}

void ghost_update_running_(const OptionalTensor& running_mean1, const OptionalTensor& running_var1,
                           const OptionalTensor& batches1, const Tensor& mean1, const Tensor& var1,
                           std::optional<double> momentum1, const OptionalTensor& running_mean2,
                           const OptionalTensor& running_var2, const OptionalTensor& batches2,
                           const Tensor& mean2, const Tensor& var2, std::optional<double> momentum2,
                           int64_t count) {
  const OptionalTensor& any = running_mean1 ? running_mean1 : running_mean2;
  const ScalarType storage = any ? any->scalar_type() : ScalarType::Float;
  const DType dtype = any ? dtype_of(*any, "running_mean") : DType::kFloat32;
  const cuda::RunningNorm norms[2] = {
      running_norm(running_mean1, running_var1, batches1, mean1, var1, momentum1, storage),
      running_norm(running_mean2, running_var2, batches2, mean2, var2, momentum2, storage)};
  const DeviceScope scope(mean1);
  check_launch(cuda::launch_update_running(norms, storage_of(dtype), dtype == DType::kFloat64,
                                           count, scope.stream()),
               "ghost_update_running_");
}

}  // namespace
}  // namespace ghost

#ifndef GHOST_OPS_EMULATOR
// Versions of the CUDA runtime in this library and of the CUDA that the driver supports; 13000 is
// 13.0, and 0 means no driver. Python's loader compares them. Neither call initialises a GPU.
extern "C" __attribute__((visibility("default"))) void ghost_ops_cuda_versions(int* runtime,
                                                                               int* driver) {
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}
#endif

GHOST_REGISTER_CUDA(m) {
  m.impl("ghost_update_running_", TORCH_BOX(&ghost::ghost_update_running_));
}
