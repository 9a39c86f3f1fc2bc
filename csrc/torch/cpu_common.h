// What the operators on the CPU share: the parallel loop and the checks of arguments.
#pragma once

#include "torch/tensors.h"

namespace ghost {

inline int64_t threads() {
  return int64_t(torch::stable::get_num_threads());
}

template <class F>
void parallel(int64_t items, const F& f) {
  if (items == 1 || threads() == 1)
    f(0, items);
  else if (items > 0)
    torch::stable::parallel_for(0, items, 1, [&](int64_t b, int64_t e) { f(b, e); });
}

inline Activation activation(int64_t code, double slope, const char* name) {
  STD_TORCH_CHECK(code >= 0 && code < kNumActs, name, " must be a code from 0 to ", kNumActs - 1,
                  ", got ", code);
  return {Act(code), slope};
}

// That of ghost_apply, which also knows slopes per channel.
inline Activation apply_activation(int64_t code, double slope, const char* name) {
  return code == int64_t(Act::kPReLU) ? Activation{Act::kPReLU, 0.0}
                                      : activation(code, slope, name);
}

// The layout of a dense [N, C, H, W] on the CPU.
inline Layout layout_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(x.dim() == 4, name, " must be 4-D [N, C, H, W], got ", x.dim(), "-D");
  // A single channel is dense both ways; its stride tells which of them it was made as, as in
  // PyTorch.
  const bool one_map_nhwc = x.size(1) == 1 && x.stride(1) == 1 && x.size(2) * x.size(3) > 1;
  const bool nchw = is_dense(x, Layout::kNCHW) && !one_map_nhwc;
  STD_TORCH_CHECK(nchw || is_dense(x, Layout::kNHWC), name,
                  " must be dense, contiguous or channels_last");
  return nchw ? Layout::kNCHW : Layout::kNHWC;
}

}  // namespace ghost
