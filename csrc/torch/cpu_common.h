// Shared by the operators on the CPU: the parallel loop, the problem of an input, the parameters of
// a norm, and the call of the kernels of ghost_apply.
#pragma once

#include <string>

#include "core/plan.h"
#include "cpu/dispatch.h"
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

// Runs a kernel over all its items.
template <class Args>
void run(Kernel<Args> kernel, const Args& args, int64_t items) {
  parallel(items, [&](int64_t b, int64_t e) { kernel(args, b, e); });
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

// An operator's result: dense and new if needed, empty if not.
inline Tensor empty_if(bool needed, const std::vector<int64_t>& sizes, ScalarType type,
                       Layout layout = Layout::kNCHW) {
  return needed ? empty(sizes, type, layout) : empty({0}, type);
}
inline void* data_if(bool needed, Tensor& t) {
  return needed ? t.mutable_data_ptr() : nullptr;
}

// The parameters of one norm of n channels and of a PReLU behind it, in the compute type.
class NormParams {
  Param gamma_, beta_, mean_, var_, slopes_, means_;
  double eps_ = 0.0;

 public:
  NormParams() = default;
  // suffix: of the argument names in messages, "1" or "2" if an operator has two norms.
  NormParams(const char* suffix, DType dtype, int64_t n, double eps, const OptionalTensor& gamma,
             const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var,
             const OptionalTensor& slopes = {}, const OptionalTensor& means = {})
      : gamma_(gamma, dtype, n, (std::string("gamma") + suffix).c_str()),
        beta_(beta, dtype, n, (std::string("beta") + suffix).c_str()),
        mean_(mean, dtype, n, (std::string("mean") + suffix).c_str()),
        var_(var, dtype, n, (std::string("var") + suffix).c_str()),
        slopes_(slopes, dtype, n, (std::string("prelu") + suffix).c_str()),
        means_(means, dtype, 2 * n, (std::string("means") + suffix).c_str()),
        eps_(eps) {}

  NormArgs args(bool batch_stats = false) const {
    return {gamma_.data(), beta_.data(),   mean_.data(), var_.data(),
            eps_,          slopes_.data(), batch_stats,  means_.data()};
  }
};

// The layout of packed parameters, followed by `more` elements. Sets p.has_pairs by the size of
// `packed`: another instruction set than that in use may have packed it.
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

// The memory of a map: elements from image to image and, if NCHW, from channel to channel.
struct Source {
  const void* data;
  int64_t image, channel;
};
struct Target {
  void* data;
  int64_t image, channel;
  Layout layout;
  bool may_stream = true;  // false: `data` is read again at once, or is not written in order
};

inline Source source_of(const Tensor& x) {
  const int64_t pixels = x.size(2) * x.size(3);
  return {x.const_data_ptr(), x.size(1) * pixels, pixels};
}
inline Target target_of(Tensor& out, Layout layout) {
  const int64_t pixels = out.size(2) * out.size(3);
  return {out.mutable_data_ptr(), out.size(1) * pixels, pixels, layout};
}

// Plans and runs a kernel of ghost_apply. args: the problem, the parameters and the scatter.
inline void run_apply(Kernel<ApplyArgs> kernel, ApplyArgs& args, const Source& x,
                      const Target& out) {
  args.plan = plan_apply(args.problem, cpu_machine(threads()));
  args.plan.stream = args.plan.stream && out.may_stream;
  args.x = x.data;
  args.x_image = x.image;
  args.x_channel = x.channel;
  args.out = out.data;
  args.out_layout = out.layout;
  args.out_image = out.image;
  args.out_channel = out.channel;
  run(kernel, args, args.plan.items);
}

}  // namespace ghost
