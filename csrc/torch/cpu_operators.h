// Operators of the CPU that a program of several of them calls, see cpu_program.cpp. Their schemas
// stand in ghost_ops/ops.
#pragma once

#include "torch/checks.h"

namespace ghost {

Tensor ghost_apply(const Tensor& x, const Tensor& packed, const OptionalTensor& residual,
                   const OptionalTensor& gate, int64_t intrinsic, int64_t out_channels,
                   int64_t ratio, int64_t dw_size, int64_t stride, int64_t act1, double slope1,
                   int64_t act2, double slope2, bool has_primary);
Tensor ghost_conv_apply(const Tensor& x, const Tensor& packed, const OptionalTensor& residual,
                        int64_t kernel_size, int64_t padding, bool tail, int64_t intrinsic,
                        int64_t out_channels, int64_t ratio, int64_t dw_size, int64_t stride,
                        int64_t act1, double slope1, int64_t act2, double slope2);
Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor& shift,
                      int64_t kernel_size, int64_t stride, int64_t act, double slope);
void squeeze_excite_(Tensor x, const Tensor& w_reduce, const Tensor& b_reduce,
                     const Tensor& w_expand, const Tensor& b_expand, int64_t act, double slope,
                     int64_t gate);

// act(x + other), or act(x); x and other of one shape and order in memory. A new tensor, or x.
Tensor sum(Tensor x, const OptionalTensor& other, const Activation& act, bool in_place);
// The values next to each other along channels.
Tensor concat(const std::vector<Tensor>& values);
// The mean over the pixels of x [N, C, H, W], [1, C, 1, N] in channels_last: images as pixels.
Tensor pixel_means(const Tensor& x);

}  // namespace ghost
