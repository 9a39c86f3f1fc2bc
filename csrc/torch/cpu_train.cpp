// The operators of training on the CPU except backward, and the parts that they share with it:
// checks, allocation and calls of kernels. No arithmetic. Schemas: ghost_ops/ops/eager.py.
#include "torch/cpu_train.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/pack.h"

namespace ghost {

// ---------------------------------------------------------------- the module

void check_primary(const Tensor& w1, const Image& x) {
  STD_TORCH_CHECK(w1.dim() == 4 && w1.size(1) == x.c && w1.size(2) == 1 && w1.size(3) == 1,
                  "w1 must be [m, ", x.c, ", 1, 1]");
  STD_TORCH_CHECK(dtype_of(w1, "w1") == x.dtype, "w1 must have the dtype of x");
}

TrainModule::TrainModule(const Tensor& x, const OptionalTensor& w1, const Tensor& w2,
                         int64_t stride, int64_t act1, double slope1, int64_t act2, double slope2)
    : in(image_of(x, "x")) {
  if (w1) check_primary(*w1, in);
  m = w1 ? w1->size(0) : in.c;
  STD_TORCH_CHECK(w2.dim() == 4 && w2.size(1) == 1 && w2.size(2) == w2.size(3),
                  "w2 must be [g, 1, d, d]");
  STD_TORCH_CHECK(dtype_of(w2, "w2") == in.dtype, "w2 must have the dtype of x");
  STD_TORCH_CHECK(m > 0 && w2.size(0) % m == 0, "w2 must have a multiple of ", m,
                  " output channels, got ", w2.size(0));
  g = w2.size(0);
  d = w2.size(3);
  check_dw_size(d);
  p = plain_conv(in, m, w1 ? stride : 1);
  p.ratio = g / m + 1;
  p.dw_size = d;
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.act2 = activation_or_prelu(act2, slope2, "act2");
  taps_ = Param(w2, in.dtype, g * d * d, "w2");
}

void TrainModule::set_out_channels(int64_t n, const char* name) {
  STD_TORCH_CHECK(m <= n && n <= m * p.ratio, name, " must lie in [", m, ", ", m * p.ratio,
                  "], got ", n);
  p.out_channels = n;
}

void TrainModule::set_norm(int which, double eps, const OptionalTensor& gamma,
                           const OptionalTensor& beta, const OptionalTensor& mean,
                           const OptionalTensor& var, const OptionalTensor& slopes,
                           const OptionalTensor& means) {
  const Activation& act = which == 1 ? p.act1 : p.act2;
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean", which, " and var", which,
                  " must both be given, or neither");
  STD_TORCH_CHECK(slopes.has_value() == (act.act == Act::kPReLU), "prelu", which,
                  " must be given for a PReLU, and only for one");
  (which == 1 ? norm1_ : norm2_) = NormParams(which == 1 ? "1" : "2", in.dtype, which == 1 ? m : g,
                                              eps, gamma, beta, mean, var, slopes, means);
}

TrainArgs TrainModule::args(bool batch_stats1, bool batch_stats2) const {
  TrainArgs a{};
  a.problem = p;
  a.problem.height = p.out_height();
  a.problem.width = p.out_width();
  a.w2 = taps_.data();
  a.norm1 = norm1_.args(batch_stats1);
  a.norm2 = norm2_.args(batch_stats2);
  return a;
}

// ---------------------------------------------------------------- u

Problem plain_conv(const Image& x, int64_t out_channels, int64_t stride) {
  Problem p = problem_of(x);
  p.stride = stride;
  p.intrinsic = p.out_channels = out_channels;
  p.ratio = 1;
  p.dw_size = 1;
  return p;
}

Tensor packed_conv(const Tensor& w1, DType dtype, bool transposed) {
  const int64_t m = w1.size(0), C = w1.size(1), rows = transposed ? C : m,
                cols = transposed ? m : C;
  const Param w(w1, dtype, m * C, "w1");
  Tensor packed = empty({PackedLayout(cols, rows, 0, 1, true).numel}, compute_type(dtype));
  with_dtype(dtype, [&](auto zero) {
    using A = decltype(zero);
    pack_conv(w.as<A>(), rows, cols, transposed ? 1 : C, transposed ? C : 1,
              static_cast<A*>(packed.mutable_data_ptr()));
  });
  return packed;
}

Tensor identity(int64_t n, DType dtype) {
  Tensor packed = empty({2 * n}, compute_type(dtype));
  with_dtype(dtype, [&](auto zero) {
    pack_identity(n, static_cast<decltype(zero)*>(packed.mutable_data_ptr()));
  });
  return packed;
}

void compute_u(const Tensor& x, const Image& in, const OptionalTensor& w1, int64_t m,
               int64_t stride, void* u) {
  ApplyArgs args;
  args.problem = plain_conv(in, m, w1 ? stride : 1);
  args.problem.has_primary = w1.has_value();
  const Tensor packed = w1 ? packed_conv(*w1, in.dtype, false) : identity(m, in.dtype);
  args.packed = packed.const_data_ptr();
  const int64_t P = args.problem.out_pixels();
  run_apply(active_isa().ghost.apply_to_compute[int(in.dtype)], args, source_of(x),
            {u, P, channel_stride(in.n * P, in.dtype), Layout::kNCHW, false});
}

void store_u(const void* u, const Image& u_shape, Tensor& dst, Layout layout) {
  Image shape = u_shape;
  shape.layout = Layout::kNCHW;
  shape.dtype = compute_dtype(shape.dtype);
  ApplyArgs args;
  args.problem = plain_conv(shape, shape.c, 1);
  args.problem.has_primary = false;
  const Tensor packed = identity(shape.c, shape.dtype);
  args.packed = packed.const_data_ptr();
  Target out = target_of(dst, layout);
  out.may_stream = false;
  const int64_t P = shape.h * shape.w;
  run_apply(active_isa().ghost.apply_from_compute[int(u_shape.dtype)], args,
            {u, P, channel_stride(shape.n * P, shape.dtype)}, out);
}

void lane_conv(const Image& x, const void* data, const Tensor& packed, int64_t n, void* out) {
  ApplyArgs args;
  args.problem = plain_conv(x, n, 1);
  args.problem.allows_channel_lanes = true;
  args.packed = packed.const_data_ptr();
  const int64_t P = x.h * x.w;
  run_apply(active_isa().ghost.apply[int(x.dtype)], args, {data, x.c * P, P},
            {out, n * P, P, Layout::kNHWC});
}

// ---------------------------------------------------------------- channels along the lanes

LanePasses::LanePasses(const TrainArgs& common) {
  static_cast<TrainArgs&>(args) = common;
  const Problem& p = args.problem;
  args.items = lane_items(p, cpu_machine(threads()));
  const int64_t partial = args.items.count * (2 + p.dw_size * p.dw_size) * p.intrinsic;
  sums_ = empty({partial + 4 * p.intrinsic}, ScalarType::Double);
  args.partial = static_cast<double*>(sums_.mutable_data_ptr());
  args.totals = args.partial + partial;
}

void LanePasses::pass(LaneStep step) const {
  const auto kernel = active_isa().ghost.lane_train[args.problem.dtype == DType::kFloat64];
  parallel(args.items.count, [&](int64_t b, int64_t e) { kernel(args, step, b, e); });
}

void LanePasses::pass(LaneStep step, LaneStep merge) const {
  pass(step);
  active_isa().ghost.lane_train[args.problem.dtype == DType::kFloat64](args, merge, 0, 1);
}

void LanePasses::forward() {
  if (args.norm1.mean == nullptr) {
    pass(LaneStep::kMoments1, LaneStep::kMergeMoments1);
    args.norm1.mean = args.mean1;
    args.norm1.var = args.var1;
  }
  if (args.norm2.mean == nullptr) {
    pass(LaneStep::kMoments2, LaneStep::kMergeMoments2);
    args.norm2.mean = args.mean2;
    args.norm2.var = args.var2;
  }
  pass(LaneStep::kForward);
}

void LanePasses::backward(bool need_du) const {
  const bool need_dv = args.g1 || args.dw2;
  if (args.grads2.dgamma || (need_dv && args.norm2.batch_stats && !args.norm2.means))
    pass(LaneStep::kSums2, LaneStep::kMergeSums2);
  if (need_dv) pass(LaneStep::kGrads, LaneStep::kMergeGrads);
  if (need_du) pass(LaneStep::kInput);
}

namespace {

// ---------------------------------------------------------------- statistics

std::tuple<Tensor, Tensor> ghost_primary_stats(const Tensor& x, const OptionalTensor& w1,
                                               int64_t stride) {
  const Image in = image_of(x, "x");
  if (w1) check_primary(*w1, in);
  const int64_t m = w1 ? w1->size(0) : in.c;
  const Problem p = plain_conv(in, m, w1 ? stride : 1);
  const ScalarType ct = compute_type(in.dtype);
  Tensor mean = empty({m}, ct), var = empty({m}, ct);
  TrainArgs common{};
  common.problem = p;
  common.problem.height = p.out_height();
  common.problem.width = p.out_width();
  common.mean1 = mean.mutable_data_ptr();
  common.var1 = var.mutable_data_ptr();
  if (!w1 && sums_by_lanes(p)) {
    LanePasses lanes(common);
    lanes.args.u = x.const_data_ptr();
    lanes.pass(LaneStep::kMoments1, LaneStep::kMergeMoments1);
    return {mean, var};
  }
  const int64_t u_step = channel_stride(in.n * p.out_pixels(), in.dtype);
  Tensor u = empty({m, u_step}, ct);
  compute_u(x, in, w1, m, stride, u.mutable_data_ptr());
  ChannelArgs args{common, u.mutable_data_ptr(), u_step, false, false};
  args.problem.layout = Layout::kNCHW;
  run(active_isa().ghost.primary_stats[in.dtype == DType::kFloat64], args,
      channel_items(args.problem));
  return {mean, var};
}

std::tuple<Tensor, Tensor> ghost_cheap_stats(const Tensor& x, const Tensor& packed,
                                             int64_t intrinsic, int64_t ratio, int64_t dw_size,
                                             int64_t stride, int64_t act1, double slope1,
                                             bool has_primary) {
  const Image in = image_of(x, "x");
  check_dw_size(dw_size);
  Problem p = problem_of(in);
  p.stride = has_primary ? stride : 1;
  p.intrinsic = p.out_channels = intrinsic;
  p.ratio = ratio;
  p.dw_size = dw_size;
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.has_primary = has_primary;
  const bool prelu = p.act1.act == Act::kPReLU;
  const PackedLayout at = layout_of_packed(p, packed, prelu ? intrinsic : 0);
  const ScalarType ct = compute_type(in.dtype);
  Tensor mean = empty({p.ghosts()}, ct), var = empty({p.ghosts()}, ct);
  const auto in_packed = [&](int64_t offset) {
    return static_cast<const char*>(packed.const_data_ptr()) + offset * compute_size(in.dtype);
  };
  TrainArgs common{};
  common.problem = p;
  common.problem.height = p.out_height();
  common.problem.width = p.out_width();
  common.problem.out_channels = intrinsic * ratio;
  common.w2 = in_packed(at.w2);
  common.mean2 = mean.mutable_data_ptr();
  common.var2 = var.mutable_data_ptr();
  if (!has_primary && trains_by_lanes(common.problem)) {
    // `packed` holds the first norm as scale and shift: a norm of mean 0 and variance 1.
    const Tensor both = identity(intrinsic, in.dtype);
    const char* const ones = static_cast<const char*>(both.const_data_ptr());
    LanePasses lanes(common);
    lanes.args.u = x.const_data_ptr();
    lanes.args.norm1 = {in_packed(at.scale1), in_packed(at.shift1),
                        ones + intrinsic * compute_size(in.dtype), ones, 0.0};
    lanes.pass(LaneStep::kMoments2, LaneStep::kMergeMoments2);
    return {mean, var};
  }
  const int64_t P = p.out_pixels(), y_step = channel_stride(in.n * P, in.dtype);
  Tensor y = empty({intrinsic, y_step}, ct);
  ApplyArgs apply;
  apply.problem = p;
  apply.problem.ratio = 1;  // y only
  apply.packed = packed.const_data_ptr();
  if (prelu) apply.slopes1 = in_packed(at.numel);
  run_apply(active_isa().ghost.apply_to_compute[int(in.dtype)], apply, source_of(x),
            {y.mutable_data_ptr(), P, y_step, Layout::kNCHW, false});
  ChannelArgs args{common, y.mutable_data_ptr(), y_step, true, false};
  args.problem.layout = Layout::kNCHW;
  run(active_isa().ghost.channels_forward[int(in.dtype)], args, channel_items(args.problem));
  return {mean, var};
}

// ---------------------------------------------------------------- forward

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ghost_train_forward(
    const Tensor& x, const OptionalTensor& w1, const OptionalTensor& gamma1,
    const OptionalTensor& beta1, const OptionalTensor& mean1, const OptionalTensor& var1,
    double eps1, const OptionalTensor& prelu1, const Tensor& w2, const OptionalTensor& gamma2,
    const OptionalTensor& beta2, const OptionalTensor& mean2, const OptionalTensor& var2,
    double eps2, const OptionalTensor& prelu2, int64_t out_channels, int64_t stride, int64_t act1,
    double slope1, int64_t act2, double slope2, bool keep_u) {
  TrainModule module(x, w1, w2, stride, act1, slope1, act2, slope2);
  module.set_out_channels(out_channels, "out_channels");
  module.set_norm(1, eps1, gamma1, beta1, mean1, var1, prelu1, {});
  module.set_norm(2, eps2, gamma2, beta2, mean2, var2, prelu2, {});
  const Image& in = module.in;
  const Problem& p = module.p;
  const int64_t m = module.m, H = p.out_height(), W = p.out_width(), P = H * W;
  const ScalarType ct = compute_type(in.dtype), type = x.scalar_type();
  Tensor out = empty({in.n, out_channels, H, W}, type, in.layout);
  const int64_t count1 = mean1 ? 0 : m, count2 = mean2 ? 0 : module.g;
  Tensor found_mean1 = empty({count1}, ct), found_var1 = empty({count1}, ct),
         found_mean2 = empty({count2}, ct), found_var2 = empty({count2}, ct);
  Tensor kept = empty_if(keep_u, {in.n, m, H, W}, type, in.layout);
  TrainArgs common = module.args(false, false);
  common.out = out.mutable_data_ptr();
  common.mean1 = found_mean1.mutable_data_ptr();
  common.var1 = found_var1.mutable_data_ptr();
  common.mean2 = found_mean2.mutable_data_ptr();
  common.var2 = found_var2.mutable_data_ptr();

  if (trains_by_lanes(p)) {
    Tensor u = x;
    if (w1) {
      u = keep_u ? kept : empty({in.n * P, m}, ct);
      lane_conv(in, x.const_data_ptr(), packed_conv(*w1, in.dtype, false), m, u.mutable_data_ptr());
    } else if (keep_u) {
      torch::stable::copy_(kept, x);
    }
    LanePasses lanes(common);
    lanes.args.u = u.const_data_ptr();
    lanes.forward();
  } else {
    const int64_t u_step = channel_stride(in.n * P, in.dtype);
    Tensor u = empty({m, u_step}, ct);
    compute_u(x, in, w1, m, stride, u.mutable_data_ptr());
    if (keep_u) store_u(u.const_data_ptr(), {in.n, m, H, W, in.layout, in.dtype}, kept, in.layout);
    const ChannelArgs args{common, u.mutable_data_ptr(), u_step, false, false};
    run(active_isa().ghost.channels_forward[int(in.dtype)], args, channel_items(args.problem));
  }
  return {out, found_mean1, found_var1, found_mean2, found_var2, kept};
}

// ---------------------------------------------------------------- running statistics

// The running statistics of one batch norm and its counter of batches, each of which may be absent.
// The constructor checks everything; only update() changes numbers.
class RunningStats {
 public:
  RunningStats(const OptionalTensor& running_mean, const OptionalTensor& running_var,
               const OptionalTensor& batches, const Tensor& mean, const Tensor& var,
               std::optional<double> momentum)
      : running_mean_(running_mean), running_var_(running_var), momentum_(momentum) {
    if (batches) counter_ = counter_of(*batches);
    if (!running_mean || !running_var) return;
    STD_TORCH_CHECK(momentum || batches, "a momentum of None needs the counter of batches");
    channels_ = mean.numel();
    STD_TORCH_CHECK(running_mean->numel() == channels_ && running_var->numel() == channels_,
                    "running statistics must have ", channels_, " elements");
    storage_ = dtype_of(*running_mean, "running_mean");
    STD_TORCH_CHECK(running_var->scalar_type() == running_mean->scalar_type() &&
                        running_mean->is_contiguous() && running_var->is_contiguous(),
                    "running_mean and running_var must be contiguous and of one dtype");
    mean_ = Param(mean, storage_, channels_, "mean");
    var_ = Param(var, storage_, channels_, "var");
  }

  void update(int64_t count) {
    if (counter_) ++*counter_;
    if (channels_ == 0 || count == 0) return;
    const double share = momentum_ ? *momentum_ : 1.0 / static_cast<double>(*counter_);
    with_dtype(storage_, [&](auto zero) {
      using A = decltype(zero);
      blend(*running_mean_, mean_.as<A>(), share, 1.0);
      blend(*running_var_, var_.as<A>(), share, unbiased(count));
    });
  }

 private:
  template <class A>
  void blend(Tensor& running, const A* stat, double share, double factor) const {
    const ScalarType compute = compute_type(storage_);
    const bool same = running.scalar_type() == compute;
    Tensor wide = same ? running : torch::stable::to(running, compute);
    blend_running(static_cast<A*>(wide.mutable_data_ptr()), stat, channels_, share, factor);
    if (!same) torch::stable::copy_(running, wide);
  }

  OptionalTensor running_mean_, running_var_;
  int64_t* counter_ = nullptr;
  std::optional<double> momentum_;
  int64_t channels_ = 0;
  DType storage_ = DType::kFloat32;
  Param mean_, var_;
};

void ghost_update_running_(const OptionalTensor& running_mean1, const OptionalTensor& running_var1,
                           const OptionalTensor& batches1, const Tensor& mean1, const Tensor& var1,
                           std::optional<double> momentum1, const OptionalTensor& running_mean2,
                           const OptionalTensor& running_var2, const OptionalTensor& batches2,
                           const Tensor& mean2, const Tensor& var2, std::optional<double> momentum2,
                           int64_t count) {
  RunningStats first(running_mean1, running_var1, batches1, mean1, var1, momentum1);
  RunningStats second(running_mean2, running_var2, batches2, mean2, var2, momentum2);
  first.update(count);
  second.update(count);
}

}  // namespace
}  // namespace ghost

STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CPU, m) {
  m.impl("ghost_primary_stats", TORCH_BOX(&ghost::ghost_primary_stats));
  m.impl("ghost_cheap_stats", TORCH_BOX(&ghost::ghost_cheap_stats));
  m.impl("ghost_train_forward", TORCH_BOX(&ghost::ghost_train_forward));
  m.impl("ghost_update_running_", TORCH_BOX(&ghost::ghost_update_running_));
}
