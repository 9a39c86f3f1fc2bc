// The operators of inference on the CPU: checks, allocation, the plan, and the parallel loops over
// the kernels' items. No arithmetic here. Schemas stand in ghost_ops/ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "core/plan.h"
#include "cpu/dispatch.h"
#include "cpu/pack.h"
#include "torch/cpu_common.h"
#include "torch/cpu_operators.h"

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
                     dtype != DType::kFloat64 && C % 2 == 0 && active_kernels().amx;
  if (pairs) at.add_pairs(C, m);
  const Param g1(gamma1, dtype, m, "gamma1"), b1(beta1, dtype, m, "beta1"),
      m1(mean1, dtype, m, "mean1"), v1(var1, dtype, m, "var1"), g2(gamma2, dtype, g, "gamma2"),
      b2(beta2, dtype, g, "beta2"), m2(mean2, dtype, g, "mean2"), v2(var2, dtype, g, "var2"),
      cheap(w2, dtype, g * d * d, "w2");
  const Param primary = w1.has_value() ? Param(*w1, dtype, m * C, "w1") : Param();
  const Param slopes1(prelu1, dtype, m, "prelu1"), slopes2(prelu2, dtype, g, "prelu2");
  const int64_t slopes = (prelu1 ? m : 0) + (prelu2 ? g : 0);
  Tensor packed = empty({at.numel + slopes}, compute_type(dtype));
  with_dtype(dtype, [&](auto zero) {
    using A = decltype(zero);
    A* p = static_cast<A*>(packed.mutable_data_ptr());
    const size_t nm = static_cast<size_t>(m), ng = static_cast<size_t>(g);
    std::vector<A> scale1(nm), shift1(nm), scale2(ng), shift2(ng);
    fold_norm(g1.as<A>(), b1.as<A>(), m1.as<A>(), v1.as<A>(), eps1, m, scale1.data(),
              shift1.data());
    fold_norm(g2.as<A>(), b2.as<A>(), m2.as<A>(), v2.as<A>(), eps2, g, scale2.data(),
              shift2.data());
    if (w1.has_value()) {
      pack_panels<A>(primary.as<A>(), m, C, C, 1, scale1.data(), p + at.w1);
      std::fill(p + at.shift1, p + at.w2, A(0));
    } else {
      std::copy(scale1.begin(), scale1.end(), p + at.scale1);
    }
    std::copy(shift1.begin(), shift1.end(), p + at.shift1);
    scale_taps(cheap.as<A>(), g, d * d, scale2.data(), p + at.w2);
    transpose_taps(p + at.w2, g, d * d, p + at.lane_taps);
    std::copy(shift2.begin(), shift2.end(), p + at.shift2);
    if constexpr (std::is_same_v<A, float>) {
      if (pairs) {
        std::fill(p + at.lane_taps + g * d * d, p + at.pairs, A(0));
        pack_pairs(primary.as<A>(), m, C, reinterpret_cast<uint16_t*>(p + at.pairs));
        std::fill(std::copy(scale1.begin(), scale1.end(), p + at.pair_scale), p + at.numel, A(0));
      }
    }
    A* end = p + at.numel;
    if (prelu1) end = std::copy_n(slopes1.as<A>(), m, end);
    if (prelu2) std::copy_n(slopes2.as<A>(), g, end);
  });
  return packed;
}

// The kernel run over x; the output is new, in the problem's layout. args: all that is neither x,
// the output nor the plan.
Tensor run_apply(const Problem& p, const Tensor& x, ApplyArgs args) {
  const int64_t H = p.out_height(), W = p.out_width();
  Tensor out = empty({p.batch, p.out_channels, H, W}, x.scalar_type(), p.layout);
  args.problem = p;
  args.plan = plan_apply(p, cpu_machine(threads()));
  args.x = x.const_data_ptr();
  args.x_image = p.channels * p.height * p.width;
  args.x_channel = p.height * p.width;
  args.out = out.mutable_data_ptr();
  args.out_layout = p.layout;
  args.out_image = p.out_channels * H * W;
  args.out_channel = H * W;
  const auto kernel = active_kernels().apply[int(p.dtype)];
  parallel(args.plan.items, [&](int64_t b, int64_t e) { kernel(args, b, e); });
  return out;
}

}  // namespace

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

namespace {

// The mean over the pixels of a 1x1 convolution with its batch norm and activation, [N, channels].
Tensor ghost_apply_pooled(const Tensor& x, const Tensor& packed, int64_t channels, int64_t act,
                          double slope) {
  const Tensor y =
      ghost_apply(x, packed, {}, {}, channels, channels, 1, 1, 1, act, slope, 0, 0.0, true);
  const Tensor means = pixel_means(y);
  return torch::stable::view(torch::stable::transpose(means, 1, 3), {y.size(0), channels});
}

}  // namespace
}  // namespace ghost

STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CPU, m) {
  m.impl("ghost_pack", TORCH_BOX(&ghost::ghost_pack));
  m.impl("ghost_apply", TORCH_BOX(&ghost::ghost_apply));
  m.impl("ghost_conv_apply", TORCH_BOX(&ghost::ghost_conv_apply));
  m.impl("ghost_apply_pooled", TORCH_BOX(&ghost::ghost_apply_pooled));
}
