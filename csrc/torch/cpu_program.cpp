// Several operators as one. Python and the dispatcher do not run between the layers of a block:
// each layer evicts their code from the caches.
//
// A program is a row of numbers, instruction after instruction: code, then
//   ghost       x, residual, packed, slope1, slope2, kernel_size, padding, tail, intrinsic,
//               out_channels, ratio, dw_size, stride, act1, act2, has_primary; kernel_size 0 is
//               ghost_apply, else ghost_conv_apply
//   depthwise   x, weight, the same weight with its taps first, shift, kernel_size, stride, act,
//               slope
//   excite      x, four tensors from the first on, act, slope, gate; in place
// x and residual are values: 0 is the input, k the result of instruction k. Tensors are numbered as
// they are given; -1 is none; slopes are the bits of a double. The last two numbers of an
// instruction are values that are released after it, or -1.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "torch/cpu_common.h"
#include "torch/cpu_operators.h"

namespace ghost {
namespace {

enum class Code : int64_t { kGhost, kDepthwise, kExcite };
constexpr int64_t kLength[] = {18, 10, 7};  // of the instructions, without the code

double real(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

class Program {
  const std::vector<Tensor>& tensors_;
  std::vector<OptionalTensor> values_;

  const Tensor& tensor(int64_t i) const {
    STD_TORCH_CHECK(i >= 0 && i < int64_t(tensors_.size()), "program: no tensor ", i);
    return tensors_[size_t(i)];
  }
  const Tensor& value(int64_t i) const {
    STD_TORCH_CHECK(i >= 0 && i < int64_t(values_.size()) && values_[size_t(i)].has_value(),
                    "program: no value ", i);
    return *values_[size_t(i)];
  }

  Tensor ghost(const int64_t* a) const {
    const OptionalTensor residual = a[1] < 0 ? OptionalTensor() : OptionalTensor(value(a[1]));
    const double slope1 = real(a[3]), slope2 = real(a[4]);
    if (a[5] == 0)
      return ghost_apply(value(a[0]), tensor(a[2]), residual, {}, a[8], a[9], a[10], a[11], a[12],
                         a[13], slope1, a[14], slope2, a[15] != 0);
    return ghost_conv_apply(value(a[0]), tensor(a[2]), residual, a[5], a[6], a[7] != 0, a[8], a[9],
                            a[10], a[11], a[12], a[13], slope1, a[14], slope2);
  }
  Tensor depthwise(const int64_t* a) const {
    const Tensor& x = value(a[0]);
    const bool nchw = layout_of(x, "x") == Layout::kNCHW;
    return depthwise_conv(x, tensor(nchw ? a[1] : a[2]), tensor(a[3]), a[4], a[5], a[6],
                          real(a[7]));
  }

 public:
  Program(const Tensor& x, const std::vector<Tensor>& tensors) : tensors_(tensors) {
    values_.emplace_back(x);
  }

  Tensor run(const int64_t* code, int64_t length) {
    for (const int64_t *at = code, *end = code + length; at < end;) {
      STD_TORCH_CHECK(*at >= 0 && *at <= 2 && at + 1 + kLength[*at] <= end,
                      "program: not an instruction");
      const int64_t* const a = at + 1;
      switch (Code(*at)) {
        case Code::kGhost:
          values_.emplace_back(ghost(a));
          break;
        case Code::kDepthwise:
          values_.emplace_back(depthwise(a));
          break;
        case Code::kExcite:
          squeeze_excite_(value(a[0]), tensor(a[1]), tensor(a[1] + 1), tensor(a[1] + 2),
                          tensor(a[1] + 3), a[2], real(a[3]), a[4]);
          values_.emplace_back(value(a[0]));
          break;
      }
      for (int64_t k = kLength[*at] - 2; k < kLength[*at]; ++k)
        if (a[k] >= 0) {
          value(a[k]);
          values_[size_t(a[k])].reset();
        }
      at += 1 + kLength[*at];
    }
    return value(int64_t(values_.size()) - 1);
  }
};

Tensor run_program(const Tensor& x, std::vector<Tensor> tensors, const Tensor& code) {
  STD_TORCH_CHECK(code.is_cpu() && code.is_contiguous() &&
                      code.scalar_type() == torch::headeronly::ScalarType::Long,
                  "code must be a contiguous int64 tensor on the CPU");
  return Program(x, tensors).run(static_cast<const int64_t*>(code.const_data_ptr()), code.numel());
}

}  // namespace
}  // namespace ghost

STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CPU, m) {
  m.impl("run_program", TORCH_BOX(&ghost::run_program));
}
