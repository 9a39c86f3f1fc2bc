// Checks of arguments, for the operators of every device.
#pragma once

#include <optional>

#include "torch/tensors.h"

namespace ghost {

using OptionalTensor = std::optional<Tensor>;

// The layout of a dense [N, C, H, W].
inline Layout dense_layout(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be 4-D [N, C, H, W], got ", x.dim(), "-D");
  // A single channel is dense in both layouts; PyTorch then takes the layout from its stride.
  const bool one_map_nhwc = x.size(1) == 1 && x.stride(1) == 1 && x.size(2) * x.size(3) > 1;
  const bool nchw = is_dense(x, Layout::kNCHW) && !one_map_nhwc;
  STD_TORCH_CHECK(nchw || is_dense(x, Layout::kNHWC), name,
                  " must be dense, contiguous or channels_last");
  return nchw ? Layout::kNCHW : Layout::kNHWC;
}

inline void check_dw_size(int64_t d) {
  STD_TORCH_CHECK(d == 1 || d == 3 || d == 5 || d == 7, "dw_size must be 1, 3, 5 or 7, got ", d);
}

inline Activation activation(int64_t code, double slope, const char* name) {
  STD_TORCH_CHECK(code >= 0 && code < kNumActs, name, " must be a code from 0 to ", kNumActs - 1,
                  ", got ", code);
  return {Act(code), slope};
}

// An activation, or a PReLU whose slopes are an argument of their operator.
inline Activation activation_or_prelu(int64_t code, double slope, const char* name) {
  return code == int64_t(Act::kPReLU) ? Activation{Act::kPReLU, 0.0}
                                      : activation(code, slope, name);
}

// Checks the numbers among the arguments of ghost_apply and stores them in p. PReLU is allowed.
inline void set_apply(Problem& p, int64_t intrinsic, int64_t out_channels, int64_t ratio,
                      int64_t dw_size, int64_t stride, int64_t act1, double slope1, int64_t act2,
                      double slope2, bool has_primary) {
  check_dw_size(dw_size);
  STD_TORCH_CHECK(stride >= 1, "stride must be positive, got ", stride);
  STD_TORCH_CHECK(ratio >= 1, "ratio must be positive, got ", ratio);
  STD_TORCH_CHECK(intrinsic >= 1 && intrinsic <= out_channels && out_channels <= intrinsic * ratio,
                  "out_channels must lie in [", intrinsic, ", ", intrinsic * ratio, "], got ",
                  out_channels);
  STD_TORCH_CHECK(has_primary || (p.channels == intrinsic && stride == 1),
                  "without a primary convolution x must have ", intrinsic,
                  " channels and stride be 1");
  p.stride = stride;
  p.intrinsic = intrinsic;
  p.out_channels = out_channels;
  p.ratio = ratio;
  p.dw_size = dw_size;
  p.act1 = activation_or_prelu(act1, slope1, "act1");
  p.act2 = activation_or_prelu(act2, slope2, "act2");
  p.has_primary = has_primary;
}

inline Tensor in_layout(const Tensor& t, Layout layout) {
  return is_dense(t, layout) ? t : torch::stable::contiguous(t, memory_format(layout));
}

// Checks the residual, sets p.has_residual and returns the residual in the layout of p.
inline Tensor set_residual(Problem& p, const Tensor& residual, ScalarType type) {
  STD_TORCH_CHECK(residual.dim() == 4 && residual.size(0) == p.batch &&
                      residual.size(1) == p.out_channels && residual.size(2) == p.out_height() &&
                      residual.size(3) == p.out_width() && residual.scalar_type() == type,
                  "residual must have the shape and dtype of the output");
  p.has_residual = true;
  return in_layout(residual, p.layout);
}

// Checks the gate [N, out_channels, Hg, Wg], sets its size in p and returns the gate in the layout
// of p.
inline Tensor set_gate(Problem& p, const Tensor& gate, ScalarType type) {
  STD_TORCH_CHECK(gate.dim() == 4 && gate.size(0) == p.batch && gate.size(1) == p.out_channels &&
                      gate.size(2) >= 1 && gate.size(3) >= 1 && gate.scalar_type() == type,
                  "gate must be [", p.batch, ", ", p.out_channels,
                  ", Hg, Wg] with Hg and Wg at least 1, of the dtype of x");
  p.gate_height = gate.size(2);
  p.gate_width = gate.size(3);
  return in_layout(gate, p.layout);
}

}  // namespace ghost
