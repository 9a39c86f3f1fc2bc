// Registers the CUDA kernels with torch, through the LibTorch Stable ABI. The schemas are defined
// in Python (ghost_ops/ops.py); an operator without a kernel here keeps its composite
// implementation.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "cuda/update_running.h"

namespace ghost {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_per_channel(const Tensor& tensor, const char* name, int64_t channels, ScalarType type,
                       int32_t device_index) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device_index, name,
                  " must be on the CUDA device of running_mean");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == channels, name, " must have shape [",
                  channels, "], the one of running_mean");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype: running_mean and ",
                  "running_var must share one, and so must mean and var");
}

cuda::Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return cuda::Storage::kFloat32;
    case ScalarType::Double:
      return cuda::Storage::kFloat64;
    case ScalarType::Half:
      return cuda::Storage::kFloat16;
    case ScalarType::BFloat16:
      return cuda::Storage::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "running_mean must be float32, float64, float16 or bfloat16");
  }
}

void ghost_update_running_(Tensor running_mean, Tensor running_var, const Tensor& mean,
                           const Tensor& var, double momentum, int64_t count) {
  STD_TORCH_CHECK(running_mean.is_cuda() && running_mean.dim() == 1,
                  "running_mean must be a CUDA tensor with one dimension");
  const int64_t channels = running_mean.size(0);
  const int32_t device = running_mean.get_device_index();
  const ScalarType running_type = running_mean.scalar_type();
  const cuda::Storage storage = storage_of(running_type);
  const bool is_double = running_type == ScalarType::Double;
  const ScalarType stat_type = is_double ? ScalarType::Double : ScalarType::Float;
  check_per_channel(running_mean, "running_mean", channels, running_type, device);
  check_per_channel(running_var, "running_var", channels, running_type, device);
  check_per_channel(mean, "mean", channels, stat_type, device);
  check_per_channel(var, "var", channels, stat_type, device);

  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_CUDA_CHECK(cuda::launch_update_running(
      running_mean.mutable_data_ptr(), running_var.mutable_data_ptr(), mean.const_data_ptr(),
      var.const_data_ptr(), storage, is_double, channels, momentum, count, current_stream(device)));
}

}  // namespace
}  // namespace ghost

STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CUDA, m) {
  m.impl("ghost_update_running_", TORCH_BOX(&ghost::ghost_update_running_));
}
