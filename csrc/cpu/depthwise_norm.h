// A depthwise convolution with batch norm and activation in training, forward and backward.
//
//   u   = depthwise(x, weight)      zero padding of k / 2 on every side
//   out = act(norm(u))              norm: statistics of the batch, constant statistics, or no norm
//
// N images, C channels, P pixels of x and Po of out; K the size of the kernel, R = K / 2.
//
// Channel by channel, all images of a channel together: u of one channel is scratch, which stays in
// L2 between its statistics and their use. Backward computes u again; only x is saved for it. The
// sums of a channel run in one order: the bits do not depend on the number of threads.
//
// Tile map: an item is one channel (NCHW) or kDepthwiseChannels of them (NHWC, so that whole cache
// lines are read). x and grad are rows of channels: read in place in NCHW of the compute type, else
// copied. Binding resource: memory for x, out and dx; else L2.
#pragma once

#include <algorithm>

#include "cpu/batch_norm.h"
#include "cpu/depthwise_conv.h"
#include "cpu/depthwise_grad.h"

namespace ghost {
namespace GHOST_ISA {

template <class T, int K>
class DepthwiseNorm {
  using A = ComputeOf<T>;
  using V = Vec<A>;
  static constexpr int R = K / 2, L = kLanes<A>;
  const DepthwiseNormArgs& a;
  const int64_t N, C, P, Po, row;  // pixels of an image of x, of out, and of a channel of out
  const bool nhwc, direct;         // direct: x, out and dx are used in place
  const int64_t block, ld_x, ld;   // channels of an item; elements of a channel's row in scratch

 public:
  explicit DepthwiseNorm(const DepthwiseNormArgs& args)
      : a(args),
        N(a.conv.batch),
        C(a.conv.channels),
        P(a.conv.height * a.conv.width),
        Po(a.conv.out_height * a.conv.out_width),
        row(N * Po),
        nhwc(a.conv.layout == Layout::kNHWC),
        direct(!nhwc && sizeof(T) == sizeof(A)),
        block(nhwc ? kDepthwiseChannels : 1),
        ld_x(direct ? 0 : round_up(N * P, 16) + 32),
        ld(round_up(row, 16) + 32) {}

  void forward(int64_t item) const {
    const int64_t c0 = item * block, count = std::min(block, C - c0);
    Scratch s(*this, count, count);
    read(a.conv.x, c0, count, P, s.x, ld_x);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = c0 + i;
      A* const u = s.u + i * ld;
      convolve(planes(a.conv.x, c, s.x + i * ld_x), c, u, s.more);
      const Affine<A> f = batch_norm(c, u);
      for (int64_t n = 0; n < N; ++n) {
        A* const to = direct ? static_cast<A*>(a.conv.out) + (n * C + c) * Po : u + n * Po;
        affine_activate(a.conv.act, f, u + n * Po, to, Po);
      }
    }
    if (!direct) write(s.u, ld, c0, count, Po, a.conv.out);
  }

  void backward(int64_t item) const {
    const int64_t c0 = item * block, count = std::min(block, C - c0);
    const bool linear = !a.has_norm && a.conv.act.act == Act::kNone;  // grad is the gradient of u
    Scratch s(*this, count, 1 + count);
    A* const g_all = s.u + ld;
    read(a.conv.x, c0, count, P, s.x, ld_x);
    read(a.grad, c0, count, Po, g_all, ld, true);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = c0 + i;
      A* const g = g_all + i * ld;
      const Planes x = planes(a.conv.x, c, s.x + i * ld_x);
      GradSums sums;
      if (!linear) {
        convolve(x, c, s.u, s.more);
        const Affine<A> f = affine(c);
        activation_backward(a.conv.act, f, s.u, g, g, row, sums);
        if (a.has_norm && (a.dx || a.dw))
          norm_backward(f, sums, double(row), a.batch_stats, s.u, g, g, row);
      }
      put(a.dgamma, c, sums.gx);
      put(a.dbeta, c, sums.g);
      if (a.dx || a.dw) gradients(x, c, g, planes(a.dx, c, s.x + i * ld_x), s.more);
    }
    if (!direct && a.dx) write(s.x, ld_x, c0, count, P, a.dx);
  }

 private:
  // The planes of one channel in the compute type, `step` elements from image to image.
  struct Planes {
    A* at;
    int64_t step;
  };

  struct Scratch {
    A* x;     // [channels][ld_x]
    A* u;     // [rows][ld]
    A* more;  // of the convolution
    Scratch(const DepthwiseNorm& d, int64_t count, int64_t rows) {
      const int64_t of_x = count * d.ld_x, of_u = rows * d.ld;
      const DepthwiseArgs conv = d.channel();
      const int64_t last =
          conv.stride == 1
              ? 0
              : std::max(HalvedPlanes<A, K>::scratch(conv),
                         HalvedGrad<A, K>::scratch(conv.height, conv.out_height, conv.out_width));
      // Vectors may reach before the first row and past the last one.
      x = static_cast<A*>(thread_scratch(size_t(of_x + of_u + last + 192) * sizeof(A))) + 64;
      u = x + of_x;
      more = u + of_u + 64;
    }
  };

  static void put(void* p, int64_t i, double v) {
    if (p) static_cast<A*>(p)[i] = A(v);
  }

  Planes planes(const void* map, int64_t c, A* scratch) const {
    if (!direct || !map) return {scratch, P};
    return {static_cast<A*>(const_cast<void*>(map)) + c * P, C * P};
  }

  // The arguments of the convolution of one channel.
  DepthwiseArgs channel() const {
    DepthwiseArgs one = a.conv;
    one.channels = 1;
    one.layout = Layout::kNCHW;
    one.act = {Act::kNone, 0.0};
    return one;
  }

  const A* taps(int64_t c) const { return static_cast<const A*>(a.conv.weight) + c * K * K; }

  void convolve(const Planes& x, int64_t c, A* u, A* memory) const {
    if (a.conv.stride == 1) return stencil_of(x, taps(c), {u, Po});
    const A zero = 0;
    DepthwiseArgs one = channel();
    one.x = x.at;
    one.weight = taps(c);
    one.shift = &zero;
    one.out = u;
    HalvedPlanes<A, K>(one, x.step, Po, memory).run(0, N);
  }

  void stencil_of(const Planes& in, const A* weight, const Planes& out) const {
    stencil<A>(K, whole_planes(static_cast<const A*>(in.at), in.step, N, a.conv.height,
                               a.conv.width, weight, out.at, out.step));
  }

  // The norm of channel c with given statistics, or with none.
  Affine<A> affine(int64_t c) const {
    return a.has_norm ? Affine<A>(a.norm, c) : Affine<A>(a.norm, c, 0.0, 1.0);
  }

  // The norm of channel c; with batch_stats by the moments of u, which are written to mean and var.
  Affine<A> batch_norm(int64_t c, const A* u) const {
    if (!a.batch_stats) return affine(c);
    Moments m;
    m.add(u, row);
    put(a.mean, c, m.mean);
    put(a.var, c, m.variance());
    return Affine<A>(a.norm, c, m.mean, m.variance());
  }

  // dw and dx of a channel, from the gradient g of u. dx may be in place of x.
  void gradients(const Planes& x, int64_t c, const A* g, const Planes& dx, A* memory) const {
    if (a.conv.stride == 1) {
      if (a.dw) {
        double dw[K * K] = {};
        for (int64_t n = 0; n < N; ++n)
          stencil_weight_grad<A>(K, x.at + n * x.step, g + n * Po, 1, a.conv.height, a.conv.width,
                                 dw);
        for (int t = 0; t < K * K; ++t) put(a.dw, c * K * K + t, dw[t]);
      }
      if (!a.dx) return;
      A flipped[K * K];
      std::reverse_copy(taps(c), taps(c) + K * K, flipped);
      return stencil_of({const_cast<A*>(g), Po}, flipped, dx);
    }
    const HalvedGrad<A, K> plane(a.conv.height, a.conv.width, a.conv.out_height, a.conv.out_width,
                                 memory);
    // Sums of `some` images are in the compute type; these are added in double.
    const int64_t some = std::max<int64_t>(kTapSumPixels / Po, 1);
    double dw[K * K] = {};
    V sums[K * K] = {};
    for (int64_t n = 0; n < N; ++n) {
      plane.load_planes(x.at + n * x.step, g + n * Po);
      if (a.dx) plane.input(taps(c), dx.at + n * dx.step);
      if (!a.dw) continue;
      plane.weight(sums);
      if ((n + 1) % some != 0 && n + 1 < N) continue;
      for (int t = 0; t < K * K; ++t) {
        dw[t] += double(reduce_add<A>(sums[t]));
        sums[t] = V{};
      }
    }
    if (!a.dw) return;
    for (int t = 0; t < K * K; ++t) put(a.dw, c * K * K + t, dw[t]);
  }

  // Channels [c0, c0 + count) of a map into to [count][ld_to], N * pixels each; without `always`
  // only if the map is not used in place.
  void read(const void* map, int64_t c0, int64_t count, int64_t pixels, A* to, int64_t ld_to,
            bool always = false) const {
    if (direct && !always) return;
    const T* const from = static_cast<const T*>(map);
    for (int64_t n = 0; n < N; ++n) {
      if (nhwc)
        read_transposed(from + n * pixels * C + c0, C, to + n * pixels, ld_to, pixels, count);
      else
        read_row(from + (n * C + c0) * pixels, to + n * pixels, pixels);
    }
  }

  // from [count][ld_from] into channels [c0, c0 + count) of a map: the reverse of read.
  void write(const A* from, int64_t ld_from, int64_t c0, int64_t count, int64_t pixels,
             void* map) const {
    T* const to = static_cast<T*>(map);
    for (int64_t n = 0; n < N; ++n) {
      if (nhwc)
        write_transposed(from + n * pixels, ld_from, to + n * pixels * C + c0, C, pixels, count);
      else
        write_row(from + n * pixels, to + (n * C + c0) * pixels, pixels);
    }
  }
};

template <class T, int K>
void depthwise_norm_channels(const DepthwiseNormArgs& a, int64_t begin, int64_t end) {
  const DepthwiseNorm<T, K> pass(a);
  for (int64_t i = begin; i < end; ++i) a.grad ? pass.backward(i) : pass.forward(i);
}

// Forward, or backward if a.grad is not null, of items [begin, end) of depthwise_norm_items.
template <class T>
void depthwise_norm(const DepthwiseNormArgs& a, int64_t begin, int64_t end) {
  with_constant<1, 3, 5, 7>(a.conv.kernel, [&](auto size) {
    depthwise_norm_channels<T, decltype(size)::value>(a, begin, end);
  });
}

}  // namespace GHOST_ISA
}  // namespace ghost
