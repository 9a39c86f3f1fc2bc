// Several operators as one. Python and the dispatcher do not run between the layers of a network:
// each layer evicts their code from the caches.
//
// A program is a row of numbers. An instruction is its code, how many numbers follow, how many
// values are released after it, these values, and
//   ghost       x, residual, packed, slope1, slope2, kernel_size, padding, tail, intrinsic,
//               out_channels, ratio, dw_size, stride, act1, act2, has_primary; kernel_size 0 is
//               ghost_apply, else ghost_conv_apply
//   depthwise   x, weight, the same weight with its taps first, shift, kernel_size, stride, act,
//               slope
//   excite      x, four tensors from the first on, act, slope, gate; in place
//   sum         x, other, act, slope, in_place: act(x + other), or act(x) without other
//   concat      values
//   mean        x; the images become pixels, [1, C, 1, N] in channels_last
//   nhwc        x; the same in channels_last
//   rows        x [1, C, 1, N] in channels_last, dims; [N, C] or [N, C, 1, 1]
// x and residual are values: 0 is the input, k the result of instruction k. Tensors are numbered as
// they are given; -1 is none; slopes are the bits of a double.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "cpu/copies.h"
#include "torch/cpu_common.h"
#include "torch/cpu_operators.h"

namespace ghost {
namespace {

enum class Code : int64_t { kGhost, kDepthwise, kExcite, kSum, kConcat, kMean, kNHWC, kRows };
// Numbers behind the released values; concat: one at least.
constexpr int64_t kLength[] = {16, 8, 5, 5, 1, 1, 1, 2};

double real(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// x in channels_last. For images of three channels several times as fast as the library's copy.
Tensor channels_last(const Tensor& x) {
  const int64_t N = x.size(0), C = x.size(1), pixels = x.size(2) * x.size(3);
  const int64_t size = element_size(dtype_of(x, "x"));
  if (C != 3 || layout_of(x, "x") == Layout::kNHWC || size > 4) return in_layout(x, Layout::kNHWC);
  Tensor out = empty({N, C, x.size(2), x.size(3)}, x.scalar_type(), Layout::kNHWC);
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  parallel(N, [&](int64_t b, int64_t e) {
    for (int64_t n = b; n < e; ++n) {
      const int64_t at = n * C * pixels * size;
      if (size == 4)
        planes_to_pixels<3>(reinterpret_cast<const uint32_t*>(from + at),
                            reinterpret_cast<uint32_t*>(to + at), pixels);
      else
        planes_to_pixels<3>(reinterpret_cast<const uint16_t*>(from + at),
                            reinterpret_cast<uint16_t*>(to + at), pixels);
    }
  });
  return out;
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
  OptionalTensor optional(int64_t i) const {
    return i < 0 ? OptionalTensor() : OptionalTensor(value(i));
  }

  Tensor ghost(const int64_t* a) const {
    const OptionalTensor residual = optional(a[1]);
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
  Tensor rows(const Tensor& x, int64_t dims) const {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == 1 && x.size(2) == 1, "program: no rows");
    const Tensor t = torch::stable::transpose(x, 1, 3);
    if (dims == 2) return torch::stable::view(t, {x.size(3), x.size(1)});
    return torch::stable::view(t, {x.size(3), x.size(1), 1, 1});
  }

  // The result of an instruction of n numbers.
  Tensor result(Code code, const int64_t* a, int64_t n) const {
    switch (code) {
      case Code::kGhost:
        return ghost(a);
      case Code::kDepthwise:
        return depthwise(a);
      case Code::kExcite:
        squeeze_excite_(value(a[0]), tensor(a[1]), tensor(a[1] + 1), tensor(a[1] + 2),
                        tensor(a[1] + 3), a[2], real(a[3]), a[4]);
        return value(a[0]);
      case Code::kSum:
        return sum(value(a[0]), optional(a[1]), activation(a[2], real(a[3]), "act"), a[4] != 0);
      case Code::kConcat: {
        std::vector<Tensor> parts;
        for (int64_t i = 0; i < n; ++i) parts.push_back(value(a[i]));
        return concat(parts);
      }
      case Code::kMean:
        return pixel_means(value(a[0]));
      case Code::kNHWC:
        return channels_last(value(a[0]));
      case Code::kRows:
        return rows(value(a[0]), a[1]);
    }
    STD_TORCH_CHECK(false, "program: not an instruction");
  }

 public:
  Program(const Tensor& x, const std::vector<Tensor>& tensors) : tensors_(tensors) {
    values_.emplace_back(x);
  }

  Tensor run(const int64_t* code, int64_t length) {
    for (const int64_t *at = code, *end = code + length; at < end;) {
      const auto known = int64_t(std::size(kLength));
      STD_TORCH_CHECK(
          at[0] >= 0 && at[0] < known && at + 3 <= end && at + 2 + at[1] <= end && at[2] >= 0,
          "program: not an instruction");
      const int64_t *const released = at + 3, *const a = released + at[2];
      const int64_t n = at[1] - 1 - at[2];
      STD_TORCH_CHECK(n >= kLength[at[0]], "program: not an instruction");
      values_.emplace_back(result(Code(at[0]), a, n));
      for (const int64_t* r = released; r < a; ++r) {
        value(*r);
        values_[size_t(*r)].reset();
      }
      at += 2 + at[1];
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
