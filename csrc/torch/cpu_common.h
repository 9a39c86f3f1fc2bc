// What the operators on the CPU share: the parallel loop, and the problem of an input.
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

// Calls f with a zero of the compute type of t.
template <class F>
auto with_dtype(DType t, F&& f) {
  switch (t) {
    case DType::kFloat64:
      return f(double{});
    default:
      return f(float{});
  }
}

struct Image {
  int64_t n, c, h, w;
  Layout layout;
  DType dtype;
};

inline Image image_of(const Tensor& x, const char* name) {
  const Layout layout = layout_of(x, name);
  return {x.size(0), x.size(1), x.size(2), x.size(3), layout, dtype_of(x, name)};
}

inline Problem problem_of(const Image& x) {
  Problem p;
  p.batch = x.n;
  p.channels = x.c;
  p.height = x.h;
  p.width = x.w;
  p.layout = x.layout;
  p.dtype = x.dtype;
  return p;
}

// The layout of packed parameters, followed by `more` elements. Whether bfloat16 weights are among
// them is told by their size, and told to p: the kernels that packed them may have been others.
inline PackedLayout layout_of_packed(Problem& p, const Tensor& packed, int64_t more) {
  PackedLayout at(p);
  const int64_t numel = packed.numel(), expected = at.numel + more;
  if (p.has_primary && p.depth() % 2 == 0 && numel != expected) {
    p.has_pairs = true;
    at = PackedLayout(p);
  }
  STD_TORCH_CHECK(
      packed.is_cpu() && packed.is_contiguous() && packed.scalar_type() == compute_type(p.dtype),
      "packed must be contiguous, on the CPU and in the compute dtype of x");
  STD_TORCH_CHECK(numel == at.numel + more, "packed does not belong to this module: expected ",
                  expected, " elements, got ", numel);
  return at;
}

}  // namespace ghost
