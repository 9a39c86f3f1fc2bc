// The operators between Ghost modules on the CPU: checks, allocation and calls of kernels. No
// arithmetic. Schemas: ghost_ops/ops/depthwise.py and ghost_ops/ops/gate.py.
#include "torch/cpu_layers.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cpu/copies.h"
#include "torch/cpu_common.h"

namespace ghost {
namespace {

// The sizes of a depthwise convolution of x with padding kernel_size / 2.
DepthwiseArgs depthwise_shape(const Tensor& x, int64_t kernel_size, int64_t stride) {
  const int64_t k = kernel_size;
  STD_TORCH_CHECK(k == 1 || k == 3 || k == 5 || k == 7, "kernel_size must be 1, 3, 5 or 7, got ",
                  k);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  DepthwiseArgs a{};
  a.batch = x.size(0);
  a.channels = x.size(1);
  a.height = x.size(2);
  a.width = x.size(3);
  a.out_height = a.height > 0 ? (a.height - 1) / stride + 1 : 0;
  a.out_width = a.width > 0 ? (a.width - 1) / stride + 1 : 0;
  a.kernel = k;
  a.stride = stride;
  return a;
}

}  // namespace

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor& shift,
                      int64_t kernel_size, int64_t stride, int64_t act, double slope) {
  const Layout layout = layout_of(x, "x");
  const DType dtype = dtype_of(x, "x");
  const int64_t C = x.size(1), k = kernel_size;
  DepthwiseArgs a = depthwise_shape(x, k, stride);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == C && weight.size(1) == 1 &&
                      weight.size(2) == k && weight.size(3) == k,
                  "weight must be [", C, ", 1, ", k, ", ", k, "]");
  // The weight may be a view of [k, k, 1, C], the order that NHWC reads.
  const bool taps_first =
      weight.stride(0) == 1 && weight.stride(3) == C && weight.stride(2) == k * C;
  for (const Tensor* t : {&weight, &shift})
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == compute_type(dtype) &&
                        (t->is_contiguous() || (t == &weight && taps_first)),
                    "weight and shift must be contiguous and in the compute dtype of x");
  STD_TORCH_CHECK(shift.numel() == C, "shift must have ", C, " elements, got ", shift.numel());
  a.act = activation(act, slope, "act");
  a.layout = layout;
  Tensor out = empty({a.batch, C, a.out_height, a.out_width}, x.scalar_type(), layout);
  if (out.numel() == 0) return out;
  Tensor taps = weight;
  if (layout == Layout::kNCHW)
    taps = torch::stable::contiguous(weight);
  else if (!taps_first)  // [C, k * k] -> [k * k, C]
    taps = torch::stable::contiguous(torch::stable::transpose(
        torch::stable::view(torch::stable::contiguous(weight), {C, k * k}), 0, 1));
  a.x = x.const_data_ptr();
  a.weight = taps.const_data_ptr();
  a.shift = shift.const_data_ptr();
  a.out = out.mutable_data_ptr();
  run(active_isa().layers.depthwise[int(dtype)], a, depthwise_items(a));
  return out;
}

namespace {

// The arguments of both directions of training; `args` points into the members' tensors.
struct DepthwiseNorm {
  DepthwiseNorm(const Tensor& x, const Tensor& weight, const OptionalTensor& gamma,
                const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var,
                double eps, int64_t stride, int64_t act, double slope)
      : image(image_of(x, "x")),
        norm_("", image.dtype, image.c, eps, gamma, beta, mean, var),
        taps_(weight, image.dtype, weight.numel(), "weight") {
    const int64_t k = weight.dim() == 4 ? weight.size(3) : 0;
    args.conv = depthwise_shape(x, k, stride);
    STD_TORCH_CHECK(weight.size(0) == image.c && weight.numel() == image.c * k * k,
                    "weight must be [", image.c, ", 1, k, k]");
    STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must both be given");
    args.conv.act = activation(act, slope, "act");
    args.conv.layout = image.layout;
    args.conv.x = x.const_data_ptr();
    args.conv.weight = taps_.data();
    args.norm = norm_.args();
    args.has_norm = mean.has_value();
  }

  void compute() {
    if (!args.has_norm) args.norm = {};
    run(active_isa().layers.depthwise_norm[int(image.dtype)], args, depthwise_norm_items(args));
  }

  Image image;
  DepthwiseNormArgs args{};

 private:
  NormParams norm_;
  Param taps_;
};

std::tuple<Tensor, Tensor, Tensor> depthwise_norm(
    const Tensor& x, const Tensor& weight, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& mean, const OptionalTensor& var, double eps, bool batch_stats,
    int64_t stride, int64_t act, double slope) {
  DepthwiseNorm pass(x, weight, gamma, beta, mean, var, eps, stride, act, slope);
  DepthwiseNormArgs& a = pass.args;
  STD_TORCH_CHECK(!batch_stats || !a.has_norm,
                  "with the batch's statistics none can be given: mean and var must be None");
  const ScalarType ct = compute_type(pass.image.dtype);
  const int64_t stats = batch_stats ? a.conv.channels : 0;
  Tensor out = empty({a.conv.batch, a.conv.channels, a.conv.out_height, a.conv.out_width},
                     x.scalar_type(), a.conv.layout);
  Tensor batch_mean = empty({stats}, ct), batch_var = empty({stats}, ct);
  a.batch_stats = batch_stats;
  a.has_norm = a.has_norm || batch_stats;
  a.conv.out = out.mutable_data_ptr();
  a.mean = batch_mean.mutable_data_ptr();
  a.var = batch_var.mutable_data_ptr();
  pass.compute();
  return {out, batch_mean, batch_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var, double eps,
    bool batch_stats, int64_t stride, int64_t act, double slope, bool need_dx, bool need_dw) {
  DepthwiseNorm pass(x, weight, gamma, beta, mean, var, eps, stride, act, slope);
  DepthwiseNormArgs& a = pass.args;
  const Image& image = pass.image;
  STD_TORCH_CHECK(a.has_norm || !batch_stats, "the batch's statistics must be given");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == image.n && grad.size(1) == image.c &&
                      grad.size(2) == a.conv.out_height && grad.size(3) == a.conv.out_width &&
                      grad.scalar_type() == x.scalar_type(),
                  "grad must be [", image.n, ", ", image.c, ", ", a.conv.out_height, ", ",
                  a.conv.out_width, "] of the dtype of x");
  const ScalarType ct = compute_type(image.dtype);
  const Tensor dense = in_layout(grad, image.layout);
  Tensor dx =
      empty_if(need_dx, {image.n, image.c, image.h, image.w}, x.scalar_type(), image.layout);
  Tensor dw = empty_if(need_dw, {image.c, 1, a.conv.kernel, a.conv.kernel}, ct);
  const int64_t of_norm = a.has_norm ? image.c : 0;
  Tensor dgamma = empty({of_norm}, ct), dbeta = empty({of_norm}, ct);
  a.batch_stats = batch_stats;
  a.grad = dense.const_data_ptr();
  a.dx = data_if(need_dx, dx);
  a.dw = data_if(need_dw, dw);
  a.dgamma = data_if(of_norm > 0, dgamma);
  a.dbeta = data_if(of_norm > 0, dbeta);
  pass.compute();
  return {dx, dw, dgamma, dbeta};
}

PlaneArgs planes(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && is_dense(x, Layout::kNCHW), name,
                  " must be a contiguous [N, C, H, W] on the CPU");
  PlaneArgs a{};
  a.x = x.const_data_ptr();
  a.pixels = x.size(2) * x.size(3);
  return a;
}

Tensor plane_affine(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  const DType dtype = dtype_of(x, "x");
  PlaneArgs a = planes(x, "x");
  const int64_t count = x.size(0) * x.size(1);
  for (const Tensor* t : {&scale, &shift})
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == compute_type(dtype) && t->is_contiguous() &&
                        t->numel() == count,
                    "scale and shift must be a contiguous [N, C] in the compute dtype of x");
  Tensor out = empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  a.scale = scale.const_data_ptr();
  a.shift = shift.const_data_ptr();
  a.out = out.mutable_data_ptr();
  run(active_isa().layers.plane_affine[int(dtype)], a, count);
  return out;
}

Tensor plane_dot(const Tensor& x, const Tensor& other) {
  const DType dtype = dtype_of(x, "x");
  PlaneArgs a = planes(x, "x");
  a.other = planes(other, "other").x;
  STD_TORCH_CHECK(other.numel() == x.numel() && other.scalar_type() == x.scalar_type(),
                  "x and other must have one shape and dtype");
  Tensor out = empty({x.size(0), x.size(1)}, compute_type(dtype));
  a.out = out.mutable_data_ptr();
  run(active_isa().layers.plane_dot[int(dtype)], a, x.size(0) * x.size(1));
  return out;
}

}  // namespace

void squeeze_excite_(Tensor x, const Tensor& w_reduce, const Tensor& b_reduce,
                     const Tensor& w_expand, const Tensor& b_expand, int64_t act, double slope,
                     int64_t gate) {
  const Layout layout = layout_of(x, "x");
  const DType dtype = dtype_of(x, "x");
  const int64_t C = x.size(1), R = b_reduce.numel();
  STD_TORCH_CHECK(w_reduce.dim() == 2 && w_reduce.size(0) == R && w_reduce.size(1) == C,
                  "w_reduce must be [", R, ", ", C, "]");
  STD_TORCH_CHECK(w_expand.dim() == 2 && w_expand.size(0) == R && w_expand.size(1) == C,
                  "w_expand must be [", R, ", ", C, "]");
  STD_TORCH_CHECK(b_expand.numel() == C, "b_expand must have ", C, " elements, got ",
                  b_expand.numel());
  STD_TORCH_CHECK(gate == 0 || gate == 1, "gate must be 0 (hard sigmoid) or 1 (sigmoid), got ",
                  gate);
  for (const Tensor* t : {&w_reduce, &b_reduce, &w_expand, &b_expand})
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == compute_type(dtype) && t->is_contiguous(),
                    "the gate's parameters must be contiguous and in the compute dtype of x");
  if (x.numel() == 0) return;
  const int64_t N = x.size(0);
  Tensor means = empty({N, C}, compute_type(dtype)), hidden = empty({N, R}, compute_type(dtype));
  GateArgs a{};
  a.x = x.mutable_data_ptr();
  a.w_reduce = w_reduce.const_data_ptr();
  a.b_reduce = b_reduce.const_data_ptr();
  a.w_expand = w_expand.const_data_ptr();
  a.b_expand = b_expand.const_data_ptr();
  a.means = means.mutable_data_ptr();
  a.hidden = hidden.mutable_data_ptr();
  a.batch = N;
  a.channels = C;
  a.reduced = R;
  a.pixels = x.size(2) * x.size(3);
  a.act = activation(act, slope, "act");
  a.sigmoid = gate == 1;
  a.layout = layout;
  const LayerKernels& k = active_isa().layers;
  const int d = int(dtype);
  const auto means_of = k.gate_means[d];
  const auto values_of = k.gate_values[dtype == DType::kFloat64];
  const auto scale = k.gate_scale[d];
  const int64_t blocks = gate_blocks(a);
  if (N < threads()) {
    auto by_channels = [&](auto f) {
      parallel(N * blocks, [&](int64_t b, int64_t e) {
        for (int64_t i = b; i < e; ++i) {
          const int64_t n = i / blocks, c = i % blocks * kGateChannels;
          f(a, n, n + 1, c, std::min(c + kGateChannels, C));
        }
      });
    };
    by_channels(means_of);
    values_of(a, 0, N);
    by_channels(scale);
    return;
  }
  const int64_t some = gate_images(a, element_size(dtype), cpu_machine(1).l2_bytes);
  parallel((N + some - 1) / some, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      const int64_t n0 = i * some, n1 = std::min(n0 + some, N);
      means_of(a, n0, n1, 0, C);
      values_of(a, n0, n1);
      scale(a, n0, n1, 0, C);
    }
  });
}

Tensor sum(Tensor x, const OptionalTensor& other, const Activation& act, bool in_place) {
  const Layout layout = layout_of(x, "x");
  const DType dtype = dtype_of(x, "x");
  if (other) {
    bool same = other->dim() == 4 && other->scalar_type() == x.scalar_type();
    for (int d = 0; d < 4; ++d) same = same && other->size(d) == x.size(d);
    STD_TORCH_CHECK(same && is_dense(*other, layout),
                    "the terms of a sum must have one shape, dtype and layout");
  }
  Tensor out =
      in_place ? x : empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), layout);
  const SumArgs a{x.const_data_ptr(), other ? other->const_data_ptr() : nullptr,
                  out.mutable_data_ptr(), x.numel(), act};
  run(active_isa().layers.sum[int(dtype)], a, sum_items(a));
  return out;
}

Tensor concat(const std::vector<Tensor>& values) {
  const Tensor& first = values.at(0);
  const Layout layout = layout_of(first, "x");
  int64_t channels = 0;
  for (const Tensor& t : values) {
    bool same = t.dim() == 4 && t.scalar_type() == first.scalar_type();
    for (int d : {0, 2, 3}) same = same && t.size(d) == first.size(d);
    STD_TORCH_CHECK(same && is_dense(t, layout),
                    "what is concatenated must have one size, dtype and layout");
    channels += t.size(1);
  }
  Tensor out =
      empty({first.size(0), channels, first.size(2), first.size(3)}, first.scalar_type(), layout);
  // Bytes of a channel that are contiguous, and the number of such runs.
  const bool nhwc = layout == Layout::kNHWC;
  const int64_t pixels = first.size(2) * first.size(3), runs = first.size(0) * (nhwc ? pixels : 1),
                bytes = element_size(dtype_of(first, "x")) * (nhwc ? 1 : pixels);
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t per = runs_per_item(channels * bytes);
  parallel((runs + per - 1) / per, [&](int64_t b, int64_t e) {
    int64_t offset = 0;
    for (const Tensor& t : values) {
      const int64_t some = t.size(1) * bytes;
      spread_runs(static_cast<const char*>(t.const_data_ptr()), some, to + offset, channels * bytes,
                  b * per, std::min(e * per, runs));
      offset += some;
    }
  });
  return out;
}

Tensor pixel_means(const Tensor& x) {
  const DType dtype = dtype_of(x, "x");
  const int64_t N = x.size(0), C = x.size(1);
  const Layout layout = layout_of(x, "x");
  Tensor means = empty({1, C, 1, N}, compute_type(dtype), Layout::kNHWC);
  GateArgs a{};
  a.x = const_cast<void*>(x.const_data_ptr());
  a.means = means.mutable_data_ptr();
  a.batch = N;
  a.channels = C;
  a.pixels = x.size(2) * x.size(3);
  a.layout = layout;
  const auto kernel = active_isa().layers.gate_means[int(dtype)];
  parallel(N, [&](int64_t b, int64_t e) { kernel(a, b, e, 0, C); });
  return means.scalar_type() == x.scalar_type() ? means : torch::stable::to(means, x.scalar_type());
}

// The transposition of images of three channels here is several times as fast as PyTorch's copy.
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

}  // namespace ghost

STABLE_TORCH_LIBRARY_IMPL(ghost_ops, CPU, m) {
  m.impl("depthwise_conv", TORCH_BOX(&ghost::depthwise_conv));
  m.impl("depthwise_norm", TORCH_BOX(&ghost::depthwise_norm));
  m.impl("depthwise_norm_backward", TORCH_BOX(&ghost::depthwise_norm_backward));
  m.impl("plane_affine", TORCH_BOX(&ghost::plane_affine));
  m.impl("plane_dot", TORCH_BOX(&ghost::plane_dot));
  m.impl("squeeze_excite_", TORCH_BOX(&ghost::squeeze_excite_));
}
