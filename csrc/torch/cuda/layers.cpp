// The operators between the Ghost modules of a network on CUDA: checks, allocation, plan and
// launches; no arithmetic. Schemas: depthwise.py, conv.py and gate.py in ghost_ops/ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "cuda/layers.h"
#include "torch/cuda/common.h"

namespace ghost {
namespace {

// Raises unless t is a contiguous vector or matrix of parameters of this dtype and size.
void check_parameter(const Tensor& t, const Tensor& x, ScalarType type, int64_t numel,
                     const char* name) {
  check_device(t, x, name);
  STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous(), name,
                  " must be contiguous and in the dtype that the packing gives it");
}

// The alignment of the memory of t in bytes, at most 16.
int64_t alignment_of(const Tensor& t) {
  int64_t bytes = 16;
  while (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % size_t(bytes) != 0) bytes /= 2;
  return bytes;
}

// t, or a copy of it if it is not aligned to 16 bytes: the kernels read parameters in vectors of up
// to 16 bytes.
Tensor aligned(const Tensor& t) {
  return alignment_of(t) == 16 ? t : torch::stable::clone(t);
}

// Taps [d * d, C]: a view of a weight [C, 1, d, d] that was packed in this order, else a copy.
Tensor taps_first(const Tensor& weight, int64_t channels, int64_t d) {
  Tensor taps = torch::stable::transpose(torch::stable::view(weight, {channels, d * d}), 0, 1);
  return aligned(taps.is_contiguous() ? taps : torch::stable::contiguous(taps));
}

std::tuple<Tensor, Tensor> depthwise(const Tensor& x, const Tensor& weight, const Tensor& shift,
                                     int64_t kernel_size, int64_t stride, int64_t act, double slope,
                                     bool sums) {
  Problem p = problem_of(x);
  p.ratio = 1;
  check_sizes(p);
  const int64_t C = p.channels, k = kernel_size;
  check_dw_size(k);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  check_device(weight, x, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == C && weight.size(1) == 1 &&
                      weight.size(2) == k && weight.size(3) == k &&
                      weight.scalar_type() == compute_type(p.dtype),
                  "weight must be [", C, ", 1, ", k, ", ", k, "] in the compute dtype of x");
  check_parameter(shift, x, compute_type(p.dtype), C, "shift");
  cuda::DepthwiseArgs args;
  p.dw_size = k;
  p.stride = stride;
  args.problem = p;
  args.act = activation(act, slope, "act");
  const DeviceScope scope(x);
  Tensor out =
      empty_like_device(x, {p.batch, C, p.out_height(), p.out_width()}, x.scalar_type(), p.layout);
  const Tensor taps = taps_first(weight, C, k), shifts = aligned(shift);
  args.x = x.const_data_ptr();
  args.weight = taps.const_data_ptr();
  args.shift = shifts.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.plan = plan_depthwise(p, sums, std::min(alignment_of(x), alignment_of(out)), scope.arch());
  Tensor partial = empty_like_device(
      x, sums ? std::vector<int64_t>{p.batch, args.plan.splits, C} : std::vector<int64_t>{0},
      compute_type(p.dtype));
  if (out.numel() == 0) return {out, partial};
  args.sums = sums ? partial.mutable_data_ptr() : nullptr;
  check_launch(cuda::launch_depthwise_conv(args, scope.stream()), "depthwise_conv");
  return {out, partial};
}

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor& shift,
                      int64_t kernel_size, int64_t stride, int64_t act, double slope) {
  return std::get<0>(depthwise(x, weight, shift, kernel_size, stride, act, slope, false));
}

std::tuple<Tensor, Tensor> depthwise_conv_sums(const Tensor& x, const Tensor& weight,
                                               const Tensor& shift, int64_t kernel_size,
                                               int64_t stride, int64_t act, double slope) {
  return depthwise(x, weight, shift, kernel_size, stride, act, slope, true);
}

Tensor conv_stem(const Tensor& x, const Tensor& weight, const Tensor& shift, int64_t stride,
                 int64_t act, double slope, bool channels_last) {
  Problem p = problem_of(x);
  p.ratio = 1;
  check_sizes(p);
  const int64_t C = p.channels;
  check_device(weight, x, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == C && weight.size(2) == 3 &&
                      weight.size(3) == 3 && weight.scalar_type() == compute_type(p.dtype),
                  "weight must be [O, ", C, ", 3, 3] in the compute dtype of x");
  const int64_t O = weight.size(0);
  STD_TORCH_CHECK(C <= kStemChannels && O <= kStemOutputs && O > 0 && O % 2 == 0,
                  "conv_stem takes up to ", kStemChannels, " input channels and an even number of ",
                  "up to ", kStemOutputs, " output channels, got ", C, " and ", O);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  check_parameter(shift, x, compute_type(p.dtype), O, "shift");
  cuda::StemArgs args;
  p.out_channels = O;
  p.dw_size = 3;
  p.stride = stride;
  args.problem = p;
  args.out_layout = channels_last ? Layout::kNHWC : Layout::kNCHW;
  args.act = activation(act, slope, "act");
  const DeviceScope scope(x);
  Tensor out = empty_like_device(x, {p.batch, O, p.out_height(), p.out_width()}, x.scalar_type(),
                                 args.out_layout);
  if (out.numel() == 0) return out;
  Tensor taps = torch::stable::transpose(torch::stable::view(weight, {O, C, 9}), 0, 2);
  if (!taps.is_contiguous()) taps = torch::stable::contiguous(taps);
  taps = aligned(taps);
  const Tensor shifts = aligned(shift);
  args.x = x.const_data_ptr();
  args.weight = taps.const_data_ptr();
  args.shift = shifts.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.plan = plan_stem(p, scope.arch());
  check_launch(cuda::launch_conv_stem(args, scope.stream()), "conv_stem");
  return out;
}

Tensor squeeze_excite_gate(const Tensor& x, const OptionalTensor& sums, const Tensor& w_reduce,
                           const Tensor& b_reduce, const Tensor& w_expand, const Tensor& b_expand,
                           int64_t act, double slope, int64_t gate) {
  Problem p = problem_of(x);
  p.ratio = 1;
  check_sizes(p);
  const int64_t N = p.batch, C = p.channels, R = b_reduce.numel();
  const ScalarType type = x.scalar_type(), compute = compute_type(p.dtype);
  STD_TORCH_CHECK(w_reduce.dim() == 2 && w_reduce.size(0) == R, "w_reduce must be [", R, ", ", C,
                  "]");
  STD_TORCH_CHECK(w_expand.dim() == 2 && w_expand.size(0) == R, "w_expand must be [", R, ", ", C,
                  "]");
  STD_TORCH_CHECK(gate == 0 || gate == 1, "gate must be 0 (hard sigmoid) or 1 (sigmoid), got ",
                  gate);
  check_parameter(w_reduce, x, type, R * C, "w_reduce");
  check_parameter(b_reduce, x, compute, R, "b_reduce");
  check_parameter(w_expand, x, type, R * C, "w_expand");
  check_parameter(b_expand, x, compute, C, "b_expand");
  cuda::GateArgs args;
  if (sums) {
    check_device(*sums, x, "sums");
    STD_TORCH_CHECK(sums->dim() == 3 && sums->size(0) == N && sums->size(2) == C &&
                        sums->scalar_type() == compute && sums->is_contiguous(),
                    "sums must be a contiguous [", N, ", parts, ", C, "] of the compute dtype");
    args.sums = sums->const_data_ptr();
    args.splits = sums->size(1);
  }
  const DeviceScope scope(x);
  Tensor out = empty_like_device(x, {N, C}, type);
  if (N == 0) return out;
  args.layout = p.layout;
  args.dtype = p.dtype;
  args.batch = N;
  args.channels = C;
  args.reduced = R;
  args.pixels = p.height * p.width;
  STD_TORCH_CHECK(args.pixels > 0, "x must not be empty");
  args.x = x.const_data_ptr();
  args.w_reduce = w_reduce.const_data_ptr();
  args.b_reduce = b_reduce.const_data_ptr();
  args.w_expand = w_expand.const_data_ptr();
  args.b_expand = b_expand.const_data_ptr();
  args.act = activation(act, slope, "act");
  args.sigmoid = gate == 1;
  args.gate = out.mutable_data_ptr();
  args.plan = plan_gate(N, C, R, args.pixels, sums.has_value(), args.splits, p.dtype, scope.arch());
  Tensor hidden = empty_like_device(x, {args.plan.parts > 1 ? N * R : 0}, compute);
  args.hidden = hidden.mutable_data_ptr();
  check_launch(cuda::launch_squeeze_excite_gate(args, scope.stream()), "squeeze_excite_gate");
  return out;
}

}  // namespace
}  // namespace ghost

GHOST_REGISTER_CUDA(m) {
  m.impl("depthwise_conv", TORCH_BOX(&ghost::depthwise_conv));
  m.impl("depthwise_conv_sums", TORCH_BOX(&ghost::depthwise_conv_sums));
  m.impl("conv_stem", TORCH_BOX(&ghost::conv_stem));
  m.impl("squeeze_excite_gate", TORCH_BOX(&ghost::squeeze_excite_gate));
}
