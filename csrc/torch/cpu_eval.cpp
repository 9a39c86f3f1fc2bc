// The operators of inference on the CPU: checks, allocation and calls of kernels. No arithmetic.
// Schemas: ghost_ops/ops.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "cpu/pack.h"
#include "torch/cpu_common.h"
#include "torch/cpu_layers.h"

namespace ghost {
namespace {

Tensor ghost_pack(const OptionalTensor& w1, const OptionalTensor& gamma1,
                  const OptionalTensor& beta1, const OptionalTensor& mean1,
                  const OptionalTensor& var1, double eps1, const Tensor& w2,
                  const OptionalTensor& gamma2, const OptionalTensor& beta2,
                  const OptionalTensor& mean2, const OptionalTensor& var2, double eps2,
                  const OptionalTensor& prelu1, const OptionalTensor& prelu2) {
  const DType dtype = dtype_of(w2, "w2");
  STD_TORCH_CHECK(w2.dim() == 4, "w2 must be [g, 1, d, d], got ", w2.dim(), "-D");
  int64_t m = -1;
  if (w1.has_value()) {
    m = w1->size(0);
  } else {
    for (const OptionalTensor* t : {&gamma1, &beta1, &mean1, &var1})
      if (t->has_value()) m = (*t)->numel();
  }
  STD_TORCH_CHECK(m >= 0,
                  "without w1 one of gamma1, beta1, mean1, var1 must tell the number of channels");
  const int64_t C = w1.has_value() ? w1->size(1) : 0, g = w2.size(0), d = w2.size(3);
  PackedLayout at(C, m, g, d, w1.has_value());
  const bool pairs = w1.has_value() && dtype_of(*w1, "w1") == DType::kBFloat16 &&
                     dtype != DType::kFloat64 && C % 2 == 0 && active_isa().amx;
  if (pairs) at.add_pairs(C, m);
  const NormParams norm1("1", dtype, m, eps1, gamma1, beta1, mean1, var1, prelu1),
      norm2("2", dtype, g, eps2, gamma2, beta2, mean2, var2, prelu2);
  const Param primary(w1, dtype, m * C, "w1"), cheap(w2, dtype, g * d * d, "w2");
  const int64_t slopes = (prelu1 ? m : 0) + (prelu2 ? g : 0);
  Tensor packed = empty({at.numel + slopes}, compute_type(dtype));
  const PackArgs args{primary.data(), cheap.data(), norm1.args(), norm2.args(), C, m, g, d * d};
  with_dtype(dtype, [&](auto zero) {
    pack_ghost(args, at, static_cast<decltype(zero)*>(packed.mutable_data_ptr()));
  });
  return packed;
}

// The new output, in the problem's layout. args: the parameters.
Tensor run_apply(const Problem& p, const Tensor& x, ApplyArgs& args) {
  Tensor out =
      empty({p.batch, p.out_channels, p.out_height(), p.out_width()}, x.scalar_type(), p.layout);
  args.problem = p;
  run_apply(active_isa().ghost.apply[int(p.dtype)], args, source_of(x), target_of(out, p.layout));
  return out;
}

Tensor ghost_apply(const Tensor& x, const Tensor& packed, const OptionalTensor& residual,
                   const OptionalTensor& gate, int64_t intrinsic, int64_t out_channels,
                   int64_t ratio, int64_t dw_size, int64_t stride, int64_t act1, double slope1,
                   int64_t act2, double slope2, bool has_primary) {
  const Image in = image_of(x, "x");
  Problem p = problem_of(in);
  set_apply(p, intrinsic, out_channels, ratio, dw_size, stride, act1, slope1, act2, slope2,
            has_primary);
  const int64_t slopes1 = p.act1.act == Act::kPReLU ? intrinsic : 0,
                slopes2 = p.act2.act == Act::kPReLU ? p.ghosts() : 0;
  const PackedLayout at = layout_of_packed(p, packed, slopes1 + slopes2);
  Tensor res, factor;
  if (residual) res = set_residual(p, *residual, x.scalar_type());
  if (gate) {
    STD_TORCH_CHECK(gate->is_cpu(), "gate must be on the CPU, as x is");
    factor = set_gate(p, *gate, x.scalar_type());
  }
  p.allows_channel_lanes = !gate && slopes1 == 0 && slopes2 == 0;
  ApplyArgs args;
  args.packed = packed.const_data_ptr();
  const char* slopes = static_cast<const char*>(args.packed) + at.numel * compute_size(in.dtype);
  if (slopes1 > 0) args.slopes1 = slopes;
  if (slopes2 > 0) args.slopes2 = slopes + slopes1 * compute_size(in.dtype);
  args.residual = residual ? res.const_data_ptr() : nullptr;
  args.gate = gate ? factor.const_data_ptr() : nullptr;
  return run_apply(p, x, args);
}

Tensor ghost_conv_apply(const Tensor& x, const Tensor& packed, const OptionalTensor& residual,
                        int64_t kernel_size, int64_t padding, bool tail, int64_t intrinsic,
                        int64_t out_channels, int64_t ratio, int64_t dw_size, int64_t stride,
                        int64_t act1, double slope1, int64_t act2, double slope2) {
  const Image in = image_of(x, "x");
  Problem p = problem_of(in);
  set_apply(p, intrinsic, out_channels, ratio, dw_size, stride, act1, slope1, act2, slope2, true);
  STD_TORCH_CHECK(kernel_size >= 1 && padding >= 0,
                  "kernel_size must be positive and padding not negative, got ", kernel_size,
                  " and ", padding);
  STD_TORCH_CHECK(p.act1.act != Act::kPReLU && p.act2.act != Act::kPReLU,
                  "ghost_conv_apply has no PReLU");
  STD_TORCH_CHECK(!tail || p.act1.act == Act::kNone, "with tail act1 must be none");
  p.kernel = kernel_size;
  p.padding = padding;
  p.has_tail = tail;
  STD_TORCH_CHECK(p.out_pixels() > 0, "x of ", in.h, " x ", in.w, " pixels with padding ", padding,
                  " is smaller than the kernel of ", kernel_size);
  layout_of_packed(p, packed, tail ? 2 * intrinsic : 0);
  Tensor res;
  if (residual) res = set_residual(p, *residual, x.scalar_type());
  p.allows_channel_lanes = true;
  ApplyArgs args;
  args.packed = packed.const_data_ptr();
  args.residual = residual ? res.const_data_ptr() : nullptr;
  return run_apply(p, x, args);
}

// The mean over the pixels of a 1x1 convolution with its batch norm and activation, [N, channels].
Tensor ghost_apply_pooled(const Tensor& x, const Tensor& packed, int64_t channels, int64_t act,
                          double slope) {
  const Tensor y =
      ghost_apply(x, packed, {}, {}, channels, channels, 1, 1, 1, act, slope, 0, 0.0, true);
  const Tensor means = pixel_means(y);
  return torch::stable::view(torch::stable::transpose(means, 1, 3), {y.size(0), channels});
}

// ---------------------------------------------------------------- programs
//
// Several operators in one call. If Python and the dispatcher ran between the layers of a network,
// each layer would evict their code from the caches.
//
// A program is a row of numbers. An instruction is its code, the count of the numbers that follow,
// the count of values released after it, these values, and the operands:
//   ghost       x, residual, packed, slope1, slope2, kernel_size, padding, tail, intrinsic,
//               out_channels, ratio, dw_size, stride, act1, act2, has_primary; kernel_size 0 is
//               ghost_apply, else ghost_conv_apply
//   depthwise   x, weight, the same weight with its taps first, shift, kernel_size, stride, act,
//               slope
//   excite      x, the first of four tensors, act, slope, gate; in place
//   sum         x, other, act, slope, in_place: act(x + other), or act(x) without other
//   concat      values
//   mean        x; the images become pixels, [1, C, 1, N] in channels_last
//   nhwc        x; x in channels_last
//   rows        x [1, C, 1, N] in channels_last, dims; [N, C] or [N, C, 1, 1]
// x, residual and other are values: value 0 is the input, value k the result of instruction k.
// Tensors are numbered by their places in `tensors`. -1 is none. Slopes are the bits of a double.

enum class Code : int64_t { kGhost, kDepthwise, kExcite, kSum, kConcat, kMean, kNHWC, kRows };
// Operands of an instruction; concat: at least one.
constexpr int64_t kLength[] = {16, 8, 5, 5, 1, 1, 1, 2};

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

  // The result of an instruction with n operands.
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
  m.impl("ghost_pack", TORCH_BOX(&ghost::ghost_pack));
  m.impl("ghost_apply", TORCH_BOX(&ghost::ghost_apply));
  m.impl("ghost_conv_apply", TORCH_BOX(&ghost::ghost_conv_apply));
  m.impl("ghost_apply_pooled", TORCH_BOX(&ghost::ghost_apply_pooled));
  m.impl("run_program", TORCH_BOX(&ghost::run_program));
}
