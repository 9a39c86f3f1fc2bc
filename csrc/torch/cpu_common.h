// What the operators on the CPU share: the parallel loop and the checks of arguments.
#pragma once

#include "torch/checks.h"

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

// The layout of a dense [N, C, H, W] on the CPU.
inline Layout layout_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be on the CPU");
  return dense_layout(x, name);
}

}  // namespace ghost
