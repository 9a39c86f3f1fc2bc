// ghost_backward on CUDA: checks, allocation, plan and launches; no arithmetic. The schema, which
// fixes the argument list below, and the meaning of each argument are in
// ghost_ops/ops/eager.py.
#include "cuda/backward.h"

#include <tuple>

#include "torch/cuda/common.h"

namespace ghost {
namespace {

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The data of checked means [2, channels] of a norm's gradients, or null if none are given.
const void* means_of(const OptionalTensor& means, bool batch_stats, int64_t channels,
                     const Tensor& like, ScalarType type, const char* name) {
  if (!means.has_value()) return nullptr;
  check_device(*means, like, name);
  STD_TORCH_CHECK(batch_stats, name, " are of a norm with statistics of the batch");
  STD_TORCH_CHECK(means->dim() == 2 && means->size(0) == 2 && means->size(1) == channels &&
                      means->scalar_type() == type && means->is_contiguous(),
                  name, " must be a contiguous [2, ", channels, "] of the compute dtype");
  return means->const_data_ptr();
}

Gradients ghost_backward(const Tensor& grad_out, const Tensor& x, const OptionalTensor& u,
                         const OptionalTensor& w1, const OptionalTensor& gamma1,
                         const OptionalTensor& beta1, const Tensor& mean1, const Tensor& var1,
                         double eps1, const OptionalTensor& prelu1, const OptionalTensor& means1,
                         const Tensor& w2, const OptionalTensor& gamma2,
                         const OptionalTensor& beta2, const Tensor& mean2, const Tensor& var2,
                         double eps2, const OptionalTensor& prelu2, const OptionalTensor& means2,
                         int64_t stride, int64_t act1, double slope1, int64_t act2, double slope2,
                         bool batch_stats1, bool batch_stats2, int64_t needs) {
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
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.act2 = activation_or_prelu(act2, slope2, "act2");
  check_sizes(p);
  constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max() - 256;
  STD_TORCH_CHECK(p.batch * H * W <= kMostPixels, "the batch is too large: it may have ",
                  kMostPixels, " output pixels, got ", p.batch * H * W);
  STD_TORCH_CHECK(0 <= needs && needs <= kNeedAll, "needs must be a mask of ", kNeedAll, ", got ",
                  needs);
  BackwardTask task;
  task.needs = backward_needs(p, int(needs));

  const DeviceScope scope(x);
  // Gradients that are not needed are returned without elements.
  const auto wanted = [&](int what, std::vector<int64_t> sizes, ScalarType of,
                          Layout layout = Layout::kNCHW) {
    if ((task.needs & what) == 0) sizes = {0};
    return empty_like_device(x, sizes, of, layout);
  };
  Tensor dx = wanted(kNeedDx, {p.batch, p.channels, p.height, p.width}, type, p.layout);
  Tensor dw1 = wanted(kNeedDw1, {m, p.channels, 1, 1}, type);
  Tensor dw2 = g > 0 ? wanted(kNeedDw2, {g, 1, p.dw_size, p.dw_size}, type)
                     : empty_like_device(x, {0, 1, p.dw_size, p.dw_size}, type);
  Tensor dgamma1 = wanted(kNeedNorm1, {m}, compute), dbeta1 = wanted(kNeedNorm1, {m}, compute),
         dprelu1 = wanted(kNeedPrelu1, {m}, compute), dgamma2 = wanted(kNeedNorm2, {g}, compute),
         dbeta2 = wanted(kNeedNorm2, {g}, compute), dprelu2 = wanted(kNeedPrelu2, {g}, compute);
  cuda::BackwardArgs args;
  args.norm1 = given(gamma1, beta1, mean1, var1, eps1, m, x, {"gamma1", "beta1", "mean1", "var1"});
  args.norm2 = given(gamma2, beta2, mean2, var2, eps2, g, x, {"gamma2", "beta2", "mean2", "var2"});
  args.slopes1 = slopes_of(p.act1, prelu1, m, x, "prelu1");
  args.slopes2 = slopes_of(p.act2, prelu2, g, x, "prelu2");
  args.batch_stats1 = batch_stats1;
  args.batch_stats2 = batch_stats2;
  args.means1 = means_of(means1, batch_stats1, m, x, compute, "means1");
  args.means2 = means_of(means2, batch_stats2, g, x, compute, "means2");
  const Gradients gradients = {dx, dw1, dgamma1, dbeta1, dprelu1, dw2, dgamma2, dbeta2, dprelu2};
  if (p.batch * H * W == 0) {
    for (Tensor* t : {&dx, &dw1, &dgamma1, &dbeta1, &dprelu1, &dw2, &dgamma2, &dbeta2, &dprelu2})
      torch::stable::zero_(*t);
    return gradients;
  }
  if (task.needs == 0) return gradients;

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
  args.grad_out = grad_out.const_data_ptr();
  for (int i = 0; i < 4; ++i) args.grad_strides[i] = grad_out.stride(i);
  args.x = x.const_data_ptr();
  args.u = kept ? kept->const_data_ptr() : nullptr;
  args.w1 = p.has_primary ? primary.const_data_ptr() : nullptr;
  args.w2 = {cheap.const_data_ptr(), p.dtype};
  const auto pointer = [](Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  args.dx = pointer(dx);
  args.dw1 = pointer(dw1);
  args.dgamma1 = pointer(dgamma1);
  args.dbeta1 = pointer(dbeta1);
  args.dslopes1 = pointer(dprelu1);
  args.dw2 = pointer(dw2);
  args.dgamma2 = pointer(dgamma2);
  args.dbeta2 = pointer(dbeta2);
  args.dslopes2 = pointer(dprelu2);
  set_aligned(p, args.x, args.w1);
  args.problem = p;
  const void* const given_u = p.has_primary ? args.u : args.x;
  task.u_given = given_u != nullptr;
  task.u_rows = cuda::is_pixel_rows(p, given_u);
  task.reads_sums2 = batch_stats2 && args.means2 == nullptr;
  args.plan = plan_cuda_backward(p, scope.arch(), allow_tf32(p), task);
  const Tensor scratch = empty_like_device(x, {args.plan.scratch_bytes + 256}, ScalarType::Byte);
  const auto address = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  args.scratch = reinterpret_cast<void*>((address + 255) / 256 * 256);
  check_launch(launch_ghost_backward(args, scope.stream()), "ghost_backward");
  return gradients;
}

}  // namespace
}  // namespace ghost

GHOST_REGISTER_CUDA(m) {
  m.impl("ghost_backward", TORCH_BOX(&ghost::ghost_backward));
}
