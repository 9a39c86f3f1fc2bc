// The passes of tail.h in NHWC, with channels along the lanes.
//
//   v = w2 (*) y,   u = concat(y, v)[:, :out_channels],   out = act(bn(u) + residual)
//
// The ghosts that the slice keeps are one depthwise map v [P][kept], see lane_stencil.h. Its inputs
// are y, or copies of the channels of y if ghosts_per_map is not 1 or the slice cuts ghosts off.
//
// Forward and backward are two passes over the images each, with the sums of all images in between.
// Every pass computes v from y.
//
// Tile map: an item is a fixed number of images, see lane_pass.h, and goes through them in groups
// whose maps stay in L1 or L2. Binding resource: L1 and L2 bandwidth.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/lane_pass.h"
#include "cpu/tail_kernels.h"

namespace ghost {
namespace GHOST_ISA {

template <class T>
class TailLanes : LanePass<ComputeOf<T>> {
  using A = ComputeOf<T>;
  using Base = LanePass<A>;
  using Base::L, Base::p, Base::weight, Base::flipped, Base::sums, Base::put;
  using Base::N, Base::H, Base::W, Base::P, Base::m, Base::out_channels, Base::taps, Base::F;
  using Base::partial;
  static constexpr int64_t kPiece = 1024;  // pixels that a float32 sum spans
  const TailArgs& args;
  const int64_t ghosts_per_map, kept;  // kept: ghosts that the slice keeps
  const bool copies;                   // the ghosts read copies of the channels of y
  const TailItems items;
  LaneNorm<A> norm;
  A *y, *inputs, *v, *dy, *dinputs;  // of a group of images

  static int64_t kept_of(const Problem& p) { return p.out_channels - p.intrinsic; }
  // [2][out_channels], or in the passes of the gradients [d * d][kept].
  static int64_t size_of_partial(const TailArgs& a, TailStep step) {
    const Problem& p = a.problem;
    const bool of_taps = step == TailStep::kGrads || step == TailStep::kMergeGrads;
    return of_taps ? kept_of(p) * p.dw_size * p.dw_size : 2 * p.out_channels;
  }

 public:
  TailLanes(const TailArgs& a, TailStep step)
      : Base(a.problem, kept_of(a.problem), TailItems(a.problem).count, a.partial,
             size_of_partial(a, step)),
        args(a),
        ghosts_per_map(p.ghosts_per_map()),
        kept(kept_of(p)),
        copies(ghosts_per_map != 1 || kept != m),
        items(p) {
    const int64_t pixels = items.group * P, map = pixels * m + 64, ghost_map = pixels * kept + 64;
    const int64_t copy = copies ? ghost_map : 0;
    A* of_norm;
    this->allocate({{&of_norm, LaneNorm<A>::elements(out_channels)},
                    {&y, map},
                    {&inputs, copy},
                    {&v, ghost_map},
                    {&dy, map},
                    {&dinputs, copy}},
                   args.w2);
    norm = LaneNorm<A>(of_norm, out_channels);
  }

  // Forward's first pass: mean and squared deviations of an item's images.
  void moments(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, 2 * out_channels, 0.0);
    for_parts(item, [&](const Part& part) {
      double* const mean = of + part.offset;
      this->add_moments(part.src, part.pixels, part.channels, kPiece, part.before, mean,
                        mean + out_channels);
    });
  }
  void merge_moments() const {
    Base::merge_moments(
        out_channels, [&](int64_t item) { return items.images(item); }, args.mean, args.var);
  }

  // Forward's second pass.
  void forward(int64_t item) const {
    norm.set(args.norm);
    for_parts(item, [&](const Part& part) {
      const int64_t channels = part.channels, end = part.pixels, ld = out_channels;
      T* const out = static_cast<T*>(args.out) + part.first;
      const T* const residual = at(args.residual, part);
      const A slope = A(p.act2.slope);
      with_activation(p.act2.act, [&](auto act) {
        for_lanes<T>(channels, end, [&](int64_t c, auto lanes) {
          const Vec<A> k = lanes.param(norm.scale + part.offset + c),
                       s = lanes.param(norm.shift + part.offset + c);
          for (int64_t i = 0; i < end; i += lanes.kPixels) {
            Vec<A> x = lanes.load(part.src + i * channels + c) * k + s;
            if (residual) x += lanes.load_map(residual + i * ld + c, ld);
            lanes.store_map(out + i * ld + c, ld, activate<decltype(act)::value, A>(x, slope));
          }
        });
      });
    });
  }

  // Backward's first pass: the sums of the norm's gradient over an item's images.
  void grad_sums(int64_t item) const {
    norm.set(args.norm);
    double* const of = partial(item);
    std::fill_n(of, 2 * out_channels, 0.0);
    for_parts(item, [&](const Part& part) {
      const int64_t channels = part.channels, ld = out_channels;
      const T *const grad = at(args.grad_out, part), *const residual = at(args.residual, part);
      const A slope = A(p.act2.slope);
      for (int64_t q = 0; q < part.pixels; q += kPiece) {
        const int64_t end = std::min(q + kPiece, part.pixels);
        with_activation(p.act2.act, [&](auto act) {
          for_lanes<T>(channels, end - q, [&](int64_t c, auto lanes) {
            const int64_t o = part.offset + c;
            const Vec<A> k = lanes.param(norm.scale + o), s = lanes.param(norm.shift + o),
                         mu = lanes.param(norm.mean + o), inv = lanes.param(norm.inv_std + o);
            Vec<A> sum{}, sum_x{};
            for (int64_t i = q; i < end; i += lanes.kPixels) {
              const Vec<A> x = lanes.load(part.src + i * channels + c);
              Vec<A> pre = x * k + s;
              if (residual) pre += lanes.load_map(residual + i * ld + c, ld);
              const Vec<A> g = activate_grad<decltype(act)::value, A>(
                  pre, lanes.load_map(grad + i * ld + c, ld), slope);
              sum += g;
              sum_x += g * ((x - mu) * inv);
            }
            for (int64_t l = 0; l < lanes.count; ++l) {
              of[o + lanes.channel(l)] += double(sum[l]);
              of[out_channels + o + lanes.channel(l)] += double(sum_x[l]);
            }
          });
        });
      }
    });
  }
  void merge_grad_sums() const {
    for (int64_t c = 0; c < out_channels; ++c) {
      put(args.dbeta, c, this->sum_of_items(c));
      put(args.dgamma, c, this->sum_of_items(out_channels + c));
    }
  }

  // Backward's second pass: dresidual, dy, and dw2 over an item's images.
  void grads(int64_t item) const {
    norm.set(args.norm);
    const double count = double(N * P);
    norm.set_means([&](int64_t c) { return A(get(args.dbeta, c) / count); },
                   [&](int64_t c) { return A(get(args.dgamma, c) / count); });
    std::fill_n(sums, taps * this->ld_sums, A(0));
    for_parts(item, [&](const Part& part) {
      T* const out = args.dy ? static_cast<T*>(args.dy) + part.n * P * m : nullptr;
      A* target = dy;
      if constexpr (std::is_same_v<T, A>) target = out ? out : dy;
      part_du(part, part.offset == 0 ? target : v);
      if (part.offset + part.channels < out_channels) return;  // the ghosts are the second part
      if (kept > 0) ghosts_backward(part.n, part.images, target);
      if constexpr (!std::is_same_v<T, A>) {
        if (out) write_row(target, out, part.images * P * m);
      }
    });
    double* const of = partial(item);
    std::fill_n(of, kept * taps, 0.0);
    this->flush_tap_sums(of);
  }
  void merge_grads() const { this->merge_tap_sums(0, m * ghosts_per_map, args.dw2); }

 private:
  static double get(const void* p, int64_t i) { return double(static_cast<const A*>(p)[i]); }

  // y or its ghosts, of a group of images.
  struct Part {
    int64_t n, images, pixels, before;  // n: first image; before: pixels of the item before it
    const A* src;                       // [pixels][channels]
    int64_t channels, offset;           // of u
    int64_t first;                      // element of out where the part starts
  };
  const T* at(const void* map, const Part& part) const {
    return map ? static_cast<const T*>(map) + part.first : nullptr;
  }

  // Calls f for both parts of each group of an item's images.
  template <class F>
  void for_parts(int64_t item, F&& f) const {
    const int64_t first = item * items.item, end = first + items.images(item);
    for (int64_t n = first; n < end; n += items.group) {
      const int64_t images = std::min(items.group, end - n), before = (n - first) * P;
      const A* const in = wide_y(n, images);
      f(Part{n, images, images * P, before, in, m, 0, n * P * out_channels});
      if (kept == 0) continue;
      this->template convolve<true>(whole(ghost_inputs(in, images)), weight, whole(v), images,
                                    false);
      f(Part{n, images, images * P, before, v, kept, m, n * P * out_channels + m});
    }
  }

  // y in the compute type, [pixels][m].
  const A* wide_y(int64_t n, int64_t images) const {
    const T* const from = static_cast<const T*>(args.y) + n * P * m;
    if constexpr (std::is_same_v<T, A>) return from;
    read_row(from, y, images * P * m);
    return y;
  }

  // The inputs of the ghosts, [pixels][kept].
  const A* ghost_inputs(const A* in, int64_t images) const {
    if (!copies) return in;
    for (int64_t i = 0; i < images * P; ++i)
      for (int64_t q = 0; q < kept; ++q) inputs[i * kept + q] = in[i * m + q / ghosts_per_map];
    return inputs;
  }

  // du of a part [pixels][channels], which may lie in place of its source; dresidual.
  void part_du(const Part& part, A* du) const {
    const T *const grad = at(args.grad_out, part), *const residual = at(args.residual, part);
    T* const dresidual = const_cast<T*>(at(args.dresidual, part));
    const int64_t channels = part.channels, end = part.pixels, ld = out_channels;
    const A slope = A(p.act2.slope);
    const bool batch_stats = args.batch_stats;
    with_activation(p.act2.act, [&](auto act) {
      for_lanes<T>(channels, end, [&](int64_t c, auto lanes) {
        const int64_t o = part.offset + c;
        const Vec<A> k = lanes.param(norm.scale + o), s = lanes.param(norm.shift + o),
                     mu = lanes.param(norm.mean + o), inv = lanes.param(norm.inv_std + o),
                     mean_g = lanes.param(norm.mean_g + o), mean_gx = lanes.param(norm.mean_gx + o);
        for (int64_t i = 0; i < end; i += lanes.kPixels) {
          const Vec<A> x = lanes.load(part.src + i * channels + c);
          Vec<A> pre = x * k + s;
          if (residual) pre += lanes.load_map(residual + i * ld + c, ld);
          const Vec<A> g = activate_grad<decltype(act)::value, A>(
              pre, lanes.load_map(grad + i * ld + c, ld), slope);
          if (dresidual) lanes.store_map(dresidual + i * ld + c, ld, g);
          const Vec<A> from_stats = mean_g + (x - mu) * inv * mean_gx;
          lanes.store(du + i * channels + c, (batch_stats ? g - from_stats : g) * k);
        }
      });
    });
  }

  // All rows of a map [images][H][F].
  template <class Number>
  LaneRows<Number> whole(Number* map) const {
    return {map, 0, H};
  }

  // From du of the ghosts in v: the sums of dw2, and the ghosts' part of dy, added to `to`.
  void ghosts_backward(int64_t n, int64_t images, A* to) const {
    const int64_t pixels = images * P;
    const LaneRows<const A> dv = whole<const A>(v);
    this->add_tap_sums(whole(copies ? inputs : wide_y(n, images)), dv, 0, H, images);
    if (!args.dy) return;
    if (!copies) return this->template convolve<true>(dv, flipped, whole(to), images, true);
    this->template convolve<true>(dv, flipped, whole(dinputs), images, false);
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t q = 0; q < kept; ++q) to[i * m + q / ghosts_per_map] += dinputs[i * kept + q];
  }
};

template <class T>
void tail_lanes(const TailArgs& args, TailStep step, int64_t begin, int64_t end) {
  const TailLanes<T> pass(args, step);
  switch (step) {
    case TailStep::kMoments:
      for (int64_t i = begin; i < end; ++i) pass.moments(i);
      break;
    case TailStep::kMergeMoments:
      return pass.merge_moments();
    case TailStep::kForward:
      for (int64_t i = begin; i < end; ++i) pass.forward(i);
      break;
    case TailStep::kGradSums:
      for (int64_t i = begin; i < end; ++i) pass.grad_sums(i);
      break;
    case TailStep::kMergeGradSums:
      return pass.merge_grad_sums();
    case TailStep::kGrads:
      for (int64_t i = begin; i < end; ++i) pass.grads(i);
      break;
    case TailStep::kMergeGrads:
      return pass.merge_grads();
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
