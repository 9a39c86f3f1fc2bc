// Tensors of the operators: layout, dtype, allocation. LibTorch Stable ABI only.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/problem.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ghost {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As in PyTorch, the strides of dimensions of size 1 do not count.
inline bool is_dense(const Tensor& t, Layout layout) {
  static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (int d : kOrder[int(layout)]) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  return DType::kFloat32;
}

inline ScalarType compute_type(DType t) {
  return t == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The memory of a batch norm's counter of batches.
inline int64_t* counter_of(const Tensor& batches) {
  STD_TORCH_CHECK(batches.numel() == 1 && batches.scalar_type() == ScalarType::Long,
                  "the counter of batches must be one int64");
  return static_cast<int64_t*>(Tensor(batches).mutable_data_ptr());
}

inline MemoryFormat memory_format(Layout layout) {
  return layout == Layout::kNHWC ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// glibc maps blocks of at least this size anew at every allocation (its largest mmap threshold).
// The page faults then take longer than writing the block. With huge pages, if the kernel allows
// them on demand, they take a quarter of that time.
inline constexpr size_t kFreshBytes = size_t{32} << 20;
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage,
                  end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

// Dense and uninitialised, on the CPU. Calls the C function directly, because the dispatcher costs
// too much: an operator that takes 5 us in all allocates several tensors.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type,
                    Layout layout = Layout::kNCHW) {
  static constexpr size_t kNHWC[4] = {1, 3, 2, 0};
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = 0; k < sizes.size(); ++k) {
    const bool channels_last = layout == Layout::kNHWC && sizes.size() == 4;
    const size_t d = channels_last ? kNHWC[k] : sizes.size() - 1 - k;
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                  strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  Tensor t(made);
  const size_t bytes = size_t(stride) * t.element_size();
  if (bytes >= kFreshBytes) prefer_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

// A small tensor of parameters in the compute type: the tensor itself if it has this type and is
// contiguous, else a converted copy.
class Param {
  std::optional<Tensor> tensor_;

 public:
  Param() = default;
  Param(const std::optional<Tensor>& t, DType dtype, int64_t numel, const char* name) {
    if (t.has_value()) init(*t, dtype, numel, name);
  }
  Param(const Tensor& t, DType dtype, int64_t numel, const char* name) {
    init(t, dtype, numel, name);
  }

  const void* data() const { return tensor_ ? tensor_->const_data_ptr() : nullptr; }
  template <class A>
  const A* as() const {
    return static_cast<const A*>(data());
  }

 private:
  void init(const Tensor& t, DType dtype, int64_t numel, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU, as x is");
    STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
    dtype_of(t, name);
    tensor_ =
        t.scalar_type() == compute_type(dtype) ? t : torch::stable::to(t, compute_type(dtype));
    if (!tensor_->is_contiguous()) tensor_ = torch::stable::contiguous(*tensor_);
  }
};

}  // namespace ghost
