// Running statistics on CUDA. An operator without a kernel for CUDA keeps its composite
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
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype: running_mean and ",
                  "running_var must share one, and so must mean and var");
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

void ghost_update_running_(Tensor running_mean, Tensor running_var, const Tensor& mean,
                           const Tensor& var, double momentum, int64_t count) {
  STD_TORCH_CHECK(running_mean.dim() == 1, "running_mean must have one dimension");
  const int64_t channels = running_mean.size(0);
  const ScalarType running_type = running_mean.scalar_type();
  const DType dtype = dtype_of(running_mean, "running_mean");
  check_per_channel(running_mean, "running_mean", channels, running_type, running_mean);
  check_per_channel(running_var, "running_var", channels, running_type, running_mean);
  check_per_channel(mean, "mean", channels, compute_type(dtype), running_mean);
  check_per_channel(var, "var", channels, compute_type(dtype), running_mean);

  const DeviceScope scope(running_mean);
  check_launch(cuda::launch_update_running(
                   running_mean.mutable_data_ptr(), running_var.mutable_data_ptr(),
                   mean.const_data_ptr(), var.const_data_ptr(), storage_of(dtype),
                   dtype == DType::kFloat64, channels, momentum, count, scope.stream()),
               "ghost_update_running_");
}

}  // namespace
}  // namespace ghost

GHOST_REGISTER_CUDA(m) {
  m.impl("ghost_update_running_", TORCH_BOX(&ghost::ghost_update_running_));
}
