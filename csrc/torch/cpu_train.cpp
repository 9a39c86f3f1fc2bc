// The operators of training on the CPU: checks, allocation, the plan, and the parallel loops over
// the kernels' items. No arithmetic here. Schemas stand in ghost_ops/ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "core/needs.h"
#include "core/plan.h"
#include "cpu/dispatch.h"
#include "cpu/pack.h"
#include "torch/cpu_common.h"

namespace ghost {
namespace {

// Primary weights [m, C, 1, 1] of x's dtype.
void check_primary(const Tensor& w1, const Image& x) {
  STD_TORCH_CHECK(w1.dim() == 4 && w1.size(1) == x.c && w1.size(2) == 1 && w1.size(3) == 1,
                  "w1 must be [m, ", x.c, ", 1, 1]");
  STD_TORCH_CHECK(dtype_of(w1, "w1") == x.dtype, "w1 must have the dtype of x");
}

// ----------------------------------------------------------------------------------------------
// shared pieces

// Panels of w (rows x cols, element (r, c) at r * ld + c * step) followed by a zero shift, as
// ghost_apply's kernels want it.
Tensor pack_plain(const Param& w, DType dtype, int64_t rows, int64_t cols, int64_t ld,
                  int64_t step) {
  const PackedLayout at(cols, rows, 0, 1, true);
  Tensor packed = empty({at.numel}, compute_type(dtype));
  with_dtype(dtype, [&](auto zero) {
    using A = decltype(zero);
    A* p = static_cast<A*>(packed.mutable_data_ptr());
    pack_panels<A>(w.as<A>(), rows, cols, ld, step, static_cast<const A*>(nullptr), p);
    std::fill(p + at.shift1, p + at.numel, A(0));
  });
  return packed;
}

// A 1x1 convolution through ghost_apply's kernels (ratio 1: no ghosts).
Problem plain_conv(const Image& x, int64_t out_channels, int64_t stride) {
  Problem p = problem_of(x);
  p.stride = stride;
  p.intrinsic = p.out_channels = out_channels;
  p.ratio = 1;
  p.dw_size = 1;
  return p;
}

// Packed parameters that pass n channels through unchanged.
Tensor identity(int64_t n, DType dtype) {
  Tensor packed = empty({2 * n}, compute_type(dtype));
  with_dtype(dtype, [&](auto zero) {
    identity_affine(n, static_cast<decltype(zero)*>(packed.mutable_data_ptr()));
  });
  return packed;
}

// Elements from channel to channel of u, [m, N, P] of the compute type: an odd number of cache
// lines, so that the rows of a column do not share the sets of a cache.
int64_t channel_step(int64_t pixels, DType dtype) {
  const int64_t line = 64 / compute_size(dtype);
  return ((pixels + line - 1) / line | 1) * line;
}

// u = w1 * x (or x itself without w1) as [m, N, P] of the compute type.
void compute_u(const Tensor& x, const Image& in, const OptionalTensor& w1, int64_t m,
               int64_t stride, void* u) {
  ApplyArgs args;
  args.problem = plain_conv(in, m, w1.has_value() ? stride : 1);
  Tensor packed;
  if (w1.has_value()) {
    packed = pack_plain(Param(*w1, in.dtype, m * in.c, "w1"), in.dtype, m, in.c, in.c, 1);
  } else {
    args.problem.has_primary = false;
    packed = identity(m, in.dtype);
  }
  args.plan = plan_apply(args.problem, cpu_machine(threads()));
  args.plan.stream = false;  // u is read again at once
  args.x = x.const_data_ptr();
  args.x_image = in.c * in.h * in.w;
  args.x_channel = in.h * in.w;
  args.packed = packed.const_data_ptr();
  args.residual = nullptr;
  args.out = u;
  args.out_image = args.problem.out_pixels();
  args.out_channel = channel_step(in.n * args.problem.out_pixels(), in.dtype);
  const auto kernel = active_kernels().apply_to_compute[int(in.dtype)];
  parallel(args.plan.items, [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

// [m, N, P] of the compute type back to the element type and layout of a tensor.
void store_u(const void* u, const Problem& shape, Tensor& dst, Layout layout) {
  Problem p = shape;
  p.layout = Layout::kNCHW;
  p.channels = p.out_channels = p.intrinsic;
  p.ratio = p.stride = p.dw_size = 1;
  p.has_primary = false;
  p.act1 = p.act2 = {};
  const Tensor unchanged = identity(p.intrinsic, p.dtype);
  ApplyArgs args;
  args.problem = p;
  args.problem.dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  args.plan = plan_apply(args.problem, cpu_machine(threads()));
  args.plan.stream = false;
  args.x = u;
  args.x_image = p.height * p.width;
  args.x_channel = channel_step(p.batch * p.height * p.width, p.dtype);
  args.packed = unchanged.const_data_ptr();
  args.residual = nullptr;
  args.out = dst.mutable_data_ptr();
  args.out_layout = layout;
  args.out_image = p.intrinsic * p.height * p.width;
  args.out_channel = p.height * p.width;
  const auto kernel = active_kernels().apply_from_compute[int(p.dtype)];
  parallel(args.plan.items, [&](int64_t b, int64_t e) { kernel(args, b, e); });
}

struct CheapWeights {
  int64_t g, d, ratio;
};
CheapWeights check_cheap(const Tensor& w2, int64_t m, DType dtype) {
  STD_TORCH_CHECK(w2.dim() == 4 && w2.size(1) == 1 && w2.size(2) == w2.size(3),
                  "w2 must be [g, 1, d, d]");
  STD_TORCH_CHECK(dtype_of(w2, "w2") == dtype, "w2 must have the dtype of x");
  STD_TORCH_CHECK(m > 0 && w2.size(0) % m == 0, "w2 must have a multiple of ", m,
                  " output channels, got ", w2.size(0));
  check_dw_size(w2.size(3));
  return {w2.size(0), w2.size(3), w2.size(0) / m + 1};
}

// The parameters of one norm and of the activation behind it, in the compute type.
struct NormParams {
  Param gamma, beta, mean, var, slopes, means;

  NormArgs args(double eps, bool batch_stats) const {
    return {gamma.data(), beta.data(),   mean.data(), var.data(),
            eps,          slopes.data(), batch_stats, means.data()};
  }
};

// A norm of n channels in front of an activation. `which` is 1 or 2, for messages.
NormParams norm_params(int which, const OptionalTensor& gamma, const OptionalTensor& beta,
                       const OptionalTensor& mean, const OptionalTensor& var,
                       const OptionalTensor& slopes, const OptionalTensor& means,
                       const Activation& act, DType dtype, int64_t n) {
  const auto name = [&](const char* first, const char* second) {
    return which == 1 ? first : second;
  };
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), name("mean1", "mean2"), " and ",
                  name("var1", "var2"), " must both be given, or neither");
  STD_TORCH_CHECK(slopes.has_value() == (act.act == Act::kPReLU), name("prelu1", "prelu2"),
                  " must be given for a PReLU, and only for one");
  return {Param(gamma, dtype, n, name("gamma1", "gamma2")),
          Param(beta, dtype, n, name("beta1", "beta2")),
          Param(mean, dtype, n, name("mean1", "mean2")),
          Param(var, dtype, n, name("var1", "var2")),
          Param(slopes, dtype, n, name("prelu1", "prelu2")),
          Param(means, dtype, 2 * n, name("means1", "means2"))};
}

// ----------------------------------------------------------------------------------------------
// NHWC with channels along the lanes

// Whether the passes of training in NHWC run with channels along the lanes, cpu/lane_train.h.
bool takes_lanes(const Problem& p) {
  return p.layout == Layout::kNHWC && p.stride == 1 && p.ratio == 2 &&
         p.out_channels == 2 * p.intrinsic && element_size(p.dtype) == compute_size(p.dtype) &&
         p.act1.act != Act::kPReLU && p.act2.act != Act::kPReLU && p.batch * p.out_pixels() > 0;
}

// A product of NHWC maps of the compute type: out [N, H, W, rows] from x [N, H, W, C] and packed
// weights.
void lane_product(const Image& x, const void* data, const Tensor& packed, int64_t rows, void* out) {
  ApplyArgs args;
  args.problem = plain_conv(x, rows, 1);
  args.problem.allows_channel_lanes = true;
  args.plan = plan_apply(args.problem, cpu_machine(threads()));
  args.x = data;
  args.x_image = x.c * x.h * x.w;
  args.x_channel = x.h * x.w;
  args.packed = packed.const_data_ptr();
  args.residual = nullptr;
  args.out = out;
  args.out_layout = Layout::kNHWC;
  args.out_image = rows * x.h * x.w;
  args.out_channel = x.h * x.w;
  const auto kernel = active_kernels().apply[int(x.dtype)];
  parallel(args.plan.items, [&](int64_t b, int64_t e) { kernel(args, b, e); });
}
void lane_u(const Tensor& x, const Image& in, const Tensor& w1, int64_t m, void* u) {
  const Param w(w1, in.dtype, m * in.c, "w1");
  lane_product(in, x.const_data_ptr(), pack_plain(w, in.dtype, m, in.c, in.c, 1), m, u);
}

// The passes of one direction over maps in NHWC.
struct LanePasses {
  LaneTrainArgs args{};

  // problem: that of the module, with the height and width of u.
  explicit LanePasses(const Problem& problem) {
    args.problem = problem;
    args.items = lane_items(problem, cpu_machine(threads()));
    const int64_t per_item = (2 + problem.dw_size * problem.dw_size) * problem.intrinsic;
    sums_ = empty({args.items.count * per_item + 4 * problem.intrinsic}, ScalarType::Double);
    args.partial = static_cast<double*>(sums_.mutable_data_ptr());
    args.totals = args.partial + args.items.count * per_item;
  }
  void run(LaneStep pass) const {
    const auto kernel = active_kernels().lane_train[args.problem.dtype == DType::kFloat64];
    parallel(args.items.count, [&](int64_t b, int64_t e) { kernel(args, pass, b, e); });
  }
  void run(LaneStep pass, LaneStep merge) const {
    run(pass);
    active_kernels().lane_train[args.problem.dtype == DType::kFloat64](args, merge, 0, 1);
  }

  void forward() {
    if (args.norm1.mean == nullptr) {
      run(LaneStep::kMoments1, LaneStep::kMergeMoments1);
      args.norm1.mean = args.mean1;
      args.norm1.var = args.var1;
    }
    if (args.norm2.mean == nullptr) {
      run(LaneStep::kMoments2, LaneStep::kMergeMoments2);
      args.norm2.mean = args.mean2;
      args.norm2.var = args.var2;
    }
    run(LaneStep::kForward);
  }
  // du is in args.g1 afterwards, if need_du.
  void backward(bool need_du) const {
    const bool need_dv = args.g1 || args.dw2;
    if (args.grads2.dgamma || (need_dv && args.norm2.batch_stats && !args.norm2.means))
      run(LaneStep::kSums2, LaneStep::kMergeSums2);
    if (need_dv) run(LaneStep::kGrads, LaneStep::kMergeGrads);
    if (need_du) run(LaneStep::kInput);
  }

 private:
  Tensor sums_;
};

// ----------------------------------------------------------------------------------------------
// statistics

std::tuple<Tensor, Tensor> ghost_primary_stats(const Tensor& x, const OptionalTensor& w1,
                                               int64_t stride) {
  const Image in = image_of(x, "x");
  if (w1.has_value()) check_primary(*w1, in);
  const int64_t m = w1.has_value() ? w1->size(0) : in.c;
  Problem p = plain_conv(in, m, w1.has_value() ? stride : 1);
  const int64_t P = p.out_pixels();
  const ScalarType ct = compute_type(in.dtype);
  Tensor mean = empty({m}, ct), var = empty({m}, ct);
  if (!w1.has_value() && in.layout == Layout::kNHWC && in.n * P > 0 &&
      element_size(in.dtype) == compute_size(in.dtype)) {
    LanePasses lanes(p);
    lanes.args.u = x.const_data_ptr();
    lanes.args.mean1 = mean.mutable_data_ptr();
    lanes.args.var1 = var.mutable_data_ptr();
    lanes.run(LaneStep::kMoments1, LaneStep::kMergeMoments1);
    return {mean, var};
  }
  const int64_t step = channel_step(in.n * P, in.dtype);
  Tensor u = empty({m, step}, ct);
  compute_u(x, in, w1, m, p.stride, u.mutable_data_ptr());
  ChannelArgs args{};
  args.problem = p;
  args.problem.height = p.out_height();
  args.problem.width = p.out_width();
  args.problem.layout = Layout::kNCHW;
  args.u = u.mutable_data_ptr();
  args.u_step = step;
  args.mean1 = mean.mutable_data_ptr();
  args.var1 = var.mutable_data_ptr();
  const auto kernel = active_kernels().primary_stats[in.dtype == DType::kFloat64];
  parallel(channel_items(args.problem), [&](int64_t b, int64_t e) { kernel(args, b, e); });
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
  const int64_t g = p.ghosts(), P = p.out_pixels();
  const bool prelu = p.act1.act == Act::kPReLU;
  const PackedLayout at = layout_of_packed(p, packed, prelu ? intrinsic : 0);
  const ScalarType ct = compute_type(in.dtype);
  Tensor mean = empty({g}, ct), var = empty({g}, ct);
  const auto in_packed = [&](int64_t offset) {
    return static_cast<const char*>(packed.const_data_ptr()) + offset * compute_size(in.dtype);
  };
  Problem whole = p;
  whole.out_channels = intrinsic * ratio;
  if (!has_primary && takes_lanes(whole)) {
    // The first norm has its scale and shift in `packed`: one of mean 0 and variance 1.
    const Tensor both = identity(intrinsic, in.dtype);  // ones, then zeros
    const char* const ones = static_cast<const char*>(both.const_data_ptr());
    LanePasses lanes(whole);
    lanes.args.u = x.const_data_ptr();
    lanes.args.w2 = in_packed(at.w2);
    lanes.args.norm1 = {in_packed(at.scale1), in_packed(at.shift1),
                        ones + intrinsic * compute_size(in.dtype), ones, 0.0};
    lanes.args.mean2 = mean.mutable_data_ptr();
    lanes.args.var2 = var.mutable_data_ptr();
    lanes.run(LaneStep::kMoments2, LaneStep::kMergeMoments2);
    return {mean, var};
  }
  const int64_t step = channel_step(in.n * P, in.dtype);
  Tensor y = empty({intrinsic, step}, ct);
  ApplyArgs apply;
  apply.problem = p;
  apply.problem.ratio = 1;  // y only
  apply.plan = plan_apply(apply.problem, cpu_machine(threads()));
  apply.plan.stream = false;
  apply.x = x.const_data_ptr();
  apply.x_image = in.c * in.h * in.w;
  apply.x_channel = in.h * in.w;
  apply.packed = packed.const_data_ptr();
  if (prelu) apply.slopes1 = in_packed(at.numel);
  apply.residual = nullptr;
  apply.out = y.mutable_data_ptr();
  apply.out_image = P;
  apply.out_channel = step;
  const auto to_y = active_kernels().apply_to_compute[int(in.dtype)];
  parallel(apply.plan.items, [&](int64_t b, int64_t e) { to_y(apply, b, e); });

  ChannelArgs args{};
  args.problem = p;
  args.problem.height = p.out_height();
  args.problem.width = p.out_width();
  args.problem.layout = Layout::kNCHW;
  args.problem.out_channels = intrinsic * ratio;
  args.u = y.mutable_data_ptr();
  args.u_step = step;
  args.u_is_y = true;
  args.w2 = in_packed(at.w2);
  args.mean2 = mean.mutable_data_ptr();
  args.var2 = var.mutable_data_ptr();
  const auto kernel = active_kernels().channels_forward[int(in.dtype)];
  parallel(channel_items(args.problem), [&](int64_t b, int64_t e) { kernel(args, b, e); });
  return {mean, var};
}

// ----------------------------------------------------------------------------------------------
// training

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ghost_train_forward(
    const Tensor& x, const OptionalTensor& w1, const OptionalTensor& gamma1,
    const OptionalTensor& beta1, const OptionalTensor& mean1, const OptionalTensor& var1,
    double eps1, const OptionalTensor& prelu1, const Tensor& w2, const OptionalTensor& gamma2,
    const OptionalTensor& beta2, const OptionalTensor& mean2, const OptionalTensor& var2,
    double eps2, const OptionalTensor& prelu2, int64_t out_channels, int64_t stride, int64_t act1,
    double slope1, int64_t act2, double slope2, bool keep_u) {
  const Image in = image_of(x, "x");
  if (w1.has_value()) check_primary(*w1, in);
  const int64_t m = w1.has_value() ? w1->size(0) : in.c;
  const CheapWeights cheap = check_cheap(w2, m, in.dtype);
  STD_TORCH_CHECK(m <= out_channels && out_channels <= m * cheap.ratio,
                  "out_channels must lie in [", m, ", ", m * cheap.ratio, "], got ", out_channels);
  Problem p = plain_conv(in, m, w1.has_value() ? stride : 1);
  p.out_channels = out_channels;
  p.ratio = cheap.ratio;
  p.dw_size = cheap.d;
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.act2 = activation_or_prelu(act2, slope2, "act2");
  const int64_t H = p.out_height(), W = p.out_width(), P = H * W;
  const ScalarType ct = compute_type(in.dtype);
  const NormParams norm1 = norm_params(1, gamma1, beta1, mean1, var1, prelu1, std::nullopt, p.act1,
                                       in.dtype, m),
                   norm2 = norm_params(2, gamma2, beta2, mean2, var2, prelu2, std::nullopt, p.act2,
                                       in.dtype, cheap.g);
  const Param taps(w2, in.dtype, cheap.g * cheap.d * cheap.d, "w2");
  Tensor out = empty({in.n, out_channels, H, W}, x.scalar_type(), in.layout);
  const int64_t count1 = mean1.has_value() ? 0 : m, count2 = mean2.has_value() ? 0 : cheap.g;
  Tensor found_mean1 = empty({count1}, ct), found_var1 = empty({count1}, ct),
         found_mean2 = empty({count2}, ct), found_var2 = empty({count2}, ct);
  Tensor kept =
      keep_u ? empty({in.n, m, H, W}, x.scalar_type(), in.layout) : empty({0}, x.scalar_type());

  if (takes_lanes(p)) {
    Tensor u = x;
    if (w1.has_value()) {
      u = keep_u ? kept : empty({in.n * P, m}, ct);
      lane_u(x, in, *w1, m, u.mutable_data_ptr());
    } else if (keep_u) {
      torch::stable::copy_(kept, x);
    }
    LanePasses lanes(p);
    lanes.args.u = u.const_data_ptr();
    lanes.args.w2 = taps.data();
    lanes.args.norm1 = norm1.args(eps1, false);
    lanes.args.norm2 = norm2.args(eps2, false);
    lanes.args.out = out.mutable_data_ptr();
    lanes.args.mean1 = found_mean1.mutable_data_ptr();
    lanes.args.var1 = found_var1.mutable_data_ptr();
    lanes.args.mean2 = found_mean2.mutable_data_ptr();
    lanes.args.var2 = found_var2.mutable_data_ptr();
    lanes.forward();
    return {out, found_mean1, found_var1, found_mean2, found_var2, kept};
  }

  const int64_t step = channel_step(in.n * P, in.dtype);
  Tensor scratch = empty({m, step}, ct);  // u; dies with the call
  compute_u(x, in, w1, m, stride, scratch.mutable_data_ptr());

  ChannelArgs args{};
  args.problem = p;
  args.problem.height = H;
  args.problem.width = W;
  if (keep_u) store_u(scratch.const_data_ptr(), args.problem, kept, in.layout);
  args.u = scratch.mutable_data_ptr();
  args.u_step = step;
  args.w2 = taps.data();
  args.norm1 = norm1.args(eps1, false);
  args.norm2 = norm2.args(eps2, false);
  args.out = out.mutable_data_ptr();
  args.mean1 = found_mean1.mutable_data_ptr();
  args.var1 = found_var1.mutable_data_ptr();
  args.mean2 = found_mean2.mutable_data_ptr();
  args.var2 = found_var2.mutable_data_ptr();
  const auto kernel = active_kernels().channels_forward[int(in.dtype)];
  parallel(channel_items(args.problem), [&](int64_t b, int64_t e) { kernel(args, b, e); });
  return {out, found_mean1, found_var1, found_mean2, found_var2, kept};
}

void check_u(const Image& u, const Image& x, int64_t m, int64_t H, int64_t W) {
  STD_TORCH_CHECK(u.n == x.n && u.c == m && u.h == H && u.w == W && u.dtype == x.dtype,
                  "u must be [", x.n, ", ", m, ", ", H, ", ", W, "] of the dtype of x");
}

// dw1 [m, C, 1, 1] of the compute type. du: as in WeightGradArgs.
Tensor weight_gradient(const Tensor& x, const Image& in, const void* du, int64_t du_step, int64_t m,
                       int64_t stride) {
  Tensor sums = empty({m, in.c, 1, 1}, compute_type(in.dtype));
  WeightGradArgs args{};
  args.problem = plain_conv(in, m, stride);
  args.du = du;
  args.du_step = du_step;
  args.x = x.const_data_ptr();
  args.dw1 = sums.mutable_data_ptr();
  args.path = plan_weight_grad(args.problem, cpu_machine(threads()));
  const auto kernel = active_kernels().weight_grad[int(in.dtype)];
  parallel(weight_grad_items(args.problem), [&](int64_t b, int64_t e) { kernel(args, b, e); });
  return sums;
}

// The gradients of one norm's parameters and of the slopes behind it, empty where not needed.
struct NormGradTensors {
  Tensor dgamma, dbeta, dslopes;

  NormGradTensors(int64_t n, bool norm, bool slopes, ScalarType type)
      : dgamma(empty({norm ? n : 0}, type)),
        dbeta(empty({norm ? n : 0}, type)),
        dslopes(empty({slopes ? n : 0}, type)) {}

  NormGrads args() const { return {memory(dgamma), memory(dbeta), memory(dslopes)}; }

 private:
  static void* memory(const Tensor& t) {
    return t.numel() > 0 ? Tensor(t).mutable_data_ptr() : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ghost_backward(
    const Tensor& grad_out, const Tensor& x, const OptionalTensor& u, const OptionalTensor& w1,
    const OptionalTensor& gamma1, const OptionalTensor& beta1, const Tensor& mean1,
    const Tensor& var1, double eps1, const OptionalTensor& prelu1, const OptionalTensor& means1,
    const Tensor& w2, const OptionalTensor& gamma2, const OptionalTensor& beta2,
    const Tensor& mean2, const Tensor& var2, double eps2, const OptionalTensor& prelu2,
    const OptionalTensor& means2, int64_t stride, int64_t act1, double slope1, int64_t act2,
    double slope2, bool batch_stats1, bool batch_stats2, int64_t needs) {
  const Image in = image_of(x, "x");
  if (w1.has_value()) check_primary(*w1, in);
  const int64_t m = w1.has_value() ? w1->size(0) : in.c, step = w1.has_value() ? stride : 1;
  const CheapWeights cheap = check_cheap(w2, m, in.dtype);
  Problem p = plain_conv(in, m, step);
  const int64_t H = p.out_height(), W = p.out_width(), P = H * W;
  STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.size(0) == in.n && grad_out.size(2) == H &&
                      grad_out.size(3) == W && grad_out.scalar_type() == x.scalar_type(),
                  "grad_out must be [", in.n, ", oup, ", H, ", ", W, "] of the dtype of x");
  p.out_channels = grad_out.size(1);
  p.ratio = cheap.ratio;
  p.dw_size = cheap.d;
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.act2 = activation_or_prelu(act2, slope2, "act2");
  STD_TORCH_CHECK(m <= p.out_channels && p.out_channels <= m * cheap.ratio, "grad_out must have ",
                  m, " to ", m * cheap.ratio, " channels, got ", p.out_channels);
  const ScalarType ct = compute_type(in.dtype);
  const int64_t taps_count = cheap.d * cheap.d;
  const NormParams norm1 = norm_params(1, gamma1, beta1, mean1, var1, prelu1, means1, p.act1,
                                       in.dtype, m),
                   norm2 = norm_params(2, gamma2, beta2, mean2, var2, prelu2, means2, p.act2,
                                       in.dtype, cheap.g);
  const Param taps(w2, in.dtype, cheap.g * taps_count, "w2");
  STD_TORCH_CHECK(0 <= needs && needs <= kNeedAll, "needs must be a mask of ", int(kNeedAll),
                  ", got ", needs);
  const bool need_dx = needs & kNeedDx, need_dw1 = (needs & kNeedDw1) && w1.has_value(),
             need_dw2 = needs & kNeedDw2;
  const NormGradTensors grads1(m, needs & kNeedNorm1, (needs & kNeedPrelu1) && prelu1, ct),
      grads2(cheap.g, needs & kNeedNorm2, (needs & kNeedPrelu2) && prelu2, ct);

  if (takes_lanes(p)) {
    const Tensor grad = in_layout(grad_out, in.layout);
    Tensor dw2 = need_dw2 ? empty({cheap.g, 1, cheap.d, cheap.d}, ct) : empty({0}, ct);
    Tensor dx = empty({0}, ct), dw1 = empty({0}, ct), made = x, g1;
    LanePasses lanes(p);
    LaneTrainArgs& args = lanes.args;
    if (u.has_value() && u->numel() > 0) {
      made = in_layout(*u, in.layout);
      check_u(image_of(made, "u"), in, m, H, W);
    } else if (w1.has_value()) {
      made = empty({in.n * P, m}, ct);
      lane_u(x, in, *w1, m, made.mutable_data_ptr());
    }
    args.u = made.const_data_ptr();
    args.w2 = taps.data();
    args.norm1 = norm1.args(eps1, batch_stats1);
    args.norm2 = norm2.args(eps2, batch_stats2);
    args.grad_out = grad.const_data_ptr();
    args.dw2 = need_dw2 ? dw2.mutable_data_ptr() : nullptr;
    args.grads1 = grads1.args();
    args.grads2 = grads2.args();
    const bool need_du = need_dx || need_dw1;
    if (need_du || args.grads1.dgamma) {
      g1 = empty({in.n, m, H, W}, ct, in.layout);
      args.g1 = g1.mutable_data_ptr();
    }
    lanes.backward(need_du);
    if (need_dx && !w1.has_value()) {
      dx = g1;
    } else if (need_dx) {
      dx = empty({in.n, in.c, in.h, in.w}, ct, in.layout);
      const Param w(*w1, in.dtype, m * in.c, "w1");
      lane_product({in.n, m, H, W, Layout::kNHWC, in.dtype}, args.g1,
                   pack_plain(w, in.dtype, in.c, m, 1, in.c), in.c, dx.mutable_data_ptr());
    }
    if (need_dw1) dw1 = weight_gradient(x, in, args.g1, 1, m, step);
    return {dx,  dw1,           grads1.dgamma, grads1.dbeta,  grads1.dslopes,
            dw2, grads2.dgamma, grads2.dbeta,  grads2.dslopes};
  }

  // u again, from the kept copy or by the product; du replaces it in place.
  const int64_t u_step = channel_step(in.n * P, in.dtype);
  Tensor scratch = empty({m, u_step}, ct);
  const bool kept = u.has_value() && u->numel() > 0;
  if (kept) {
    const Tensor dense = is_dense(*u, Layout::kNCHW) || is_dense(*u, Layout::kNHWC)
                             ? *u
                             : torch::stable::contiguous(*u);
    const Image ku = image_of(dense, "u");
    check_u(ku, in, m, H, W);
    compute_u(dense, ku, std::nullopt, m, 1, scratch.mutable_data_ptr());
  } else {
    compute_u(x, in, w1, m, stride, scratch.mutable_data_ptr());
  }

  // The gradient may arrive expanded or in the other memory format.
  Layout grad_layout = is_dense(grad_out, in.layout)       ? in.layout
                       : is_dense(grad_out, Layout::kNCHW) ? Layout::kNCHW
                                                           : Layout::kNHWC;
  Tensor grad = grad_out;
  if (!is_dense(grad, grad_layout)) {
    grad_layout = in.layout;
    grad = torch::stable::contiguous(grad, memory_format(grad_layout));
  }
  Tensor dw2 = need_dw2 ? empty({cheap.g, 1, cheap.d, cheap.d}, ct) : empty({0}, ct);
  ChannelArgs args{};
  args.problem = p;
  args.problem.height = H;
  args.problem.width = W;
  args.problem.layout = grad_layout;
  args.u = scratch.mutable_data_ptr();
  args.u_step = u_step;
  args.w2 = taps.data();
  args.norm1 = norm1.args(eps1, batch_stats1);
  args.norm2 = norm2.args(eps2, batch_stats2);
  args.grad_out = grad.const_data_ptr();
  args.need_du = need_dx || need_dw1;
  args.dw2 = need_dw2 ? dw2.mutable_data_ptr() : nullptr;
  args.grads1 = grads1.args();
  args.grads2 = grads2.args();
  const Kernels& k = active_kernels();
  const auto channels = k.channels_backward[int(in.dtype)];
  parallel(channel_items(args.problem), [&](int64_t b, int64_t e) { channels(args, b, e); });

  Tensor dx = empty({0}, x.scalar_type()), dw1 = empty({0}, x.scalar_type());
  if (need_dx) {
    dx = empty({in.n, in.c, in.h, in.w}, x.scalar_type(), in.layout);
    if (!w1.has_value()) {
      store_u(scratch.const_data_ptr(), args.problem, dx, in.layout);
    } else {
      if (step > 1) torch::stable::zero_(dx);  // pixels the strided convolution never read
      const Param w(*w1, in.dtype, m * in.c, "w1");
      const Tensor packed = pack_plain(w, in.dtype, in.c, m, 1, in.c);
      ApplyArgs gemm;
      gemm.problem = plain_conv({in.n, m, H, W, Layout::kNCHW,
                                 in.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32},
                                in.c, 1);
      gemm.problem.joined = true;
      gemm.plan = plan_apply(gemm.problem, cpu_machine(threads()));
      gemm.plan.stream =
          gemm.plan.stream && in.layout == Layout::kNCHW && x.scalar_type() == ct && step == 1;
      gemm.x = scratch.const_data_ptr();
      gemm.x_image = P;
      gemm.x_channel = u_step;
      gemm.packed = packed.const_data_ptr();
      gemm.residual = nullptr;
      gemm.out = dx.mutable_data_ptr();
      gemm.out_layout = in.layout;
      gemm.out_image = in.c * in.h * in.w;
      gemm.out_channel = in.h * in.w;
      gemm.scatter = step;
      gemm.scatter_width = in.w;
      const auto kernel = k.apply_from_compute[int(in.dtype)];
      parallel(gemm.plan.items, [&](int64_t b, int64_t e) { kernel(gemm, b, e); });
    }
  }
  if (need_dw1) {
    const Tensor sums = weight_gradient(x, in, scratch.const_data_ptr(), u_step, m, step);
    dw1 = x.scalar_type() == ct ? sums : torch::stable::to(sums, x.scalar_type());
  }
  if (w2.scalar_type() != ct) dw2 = torch::stable::to(dw2, w2.scalar_type());
  return {dx,  dw1,           grads1.dgamma, grads1.dbeta,  grads1.dslopes,
          dw2, grads2.dgamma, grads2.dbeta,  grads2.dslopes};
}

// The running statistics of one batch norm and its counter, each of which may be absent. All is
// checked before the first number changes.
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
    const double unbias = count > 1 ? double(count) / double(count - 1) : 1.0;
    with_dtype(storage_, [&](auto zero) {
      using A = decltype(zero);
      blend(*running_mean_, mean_.as<A>(), share, 1.0);
      blend(*running_var_, var_.as<A>(), share, unbias);
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
  m.impl("ghost_backward", TORCH_BOX(&ghost::ghost_backward));
  m.impl("ghost_update_running_", TORCH_BOX(&ghost::ghost_update_running_));
}
