// Training with one norm behind the concatenation, on the CPU: checks, allocation and calls of
// kernels. No arithmetic. Schemas: ghost_ops/ops/tail.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "torch/cpu_common.h"

namespace ghost {
namespace {

// The arguments of both directions; `args` points into the members' tensors.
struct Tail {
  Tail(const Tensor& y, const Tensor& w2, const OptionalTensor& gamma, const OptionalTensor& beta,
       const OptionalTensor& mean, const OptionalTensor& var, double eps,
       const OptionalTensor& residual, int64_t out_channels, int64_t act, double slope)
      : image(image_of(y, "y")),
        norm_("", image.dtype, out_channels, eps, gamma, beta, mean, var),
        taps_(w2, image.dtype, w2.numel(), "w2") {
    Problem& p = args.problem;
    p = problem_of(image);
    const int64_t m = image.c;
    STD_TORCH_CHECK(w2.dim() == 4 && w2.size(1) == 1 && w2.size(2) == w2.size(3) && m > 0 &&
                        w2.size(0) % m == 0 && w2.scalar_type() == y.scalar_type(),
                    "w2 must be [g, 1, d, d] of the dtype of y, g a multiple of ", m);
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must both be given");
    const int64_t ratio = w2.size(0) / m + 1;
    set_apply(p, m, out_channels, ratio, w2.size(3), 1, 0, 0.0, act, slope, false);
    activation(act, slope, "act");
    if (residual) residual_ = set_residual(p, *residual, y.scalar_type());
    args.y = y.const_data_ptr();
    args.w2 = taps_.data();
    args.norm = norm_.args();
    args.residual = residual ? residual_.const_data_ptr() : nullptr;
  }

  Tensor map(int64_t channels, ScalarType type) const {
    return empty({image.n, channels, image.h, image.w}, type, image.layout);
  }

  // NHWC: memory for the sums of the items.
  Tensor partial_sums(int64_t size) {
    const int64_t items = TailItems(args.problem).count;
    Tensor sums = empty({items, size}, ScalarType::Double);
    args.partial = static_cast<double*>(sums.mutable_data_ptr());
    return sums;
  }
  // NHWC.
  void pass(TailStep step) const {
    const auto kernel = active_isa().tail.lanes[int(image.dtype)];
    parallel(TailItems(args.problem).count,
             [&](int64_t b, int64_t e) { kernel(args, step, b, e); });
  }
  void pass(TailStep step, TailStep merge) const {
    pass(step);
    active_isa().tail.lanes[int(image.dtype)](args, merge, 0, 1);
  }

  Image image;
  TailArgs args{};

 private:
  NormParams norm_;
  Param taps_;
  Tensor residual_;
};

std::tuple<Tensor, Tensor, Tensor> ghost_tail_forward(
    const Tensor& y, const Tensor& w2, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& mean, const OptionalTensor& var, double eps,
    const OptionalTensor& residual, int64_t out_channels, int64_t act, double slope) {
  Tail tail(y, w2, gamma, beta, mean, var, eps, residual, out_channels, act, slope);
  TailArgs& args = tail.args;
  args.batch_stats = !mean.has_value();
  const DType dtype = tail.image.dtype;
  const int64_t stats = args.batch_stats ? out_channels : 0;
  Tensor out = tail.map(out_channels, y.scalar_type());
  Tensor batch_mean = empty({stats}, compute_type(dtype)),
         batch_var = empty({stats}, compute_type(dtype));
  args.out = out.mutable_data_ptr();
  args.mean = batch_mean.mutable_data_ptr();
  args.var = batch_var.mutable_data_ptr();
  if (tail.image.layout == Layout::kNCHW) {
    run(active_isa().tail.forward[int(dtype)], args, channel_items(args.problem));
    return {out, batch_mean, batch_var};
  }
  const Tensor partial = tail.partial_sums(2 * out_channels);
  if (args.batch_stats) {
    tail.pass(TailStep::kMoments, TailStep::kMergeMoments);
    args.norm.mean = args.mean;
    args.norm.var = args.var;
  }
  tail.pass(TailStep::kForward);
  return {out, batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ghost_tail_backward(
    const Tensor& grad_out, const Tensor& y, const Tensor& w2, const OptionalTensor& gamma,
    const OptionalTensor& beta, const Tensor& mean, const Tensor& var, double eps,
    const OptionalTensor& residual, int64_t act, double slope, bool batch_stats, bool need_dy,
    bool need_dresidual) {
  STD_TORCH_CHECK(grad_out.dim() == 4, "grad_out must be 4-D");
  const int64_t out_channels = grad_out.size(1);
  Tail tail(y, w2, gamma, beta, mean, var, eps, residual, out_channels, act, slope);
  TailArgs& args = tail.args;
  const Image& image = tail.image;
  STD_TORCH_CHECK(grad_out.size(0) == image.n && grad_out.size(2) == image.h &&
                      grad_out.size(3) == image.w && grad_out.scalar_type() == y.scalar_type(),
                  "grad_out must be [", image.n, ", oup, ", image.h, ", ", image.w,
                  "] of the dtype of y");
  const ScalarType ct = compute_type(image.dtype), type = y.scalar_type();
  const Tensor grad = in_layout(grad_out, image.layout);
  Tensor dy = need_dy ? tail.map(image.c, type) : empty({0}, type);
  Tensor dresidual = need_dresidual ? tail.map(out_channels, type) : empty({0}, type);
  Tensor dw2 = empty({w2.size(0), 1, w2.size(2), w2.size(3)}, ct),
         dgamma = empty({out_channels}, ct), dbeta = empty({out_channels}, ct);
  args.batch_stats = batch_stats;
  args.grad_out = grad.const_data_ptr();
  args.dy = data_if(need_dy, dy);
  args.dresidual = data_if(need_dresidual, dresidual);
  args.dw2 = dw2.mutable_data_ptr();
  args.dgamma = dgamma.mutable_data_ptr();
  args.dbeta = dbeta.mutable_data_ptr();
  if (image.layout == Layout::kNCHW) {
    run(active_isa().tail.backward[int(image.dtype)], args, channel_items(args.problem));
  } else {
    const Tensor partial = tail.partial_sums(std::max(2 * out_channels, dw2.numel()));
    tail.pass(TailStep::kGradSums, TailStep::kMergeGradSums);
    tail.pass(TailStep::kGrads, TailStep::kMergeGrads);
  }
  if (type != ct) dw2 = torch::stable::to(dw2, type);
  return {dy, dw2, dgamma, dbeta, dresidual};
}

}  // namespace
}  // namespace ghost

STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CPU, m) {
  m.impl("ghost_tail_forward", TORCH_BOX(&ghost::ghost_tail_forward));
  m.impl("ghost_tail_backward", TORCH_BOX(&ghost::ghost_tail_backward));
}
