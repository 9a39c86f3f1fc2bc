// ghost_backward on CUDA: checks, allocation, the plan, and the launches. No arithmetic here. The
// schema stands in ghost_ops/ops.py, where also stands what every argument is.
#include "cuda/backward.h"

#include <tuple>

#include "torch/cuda/common.h"

namespace ghost {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients ghost_backward(const Tensor& grad_out, const Tensor& x, const OptionalTensor& u,
                         const OptionalTensor& w1, const OptionalTensor& gamma1,
                         const OptionalTensor& beta1, const Tensor& mean1, const Tensor& var1,
                         double eps1, const Tensor& w2, const OptionalTensor& gamma2,
                         const OptionalTensor& beta2, const Tensor& mean2, const Tensor& var2,
                         double eps2, int64_t stride, int64_t act1, double slope1, int64_t act2,
                         double slope2, bool batch_stats, bool need_dx, bool need_dw1) {
  Problem p = problem_of(x);
  p.has_primary = w1.has_value();
  if (p.has_primary) check_primary(*w1, x, p);
  const int64_t m = p.has_primary ? w1->size(0) : p.channels;
  p.stride = p.has_primary ? stride : 1;
  STD_TORCH_CHECK(p.stride >= 1, "stride must be positive, got ", stride);
  p.intrinsic = m;
  set_cheap(p, w2, x);
  const int64_t g = p.ghosts(), H = p.out_height(), W = p.out_width();
  const ScalarType type = x.scalar_type(), compute = compute_type(p.dtype);
  check_device(grad_out, x, "grad_out");
  STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.size(0) == p.batch && grad_out.size(2) == H &&
                      grad_out.size(3) == W && grad_out.scalar_type() == type,
                  "grad_out must be [", p.batch, ", oup, ", H, ", ", W, "] of the dtype of x");
  p.out_channels = grad_out.size(1);
  STD_TORCH_CHECK(m <= p.out_channels && p.out_channels <= m * p.ratio, "grad_out must have ", m,
                  " to ", m * p.ratio, " channels, got ", p.out_channels);
  p.act1 = activation(act1, slope1, "act1");
  p.act2 = activation(act2, slope2, "act2");
  check_sizes(p);
  constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max() - 256;
  STD_TORCH_CHECK(p.batch * H * W <= kMostPixels, "the batch is too large: it may have ",
                  kMostPixels, " output pixels, got ", p.batch * H * W);
  need_dw1 = need_dw1 && p.has_primary;

  const DeviceScope scope(x);
  Tensor dx = need_dx
                  ? empty_like_device(x, {p.batch, p.channels, p.height, p.width}, type, p.layout)
                  : empty_like_device(x, {0}, type);
  Tensor dw1 = need_dw1 ? empty_like_device(x, {m, p.channels, 1, 1}, type)
                        : empty_like_device(x, {0}, type);
  Tensor dw2 = empty_like_device(x, {g, 1, p.dw_size, p.dw_size}, type);
  Tensor dgamma1 = empty_like_device(x, {m}, compute), dbeta1 = empty_like_device(x, {m}, compute),
         dgamma2 = empty_like_device(x, {g}, compute), dbeta2 = empty_like_device(x, {g}, compute);
  cuda::BackwardArgs args;
  args.norm1 = given(gamma1, beta1, mean1, var1, eps1, m, x, {"gamma1", "beta1", "mean1", "var1"});
  args.norm2 = given(gamma2, beta2, mean2, var2, eps2, g, x, {"gamma2", "beta2", "mean2", "var2"});
  if (p.batch * H * W == 0) {
    for (Tensor* t : {&dx, &dw1, &dw2, &dgamma1, &dbeta1, &dgamma2, &dbeta2})
      torch::stable::zero_(*t);
    return {dx, dw1, dgamma1, dbeta1, dw2, dgamma2, dbeta2};
  }

  const Tensor primary = torch::stable::contiguous(w1.value_or(w2));
  const Tensor cheap = torch::stable::contiguous(w2);
  std::optional<Tensor> kept;
  if (p.has_primary && u.has_value() && u->numel() > 0) {
    check_device(*u, x, "u");
    STD_TORCH_CHECK(u->dim() == 4 && u->size(0) == p.batch && u->size(1) == m && u->size(2) == H &&
                        u->size(3) == W && u->scalar_type() == type,
                    "u must be [", p.batch, ", ", m, ", ", H, ", ", W, "] of the dtype of x");
    kept = is_dense(*u, p.layout) ? *u : torch::stable::contiguous(*u, memory_format(p.layout));
  }
  args.problem = p;
  args.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 4; ++i) args.grad_strides[i] = grad_out.stride(i);
  args.x = x.const_data_ptr();
  args.u = kept ? kept->const_data_ptr() : nullptr;
  args.w1 = p.has_primary ? primary.const_data_ptr() : nullptr;
  args.w2 = {cheap.const_data_ptr(), p.dtype};
  args.batch_stats = batch_stats;
  args.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  args.dw1 = need_dw1 ? dw1.mutable_data_ptr() : nullptr;
  args.dgamma1 = dgamma1.mutable_data_ptr();
  args.dbeta1 = dbeta1.mutable_data_ptr();
  args.dw2 = dw2.mutable_data_ptr();
  args.dgamma2 = dgamma2.mutable_data_ptr();
  args.dbeta2 = dbeta2.mutable_data_ptr();
  const void* const given_u = p.has_primary ? args.u : args.x;
  args.plan = plan_cuda_backward(
      p, scope.arch(), allow_tf32(p), given_u != nullptr, cuda::is_pixel_rows(p, given_u),
      cuda::has_wide_rows(p, args.x) && cuda::has_wide_rows(p, args.w1), need_dx, need_dw1);
  const Tensor scratch = empty_like_device(x, {args.plan.scratch_bytes + 256}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  args.scratch = reinterpret_cast<void*>((address + 255) / 256 * 256);
  check_launch(launch_ghost_backward(args, scope.stream()), "ghost_backward");
  return {dx, dw1, dgamma1, dbeta1, dw2, dgamma2, dbeta2};
}

}  // namespace
}  // namespace ghost

GHOST_REGISTER_CUDA(m) {
  m.impl("ghost_backward", TORCH_BOX(&ghost::ghost_backward));
}
