// The backward operator of training on the CPU: checks, allocation and calls of kernels. No
// arithmetic. Schema: ghost_ops/ops/eager.py.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "core/needs.h"
#include "torch/cpu_train.h"

namespace ghost {
namespace {

void check_u(const Image& u, const Image& x, int64_t m, int64_t H, int64_t W) {
  STD_TORCH_CHECK(u.n == x.n && u.c == m && u.h == H && u.w == W && u.dtype == x.dtype,
                  "u must be [", x.n, ", ", m, ", ", H, ", ", W, "] of the dtype of x");
}

// The gradients of one norm's parameters and of the slopes behind it; empty if not needed.
struct NormGradTensors {
  Tensor dgamma, dbeta, dslopes;

  NormGradTensors(int64_t n, bool norm, bool slopes, ScalarType type)
      : dgamma(empty_if(norm, {n}, type)),
        dbeta(empty_if(norm, {n}, type)),
        dslopes(empty_if(slopes, {n}, type)) {}

  NormGrads args() const { return {memory(dgamma), memory(dbeta), memory(dslopes)}; }

 private:
  static void* memory(Tensor t) { return data_if(t.numel() > 0, t); }
};

// du in the compute type: [N, P, m] with channels along the lanes, else [m, N, P] with a stride.
struct Du {
  Tensor memory;
  int64_t channel_stride;
};

// The tensors that the passes read besides those of TrainArgs.
struct Inputs {
  const Tensor &grad_out, &x;
  const OptionalTensor &w1, &u;  // u: absent or empty if forward did not keep it
  bool need_du;

  bool has_u() const { return u.has_value() && u->numel() > 0; }
};

// The tensor of the result is undefined if no gradient needs du.
Du lane_backward(const TrainModule& module, const TrainArgs& common, const Inputs& inputs) {
  const Image& in = module.in;
  const int64_t m = module.m, H = common.problem.height, W = common.problem.width;
  const ScalarType ct = compute_type(in.dtype);
  const Tensor grad = in_layout(inputs.grad_out, in.layout);
  Tensor u = inputs.x, g1;
  if (inputs.has_u()) {
    u = in_layout(*inputs.u, in.layout);
    check_u(image_of(u, "u"), in, m, H, W);
  } else if (inputs.w1) {
    u = empty({in.n * H * W, m}, ct);
    lane_conv(in, inputs.x.const_data_ptr(), packed_conv(*inputs.w1, in.dtype, false), m,
              u.mutable_data_ptr());
  }
  LanePasses lanes(common);
  lanes.args.u = u.const_data_ptr();
  lanes.args.grad_out = grad.const_data_ptr();
  if (inputs.need_du || common.grads1.dgamma) {
    g1 = empty({in.n, m, H, W}, ct, in.layout);
    lanes.args.g1 = g1.mutable_data_ptr();
  }
  lanes.backward(inputs.need_du);
  return {g1, 1};
}

Du channel_backward(const TrainModule& module, const TrainArgs& common, const Inputs& inputs) {
  const Image& in = module.in;
  const int64_t m = module.m, H = common.problem.height, W = common.problem.width,
                u_step = channel_stride(in.n * H * W, in.dtype);
  // u, kept or computed again; the kernel replaces it by du.
  Tensor u = empty({m, u_step}, compute_type(in.dtype));
  if (inputs.has_u()) {
    const Tensor& kept = *inputs.u;
    const bool dense = is_dense(kept, Layout::kNCHW) || is_dense(kept, Layout::kNHWC);
    const Tensor source = dense ? kept : torch::stable::contiguous(kept);
    const Image shape = image_of(source, "u");
    check_u(shape, in, m, H, W);
    compute_u(source, shape, std::nullopt, m, 1, u.mutable_data_ptr());
  } else {
    compute_u(inputs.x, in, inputs.w1, m, module.p.stride, u.mutable_data_ptr());
  }
  // The gradient may be expanded, or in the other layout.
  const Layout layout = is_dense(inputs.grad_out, in.layout)       ? in.layout
                        : is_dense(inputs.grad_out, Layout::kNCHW) ? Layout::kNCHW
                        : is_dense(inputs.grad_out, Layout::kNHWC) ? Layout::kNHWC
                                                                   : in.layout;
  const Tensor grad = in_layout(inputs.grad_out, layout);
  ChannelArgs args{common, u.mutable_data_ptr(), u_step, false, inputs.need_du};
  args.problem.layout = layout;
  args.grad_out = grad.const_data_ptr();
  run(active_isa().ghost.channels_backward[int(in.dtype)], args, channel_items(args.problem));
  return {u, u_step};
}

// dx = w1 transposed * du, or du without w1.
Tensor input_gradient(const TrainModule& module, const OptionalTensor& w1, const Du& du,
                      ScalarType type) {
  const Image& in = module.in;
  const bool lanes = trains_by_lanes(module.p);
  if (lanes && !w1) return du.memory;
  const int64_t stride = module.p.stride, P = module.p.out_pixels();
  Image maps{in.n, module.m, module.p.out_height(), module.p.out_width(), in.layout, in.dtype};
  Tensor dx = empty({in.n, in.c, in.h, in.w}, type, in.layout);
  if (!w1) {
    store_u(du.memory.const_data_ptr(), maps, dx, in.layout);
    return dx;
  }
  const Tensor packed = packed_conv(*w1, in.dtype, true);
  if (lanes) {
    lane_conv(maps, du.memory.const_data_ptr(), packed, in.c, dx.mutable_data_ptr());
    return dx;
  }
  if (stride > 1) torch::stable::zero_(dx);  // the pixels that the convolution skipped
  maps.layout = Layout::kNCHW;
  maps.dtype = compute_dtype(in.dtype);
  ApplyArgs args;
  args.problem = plain_conv(maps, in.c, 1);
  args.problem.joined = true;
  args.packed = packed.const_data_ptr();
  args.scatter = stride;
  args.scatter_width = in.w;
  Target out = target_of(dx, in.layout);
  out.may_stream = in.layout == Layout::kNCHW && in.dtype == maps.dtype && stride == 1;
  run_apply(active_isa().ghost.apply_from_compute[int(in.dtype)], args,
            {du.memory.const_data_ptr(), P, du.channel_stride}, out);
  return dx;
}

// dw1 [m, C, 1, 1] of the compute type.
Tensor weight_gradient(const TrainModule& module, const Tensor& x, const Du& du) {
  const Image& in = module.in;
  Tensor dw1 = empty({module.m, in.c, 1, 1}, compute_type(in.dtype));
  WeightGradArgs args{};
  args.problem = plain_conv(in, module.m, module.p.stride);
  args.du = du.memory.const_data_ptr();
  args.du_step = du.channel_stride;
  args.x = x.const_data_ptr();
  args.dw1 = dw1.mutable_data_ptr();
  args.path = plan_weight_grad(args.problem, cpu_machine(threads()));
  run(active_isa().ghost.weight_grad[int(in.dtype)], args, weight_grad_items(args.problem));
  return dw1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ghost_backward(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& u, const OptionalTensor& w1,
    const OptionalTensor& gamma1, const OptionalTensor& beta1, const Tensor& mean1,
    const Tensor& var1, double eps1, const OptionalTensor& prelu1, const OptionalTensor& means1,
    const Tensor& w2, const OptionalTensor& gamma2, const OptionalTensor& beta2,
    const Tensor& mean2, const Tensor& var2, double eps2, const OptionalTensor& prelu2,
    const OptionalTensor& means2, int64_t stride, int64_t act1, double slope1, int64_t act2,
    double slope2, bool batch_stats1, bool batch_stats2, int64_t needs) {
  TrainModule module(x, w1, w2, stride, act1, slope1, act2, slope2);
  const Image& in = module.in;
  const int64_t m = module.m, g = module.g, d = module.d, H = module.p.out_height(),
                W = module.p.out_width();
  const ScalarType type = x.scalar_type(), ct = compute_type(in.dtype);
  STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.size(0) == in.n && grad_out.size(2) == H &&
                      grad_out.size(3) == W && grad_out.scalar_type() == type,
                  "grad_out must be [", in.n, ", oup, ", H, ", ", W, "] of the dtype of x");
  module.set_out_channels(grad_out.size(1), "the number of channels of grad_out");
  module.set_norm(1, eps1, gamma1, beta1, mean1, var1, prelu1, means1);
  module.set_norm(2, eps2, gamma2, beta2, mean2, var2, prelu2, means2);
  STD_TORCH_CHECK(0 <= needs && needs <= kNeedAll, "needs must be a mask of ", int(kNeedAll),
                  ", got ", needs);
  const bool need_dx = needs & kNeedDx, need_dw1 = (needs & kNeedDw1) && w1.has_value(),
             need_dw2 = needs & kNeedDw2;
  const NormGradTensors grads1(m, needs & kNeedNorm1, (needs & kNeedPrelu1) && prelu1, ct),
      grads2(g, needs & kNeedNorm2, (needs & kNeedPrelu2) && prelu2, ct);
  Tensor dw2 = empty_if(need_dw2, {g, 1, d, d}, ct);
  TrainArgs common = module.args(batch_stats1, batch_stats2);
  common.dw2 = data_if(need_dw2, dw2);
  common.grads1 = grads1.args();
  common.grads2 = grads2.args();

  const Inputs inputs{grad_out, x, w1, u, need_dx || need_dw1};
  const Du du = trains_by_lanes(module.p) ? lane_backward(module, common, inputs)
                                          : channel_backward(module, common, inputs);
  const Tensor dx = need_dx ? input_gradient(module, w1, du, type) : empty({0}, type);
  Tensor dw1 = need_dw1 ? weight_gradient(module, x, du) : empty({0}, type);
  if (type != ct) {
    if (need_dw1) dw1 = torch::stable::to(dw1, type);
    dw2 = torch::stable::to(dw2, type);
  }
  return {dx,  dw1,           grads1.dgamma, grads1.dbeta,  grads1.dslopes,
          dw2, grads2.dgamma, grads2.dbeta,  grads2.dslopes};
}

}  // namespace
}  // namespace ghost

STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CPU, m) {
  m.impl("ghost_backward", TORCH_BOX(&ghost::ghost_backward));
}
