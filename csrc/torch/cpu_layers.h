// The layers between the Ghost modules of a network, on the CPU, as run_program calls them. Schemas
// of depthwise_conv and squeeze_excite_: ghost_ops/ops/depthwise.py and ghost_ops/ops/gate.py.
#pragma once

#include "torch/checks.h"

namespace ghost {

Tensor depthwise_conv(const Tensor& x, const Tensor& weight, const Tensor& shift,
                      int64_t kernel_size, int64_t stride, int64_t act, double slope);
void squeeze_excite_(Tensor x, const Tensor& w_reduce, const Tensor& b_reduce,
                     const Tensor& w_expand, const Tensor& b_expand, int64_t act, double slope,
                     int64_t gate);

// act(x + other), or act(x). x and other have one shape and order in memory. A new tensor, or x.
Tensor sum(Tensor x, const OptionalTensor& other, const Activation& act, bool in_place);
// The values concatenated along channels.
Tensor concat(const std::vector<Tensor>& values);
// The mean over the pixels of x [N, C, H, W], [1, C, 1, N] in channels_last: images as pixels.
Tensor pixel_means(const Tensor& x);
// x in channels_last.
Tensor channels_last(const Tensor& x);

}  // namespace ghost
