// Shared by the CUDA operators: checks, allocation, device, stream and architecture, on the
// LibTorch Stable ABI only. With GHOST_OPS_EMULATOR the same operators are registered for CPU
// tensors, as ghost_emu, and run on the block emulator.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <array>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <optional>
#include <vector>

#include "core/cuda_plan.h"
#include "cuda/forward.h"
#include "cuda/params.h"
#include "torch/checks.h"

#ifdef GHOST_OPS_EMULATOR
#define GHOST_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(ghost_emu, CPU, m)
#else
#define GHOST_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CUDA, m)
#endif

namespace ghost {

// Raises unless t and like are on the same CUDA device.
inline void check_device(const Tensor& t, const Tensor& like, const char* name) {
#ifdef GHOST_OPS_EMULATOR
  STD_TORCH_CHECK(t.is_cpu() && like.is_cpu(), name, " must be on the CPU");
#else
  STD_TORCH_CHECK(t.is_cuda(), name, " must be on a CUDA device");
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), name,
                  " is on cuda:", t.get_device_index(),
                  ", the first argument on cuda:", like.get_device_index());
#endif
}

inline void check_launch(cudaError_t status, const char* name) {
  STD_TORCH_CHECK(status == cudaSuccess, name,
                  ": the kernel was not launched: ", cudaGetErrorString(status));
}

// Makes the device of a tensor current as long as the scope exists. stream: the device's current
// stream; arch: the device's figures for the plan.
class DeviceScope {
 public:
#ifdef GHOST_OPS_EMULATOR
  explicit DeviceScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  CudaArch arch() const {
    int device = 0;
    check_launch(cudaGetDevice(&device), "cudaGetDevice");
    return query(device);
  }
#else
  explicit DeviceScope(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  CudaArch arch() const {
    static std::mutex mutex;
    static std::vector<std::optional<CudaArch>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    if (known.size() <= size_t(index_)) known.resize(size_t(index_) + 1);
    std::optional<CudaArch>& arch = known[size_t(index_)];
    if (!arch) arch = query(index_);
    return *arch;
  }
#endif

 private:
  static CudaArch query(int32_t device) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check_launch(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
      return value;
    };
    const int sm = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                   attribute(cudaDevAttrComputeCapabilityMinor);
    STD_TORCH_CHECK(sm >= 80, "ghost_ops has CUDA kernels for compute capability 8.0 and newer, ",
                    "this device has ", sm / 10, ".", sm % 10);
    return cuda_arch(sm, attribute(cudaDevAttrMultiProcessorCount),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  }

#ifndef GHOST_OPS_EMULATOR
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline Tensor empty_like_device(const Tensor& like, std::vector<int64_t> sizes, ScalarType type,
                                Layout layout = Layout::kNCHW) {
  std::optional<torch::stable::Device> device;
  if (like.is_cuda())
    device = torch::stable::Device(torch::headeronly::DeviceType::CUDA, like.get_device_index());
  return torch::stable::empty(sizes, type, std::nullopt, device, std::nullopt,
                              sizes.size() == 4 ? memory_format(layout) : MemoryFormat::Contiguous);
}

// Batch, channels, sizes, layout and dtype of x.
inline Problem problem_of(const Tensor& x) {
  check_device(x, x, "x");
  const Layout layout = dense_layout(x, "x");
  Problem p;
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.layout = layout;
  p.dtype = dtype_of(x, "x");
  return p;
}

// The kernels count pixels of a map, and channels, in 32 bits; everything else in 64.
inline void check_sizes(const Problem& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 8;
  STD_TORCH_CHECK(p.channels >= 1, "x must have at least one channel");
  STD_TORCH_CHECK(
      p.height * p.width <= kMost && p.channels <= kMost && p.intrinsic * p.ratio <= kMost,
      "x is too large: a map may have ", kMost, " pixels, and the module as many ", "channels");
}

// Sets p.aligned: a view with a storage offset may start at any element. w1 may be null.
inline void set_aligned(Problem& p, const void* x, const void* w1) {
  p.aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(w1) % 16 == 0;
}

// Primary weights [m, C, 1, 1] of x's dtype.
inline void check_primary(const Tensor& w1, const Tensor& x, const Problem& p) {
  check_device(w1, x, "w1");
  STD_TORCH_CHECK(w1.dim() == 4 && w1.size(0) > 0 && w1.size(1) == p.channels && w1.size(2) == 1 &&
                      w1.size(3) == 1,
                  "w1 must be [m, ", p.channels, ", 1, 1]");
  STD_TORCH_CHECK(dtype_of(w1, "w1") == p.dtype, "w1 must have the dtype of x");
}

// Cheap weights [g, 1, d, d] of x's dtype; sets ratio and dw_size.
inline void set_cheap(Problem& p, const Tensor& w2, const Tensor& x) {
  check_device(w2, x, "w2");
  STD_TORCH_CHECK(w2.dim() == 4 && w2.size(1) == 1 && w2.size(2) == w2.size(3),
                  "w2 must be [g, 1, d, d]");
  STD_TORCH_CHECK(dtype_of(w2, "w2") == p.dtype, "w2 must have the dtype of x");
  STD_TORCH_CHECK(p.intrinsic > 0 && w2.size(0) % p.intrinsic == 0, "w2 must have a multiple of ",
                  p.intrinsic, " output channels, got ", w2.size(0));
  check_dw_size(w2.size(3));
  p.ratio = w2.size(0) / p.intrinsic + 1;
  p.dw_size = w2.size(3);
}

// A per-channel vector [size] for the kernels: contiguous, of any floating dtype.
inline cuda::ParamRef param(const OptionalTensor& t, int64_t size, const Tensor& like,
                            const char* name) {
  if (!t.has_value()) return {};
  check_device(*t, like, name);
  STD_TORCH_CHECK(t->numel() == size, name, " must have ", size, " elements, got ", t->numel());
  STD_TORCH_CHECK(t->is_contiguous(), name, " must be contiguous");
  return {t->const_data_ptr(), dtype_of(*t, name)};
}

// A batch norm with given parameters and statistics.
inline cuda::NormArgs given(const OptionalTensor& gamma, const OptionalTensor& beta,
                            const OptionalTensor& mean, const OptionalTensor& var, double eps,
                            int64_t size, const Tensor& like, const char* const (&names)[4]) {
  cuda::NormArgs n;
  n.source = cuda::NormSource::kGiven;
  n.gamma = param(gamma, size, like, names[0]);
  n.beta = param(beta, size, like, names[1]);
  n.mean = param(mean, size, like, names[2]);
  n.var = param(var, size, like, names[3]);
  n.eps = eps;
  return n;
}

// The slopes [size] of a PReLU; raises if slopes are missing for one, or given for another act.
inline cuda::ParamRef slopes_of(const Activation& act, const OptionalTensor& slopes, int64_t size,
                                const Tensor& like, const char* name) {
  STD_TORCH_CHECK((act.act == Act::kPReLU) == slopes.has_value(), name,
                  " must be given for a PReLU, and only for one");
  return param(slopes, size, like, name);
}

inline DType compute_dtype_of(const Problem& p) {
  return p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Whether products may use TF32: for float32 torch's switch for convolutions, which is read through
// Python; true for the other dtypes, which do not depend on it.
inline bool allow_tf32(const Problem& p) {
  if (p.dtype != DType::kFloat32) return true;
  std::array<StableIValue, 1> stack{};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("ghost_ops::_allow_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

}  // namespace ghost
