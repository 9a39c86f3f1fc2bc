// The forward operators on CUDA: checks, allocation, plan and launches; no arithmetic. The schemas,
// which fix the argument lists below, and the meaning of each argument are in
// ghost_ops/ops/eager.py and ghost_ops/ops/conv.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/forward.h"
#include "torch/cuda/common.h"

namespace ghost {
namespace {

using cuda::ForwardArgs;
using cuda::NormArgs;
using cuda::NormSource;
using cuda::PartialsRef;

// Partial statistics in one allocation. The tensor must live until all launches are queued.
struct PartialsBuffer {
  Tensor memory;
  PartialsRef ref;
};
PartialsBuffer make_partials(const Tensor& like, DType dtype, int64_t channels, int64_t splits) {
  PartialsBuffer p;
  p.memory = empty_like_device(like, {(2 * channels + 1) * splits}, compute_type(dtype));
  char* base = static_cast<char*>(p.memory.mutable_data_ptr());
  const int64_t bytes = channels * splits * compute_size(dtype);
  p.ref = {base, base + bytes, base + 2 * bytes, splits};
  return p;
}

Tensor ghost_pack(const OptionalTensor& w1, const OptionalTensor& gamma1,
                  const OptionalTensor& beta1, const OptionalTensor& mean1,
                  const OptionalTensor& var1, double eps1, const Tensor& w2,
                  const OptionalTensor& gamma2, const OptionalTensor& beta2,
                  const OptionalTensor& mean2, const OptionalTensor& var2, double eps2,
                  const OptionalTensor& prelu1, const OptionalTensor& prelu2) {
  check_device(w2, w2, "w2");
  const DType dtype = dtype_of(w2, "w2");
  STD_TORCH_CHECK(w2.dim() == 4, "w2 must be [g, 1, d, d], got ", w2.dim(), "-D");
  int64_t m = -1;
  if (w1.has_value()) {
    STD_TORCH_CHECK(w1->dim() == 4 && w1->size(2) == 1 && w1->size(3) == 1,
                    "w1 must be [m, C, 1, 1]");
    STD_TORCH_CHECK(dtype_of(*w1, "w1") == dtype, "w1 must have the dtype of w2");
    check_device(*w1, w2, "w1");
    m = w1->size(0);
  } else {
    for (const OptionalTensor* t : {&gamma1, &beta1, &mean1, &var1})
      if (t->has_value()) m = (*t)->numel();
  }
  STD_TORCH_CHECK(m >= 0,
                  "without w1 one of gamma1, beta1, mean1, var1 must tell the number of channels");
  const DeviceScope scope(w2);
  const Tensor primary = w1.has_value() ? torch::stable::contiguous(*w1) : w2;
  const Tensor cheap = torch::stable::contiguous(w2);
  cuda::PackArgs args;
  args.dtype = dtype;
  args.channels = w1.has_value() ? w1->size(1) : 0;
  args.intrinsic = m;
  args.ghosts = w2.size(0);
  args.dw_size = w2.size(3);
  const PackedLayout at(args.channels, m, args.ghosts, args.dw_size, w1.has_value());
  const int64_t numel = at.numel + (prelu1 ? m : 0) + (prelu2 ? args.ghosts : 0);
  Tensor packed = empty_like_device(w2, {numel}, compute_type(dtype));
  if (numel == 0) return packed;
  args.w1 = w1.has_value() ? primary.const_data_ptr() : nullptr;
  args.w2 = {cheap.const_data_ptr(), dtype};
  args.norm1 = given(gamma1, beta1, mean1, var1, eps1, m, w2, {"gamma1", "beta1", "mean1", "var1"});
  args.norm2 = given(gamma2, beta2, mean2, var2, eps2, args.ghosts, w2,
                     {"gamma2", "beta2", "mean2", "var2"});
  args.prelu1 = param(prelu1, m, w2, "prelu1");
  args.prelu2 = param(prelu2, args.ghosts, w2, "prelu2");
  args.packed = packed.mutable_data_ptr();
  args.packed_bytes = numel * compute_size(dtype);
  check_launch(launch_ghost_pack(args, scope.stream()), "ghost_pack");
  return packed;
}

// Sets the parameter pointers of a pass to the sections of packed.
void use_packed(ForwardArgs& args, const Tensor& packed) {
  const Problem& p = args.problem;
  const PackedLayout whole(p.channels, p.intrinsic, p.ghosts(), p.dw_size, p.has_primary);
  const bool prelu1 = p.act1.act == Act::kPReLU, prelu2 = p.act2.act == Act::kPReLU;
  const int64_t numel = whole.numel + (prelu1 ? p.intrinsic : 0) + (prelu2 ? p.ghosts() : 0);
  check_device(packed, packed, "packed");
  STD_TORCH_CHECK(packed.scalar_type() == compute_type(p.dtype) && packed.numel() == numel &&
                      packed.is_contiguous(),
                  "packed does not belong to this module: expected ", numel, " elements, got ",
                  packed.numel());
  const CudaPackedLayout at(p.dtype, p.channels, p.intrinsic, p.ghosts(), p.dw_size, p.has_primary,
                            prelu1, prelu2);
  const char* base = static_cast<const char*>(packed.const_data_ptr());
  args.w1 = p.has_primary ? base + at.w1 : nullptr;
  args.norm1.scale = at.folded ? nullptr : base + at.scale1;
  args.norm1.shift = base + at.shift1;
  args.w2 = {base + at.w2, p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32};
  args.norm2.shift = base + at.shift2;
  if (prelu1) args.slopes1 = {base + at.slopes1, compute_dtype_of(p)};
  if (prelu2) args.slopes2 = {base + at.slopes2, compute_dtype_of(p)};
}

// The plan of a kernel for the problem and the pointers x and w1 of its arguments.
void set_plan(ForwardArgs& args, CudaKernel kernel, const DeviceScope& scope) {
  set_aligned(args.problem, args.x, args.w1);
  args.plan = plan_cuda(args.problem, kernel, scope.arch(), allow_tf32(args.problem));
  if (kernel == CudaKernel::kApply) args.pipelined = choose_pipelined(args.problem, scope.arch());
}

// ghost_apply and ghost_apply_gated, with the numeric arguments of the operator in p.
Tensor apply(Problem p, const Tensor& x, const OptionalTensor& in_gate, const Tensor& packed,
             const OptionalTensor& residual, const OptionalTensor& gate) {
  check_sizes(p);
  const DeviceScope scope(x);
  const int64_t H = p.out_height(), W = p.out_width();
  Tensor out = empty_like_device(x, {p.batch, p.out_channels, H, W}, x.scalar_type(), p.layout);
  Tensor res, factor;
  if (residual) {
    check_device(*residual, x, "residual");
    res = set_residual(p, *residual, x.scalar_type());
  }
  if (gate) {
    check_device(*gate, x, "gate");
    factor = set_gate(p, *gate, x.scalar_type());
    constexpr int64_t kMostPixels = std::numeric_limits<int32_t>::max() / 8;
    STD_TORCH_CHECK(p.gate_height * p.gate_width <= kMostPixels, "gate may have ", kMostPixels,
                    " pixels, got ", p.gate_height * p.gate_width);
  }
  Tensor in_factor;
  if (in_gate) {
    check_device(*in_gate, x, "in_gate");
    STD_TORCH_CHECK(p.has_primary && p.stride == 1,
                    "in_gate needs a primary convolution of stride 1, which reads x");
    STD_TORCH_CHECK(in_gate->dim() == 2 && in_gate->size(0) == p.batch &&
                        in_gate->size(1) == p.channels && in_gate->scalar_type() == x.scalar_type(),
                    "in_gate must be [", p.batch, ", ", p.channels, "] of the dtype of x");
    p.has_in_gate = true;
    in_factor = torch::stable::contiguous(*in_gate);
  }
  ForwardArgs args;
  args.problem = p;
  check_device(packed, x, "packed");
  use_packed(args, packed);
  if (p.batch * H * W == 0) return out;
  args.in_gate = in_gate ? in_factor.const_data_ptr() : nullptr;
  args.x = x.const_data_ptr();
  set_plan(args, CudaKernel::kApply, scope);
  args.residual = residual ? res.const_data_ptr() : nullptr;
  args.gate = gate ? factor.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  check_launch(launch_ghost_apply(args, scope.stream()), "ghost_apply");
  return out;
}

Tensor ghost_apply(const Tensor& x, const Tensor& packed, const OptionalTensor& residual,
                   const OptionalTensor& gate, int64_t intrinsic, int64_t out_channels,
                   int64_t ratio, int64_t dw_size, int64_t stride, int64_t act1, double slope1,
                   int64_t act2, double slope2, bool has_primary) {
  Problem p = problem_of(x);
  set_apply(p, intrinsic, out_channels, ratio, dw_size, stride, act1, slope1, act2, slope2,
            has_primary);
  return apply(p, x, std::nullopt, packed, residual, gate);
}

// The mean over the pixels of a 1x1 convolution with its batch norm and activation: a Ghost module
// of ratio 1.
Tensor ghost_apply_pooled(const Tensor& x, const Tensor& packed, int64_t channels, int64_t act,
                          double slope) {
  Problem p = problem_of(x);
  set_apply(p, channels, channels, 1, 1, 1, act, slope, 0, 0.0, true);
  check_sizes(p);
  const DeviceScope scope(x);
  STD_TORCH_CHECK(p.out_pixels() > 0, "x must have pixels");
  STD_TORCH_CHECK(p.out_pixels() <= kCudaMostPooled, "x may have ", kCudaMostPooled,
                  " pixels, got ", p.out_pixels());
  p.pooled = true;
  Tensor out = empty_like_device(x, {p.batch, channels}, x.scalar_type());
  ForwardArgs args;
  args.problem = p;
  check_device(packed, x, "packed");
  use_packed(args, packed);
  if (p.batch == 0) return out;
  args.x = x.const_data_ptr();
  set_plan(args, CudaKernel::kApply, scope);
  args.out = out.mutable_data_ptr();
  check_launch(launch_ghost_apply(args, scope.stream()), "ghost_apply_pooled");
  return out;
}

Tensor ghost_apply_gated(const Tensor& x, const Tensor& in_gate, const Tensor& packed,
                         const OptionalTensor& residual, const OptionalTensor& gate,
                         int64_t intrinsic, int64_t out_channels, int64_t ratio, int64_t dw_size,
                         int64_t stride, int64_t act1, double slope1, int64_t act2, double slope2,
                         bool has_primary) {
  Problem p = problem_of(x);
  set_apply(p, intrinsic, out_channels, ratio, dw_size, stride, act1, slope1, act2, slope2,
            has_primary);
  return apply(p, x, in_gate, packed, residual, gate);
}

// The combined statistics of a pass as two tensors of the compute type.
std::tuple<Tensor, Tensor> combined(const Tensor& like, const PartialsRef& partials, DType dtype,
                                    int64_t channels, const DeviceScope& scope, const char* name) {
  Tensor mean = empty_like_device(like, {channels}, compute_type(dtype));
  Tensor var = empty_like_device(like, {channels}, compute_type(dtype));
  check_launch(cuda::launch_combine_stats(partials, dtype, channels, mean.mutable_data_ptr(),
                                          var.mutable_data_ptr(), scope.stream()),
               name);
  return {mean, var};
}

// Launches the statistics of u, into new partials; also writes u if it is not null.
PartialsBuffer primary_pass(ForwardArgs args, const Tensor& x, void* u, const DeviceScope& scope) {
  const Problem& p = args.problem;
  set_plan(args, u ? CudaKernel::kPrimaryStatsKeep : CudaKernel::kPrimaryStats, scope);
  PartialsBuffer partials = make_partials(x, p.dtype, p.intrinsic, args.plan.tile.workers);
  args.out = u;
  args.partials = partials.ref;
  check_launch(launch_ghost_primary_stats(args, scope.stream()), "ghost_primary_stats");
  return partials;
}

PartialsBuffer cheap_pass(ForwardArgs args, const Tensor& x, const DeviceScope& scope) {
  const Problem& p = args.problem;
  set_plan(args, CudaKernel::kCheapStats, scope);
  PartialsBuffer partials = make_partials(x, p.dtype, p.ghosts(), args.plan.tile.workers);
  args.partials = partials.ref;
  check_launch(launch_ghost_cheap_stats(args, scope.stream()), "ghost_cheap_stats");
  return partials;
}

std::tuple<Tensor, Tensor> ghost_primary_stats(const Tensor& x, const OptionalTensor& w1,
                                               int64_t stride) {
  Problem p = problem_of(x);
  if (w1.has_value()) check_primary(*w1, x, p);
  p.has_primary = w1.has_value();
  p.stride = p.has_primary ? stride : 1;
  STD_TORCH_CHECK(p.stride >= 1, "stride must be positive, got ", stride);
  p.intrinsic = p.has_primary ? w1->size(0) : p.channels;
  p.out_channels = p.intrinsic;
  p.ratio = 1;
  check_sizes(p);
  const DeviceScope scope(x);
  if (p.batch * p.out_pixels() == 0) return combined(x, {}, p.dtype, p.intrinsic, scope, "stats");
  Tensor weight;
  if (p.has_primary) weight = torch::stable::contiguous(*w1);
  ForwardArgs args;
  args.problem = cuda_training(p, false).primary;
  args.x = x.const_data_ptr();
  args.w1 = p.has_primary ? weight.const_data_ptr() : nullptr;
  const PartialsBuffer partials = primary_pass(args, x, nullptr, scope);
  return combined(x, partials.ref, p.dtype, p.intrinsic, scope, "ghost_primary_stats");
}

std::tuple<Tensor, Tensor> ghost_cheap_stats(const Tensor& x, const Tensor& packed,
                                             int64_t intrinsic, int64_t ratio, int64_t dw_size,
                                             int64_t stride, int64_t act1, double slope1,
                                             bool has_primary) {
  Problem p = problem_of(x);
  check_dw_size(dw_size);
  STD_TORCH_CHECK(ratio >= 1 && stride >= 1 && intrinsic >= 1,
                  "ratio, stride and intrinsic must be positive");
  STD_TORCH_CHECK(has_primary || p.channels == intrinsic,
                  "without a primary convolution x must have ", intrinsic, " channels");
  p.stride = has_primary ? stride : 1;
  p.intrinsic = intrinsic;
  p.out_channels = intrinsic * ratio;
  p.ratio = ratio;
  p.dw_size = dw_size;
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.has_primary = has_primary;
  check_sizes(p);
  const DeviceScope scope(x);
  ForwardArgs args;
  args.problem = p;
  check_device(packed, x, "packed");
  use_packed(args, packed);
  if (p.batch * p.out_pixels() * p.ghosts() == 0)
    return combined(x, {}, p.dtype, p.ghosts(), scope, "stats");
  args.x = x.const_data_ptr();
  const PartialsBuffer partials = cheap_pass(args, x, scope);
  return combined(x, partials.ref, p.dtype, p.ghosts(), scope, "ghost_cheap_stats");
}

// Three launches, two without ghosts: statistics of u (which may write u), statistics of v, apply.
// Each pass first combines the partial statistics of the passes before it. A norm with given
// statistics needs no launch, unless the launch has to write u.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ghost_train_forward(
    const Tensor& x, const OptionalTensor& w1, const OptionalTensor& gamma1,
    const OptionalTensor& beta1, const OptionalTensor& mean1, const OptionalTensor& var1,
    double eps1, const OptionalTensor& prelu1, const Tensor& w2, const OptionalTensor& gamma2,
    const OptionalTensor& beta2, const OptionalTensor& mean2, const OptionalTensor& var2,
    double eps2, const OptionalTensor& prelu2, int64_t out_channels, int64_t stride, int64_t act1,
    double slope1, int64_t act2, double slope2, bool keep_u) {
  Problem p = problem_of(x);
  if (w1.has_value()) check_primary(*w1, x, p);
  const int64_t m = w1.has_value() ? w1->size(0) : p.channels;
  p.has_primary = w1.has_value();
  p.stride = p.has_primary ? stride : 1;
  STD_TORCH_CHECK(p.stride >= 1, "stride must be positive, got ", stride);
  p.intrinsic = m;
  p.out_channels = out_channels;
  set_cheap(p, w2, x);
  STD_TORCH_CHECK(m <= out_channels && out_channels <= m * p.ratio, "out_channels must lie in [", m,
                  ", ", m * p.ratio, "], got ", out_channels);
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.act2 = activation_or_prelu(act2, slope2, "act2");
  check_sizes(p);
  STD_TORCH_CHECK(mean1.has_value() == var1.has_value() && mean2.has_value() == var2.has_value(),
                  "mean and var of a norm must be given together");
  const bool batch1 = !mean1.has_value(), batch2 = !mean2.has_value();  // statistics of the batch
  const DeviceScope scope(x);
  const int64_t g = p.ghosts(), H = p.out_height(), W = p.out_width();
  const ScalarType type = x.scalar_type(), ct = compute_type(p.dtype);
  Tensor out = empty_like_device(x, {p.batch, out_channels, H, W}, type, p.layout);
  Tensor u = keep_u ? empty_like_device(x, {p.batch, m, H, W}, type, p.layout)
                    : empty_like_device(x, {0}, type);
  NormArgs norm1 =
      given(gamma1, beta1, mean1, var1, eps1, m, x, {"gamma1", "beta1", "mean1", "var1"});
  NormArgs norm2 =
      given(gamma2, beta2, mean2, var2, eps2, g, x, {"gamma2", "beta2", "mean2", "var2"});
  ForwardArgs args;
  args.slopes1 = slopes_of(p.act1, prelu1, m, x, "prelu1");
  args.slopes2 = slopes_of(p.act2, prelu2, g, x, "prelu2");
  const int64_t own1 = batch1 ? m : 0, own2 = batch2 ? g : 0;  // statistics to return
  if (p.batch * H * W == 0) {
    auto [zero_mean1, zero_var1] = combined(x, {}, p.dtype, own1, scope, "stats");
    auto [zero_mean2, zero_var2] = combined(x, {}, p.dtype, own2, scope, "stats");
    return {out, zero_mean1, zero_var1, zero_mean2, zero_var2, u};
  }
  Tensor batch_mean1 = empty_like_device(x, {own1}, ct),
         batch_var1 = empty_like_device(x, {own1}, ct),
         batch_mean2 = empty_like_device(x, {own2}, ct),
         batch_var2 = empty_like_device(x, {own2}, ct);
  const Tensor primary = torch::stable::contiguous(w1.value_or(w2));
  const Tensor cheap = torch::stable::contiguous(w2);

  const CudaTraining training = cuda_training(p, keep_u, batch1);
  args.problem = training.primary;
  args.x = x.const_data_ptr();
  args.w1 = p.has_primary ? primary.const_data_ptr() : nullptr;
  args.w2 = {cheap.const_data_ptr(), p.dtype};
  Tensor scratch =
      training.writes_u && !keep_u ? empty_like_device(x, {p.batch, m, H, W}, type, p.layout) : u;
  PartialsBuffer first, second;
  if (batch1 || training.writes_u)
    first = primary_pass(args, x, training.writes_u ? scratch.mutable_data_ptr() : nullptr, scope);
  if (!training.apply.has_primary && p.has_primary) {  // the next passes read u instead of x
    args.x = scratch.const_data_ptr();
    args.w1 = nullptr;
  }
  if (batch1) {
    norm1.source = NormSource::kPartials;
    norm1.partials = first.ref;
    norm1.mean_out = batch_mean1.mutable_data_ptr();
    norm1.var_out = batch_var1.mutable_data_ptr();
  }
  args.norm1 = norm1;
  if (own2 > 0) {
    args.problem = training.cheap;
    second = cheap_pass(args, x, scope);
    norm2.source = NormSource::kPartials;
    norm2.partials = second.ref;
    norm2.mean_out = batch_mean2.mutable_data_ptr();
    norm2.var_out = batch_var2.mutable_data_ptr();
    if (batch1) {  // combined by the pass before: cheaper than to combine them again
      args.norm1.source = NormSource::kGiven;
      args.norm1.mean = {batch_mean1.const_data_ptr(), compute_dtype_of(p)};
      args.norm1.var = {batch_var1.const_data_ptr(), compute_dtype_of(p)};
    }
  }
  args.norm2 = norm2;
  args.problem = training.apply;
  set_plan(args, CudaKernel::kApply, scope);
  args.out = out.mutable_data_ptr();
  check_launch(launch_ghost_apply(args, scope.stream()), "ghost_train_forward");
  return {out, batch_mean1, batch_var1, batch_mean2, batch_var2, u};
}

}  // namespace
}  // namespace ghost

GHOST_REGISTER_CUDA(m) {
  m.impl("ghost_pack", TORCH_BOX(&ghost::ghost_pack));
  m.impl("ghost_apply", TORCH_BOX(&ghost::ghost_apply));
  m.impl("ghost_apply_pooled", TORCH_BOX(&ghost::ghost_apply_pooled));
  m.impl("ghost_apply_gated", TORCH_BOX(&ghost::ghost_apply_gated));
  m.impl("ghost_primary_stats", TORCH_BOX(&ghost::ghost_primary_stats));
  m.impl("ghost_cheap_stats", TORCH_BOX(&ghost::ghost_cheap_stats));
  m.impl("ghost_train_forward", TORCH_BOX(&ghost::ghost_train_forward));
}
