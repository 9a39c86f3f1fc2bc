// Training of a Ghost module whose batch norm and activation follow the concatenation, from the
// primary convolution's output y on, in NCHW:
//
//   v = w2 (*) y,   u = concat(y, v)[:, :oup],   out = act(bn(u) + residual)
//
//   forward   u and its statistics -> out
//   backward  u again -> g = act'(..) grad_out, which is the residual's gradient, and bn's sums ->
//             du -> dw2, dy = du of y + w2 applied backwards to du of v
//
// A channel of y meets its own ghosts only. Tile map: an item is a channel of y with its ghosts,
// all images at once, each channel of u a row of N * P pixels. Order of the sums and binding
// resource as in channels.h.
#pragma once

#include <algorithm>

#include "cpu/channels.h"
#include "cpu/tail_kernels.h"

namespace ghost {
namespace GHOST_ISA {

template <class T>
class TailPass {
  using A = ComputeOf<T>;
  const TailArgs& args;
  const Problem& p;
  const int64_t N, P, m, oup, per, taps, row, ld;
  const A* const w2;

 public:
  explicit TailPass(const TailArgs& a)
      : args(a),
        p(a.problem),
        N(p.batch),
        P(p.height * p.width),
        m(p.intrinsic),
        oup(p.out_channels),
        per(p.ratio - 1),
        taps(p.dw_size * p.dw_size),
        row(N * P),
        ld(round_up(row, 16) + 16),
        w2(static_cast<const A*>(a.w2)) {}

  void forward(int64_t c) const {
    const int64_t rows = 1 + ghosts(c);
    A* const u = scratch(rows + 1);
    A* const residual = args.residual ? u + rows * ld : nullptr;
    make_u(c, u);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t ch = channel(c, i);
      A* const ui = u + i * ld;
      NormArgs norm = args.norm;
      if (args.batch_stats) {
        Moments moments;
        moments.add(ui, row);
        put(args.mean, ch, moments.mean);
        put(args.var, ch, moments.variance());
        norm.mean = args.mean;
        norm.var = args.var;
      }
      if (residual) read(args.residual, oup, ch, residual);
      affine_activate(p.act2, Affine<A>(norm, ch), ui, ui, row, residual);
      write(ui, oup, ch, args.out);
    }
  }

  void backward(int64_t c) const {
    const int64_t kept = ghosts(c), rows = 1 + kept;
    A* const u = scratch(rows + 3);
    A* const du = u + rows * ld;  // of y
    A* const g = du + ld;
    A* const residual = args.residual ? g + ld : nullptr;
    make_u(c, u);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t ch = channel(c, i);
      const Affine<A> f(args.norm, ch);
      const A* const ui = u + i * ld;
      A* const gi = i == 0 ? du : g;
      GradSums sums;
      read(args.grad_out, oup, ch, gi);
      if (residual) read(args.residual, oup, ch, residual);
      activation_backward(p.act2, f, ui, gi, gi, row, sums, residual);
      put(args.dgamma, ch, sums.gx);
      put(args.dbeta, ch, sums.g);
      if (args.dresidual) write(gi, oup, ch, args.dresidual);
      norm_backward(f, sums, double(row), args.batch_stats, ui, gi, gi, row);
      if (i > 0) ghost_backward(c * per + i - 1, u, g, du);
    }
    for (int64_t i = (c * per + kept) * taps; i < (c + 1) * per * taps; ++i) put(args.dw2, i, 0.0);
    if (args.dy) write(du, m, c, args.dy);
  }

 private:
  static void put(void* p, int64_t i, double v) { static_cast<A*>(p)[i] = A(v); }

  // Ghosts of channel c that the slice does not cut off.
  int64_t ghosts(int64_t c) const { return std::clamp<int64_t>(oup - m - c * per, 0, per); }
  // Of u, where row i of channel c belongs.
  int64_t channel(int64_t c, int64_t i) const { return i == 0 ? c : m + c * per + i - 1; }

  A* scratch(int64_t rows) const {
    return static_cast<A*>(thread_scratch(size_t(rows * ld + 128) * sizeof(A))) + 64;
  }

  void make_u(int64_t c, A* u) const {
    read(args.y, m, c, u);
    for (int64_t j = 0; j < ghosts(c); ++j)
      convolve(u, w2 + (c * per + j) * taps, u + (1 + j) * ld, false);
  }

  // out (+)= taps (*) in, image by image of one channel's row.
  void convolve(const A* in, const A* weight, A* out, bool accumulate) const {
    Stencil<A> s{in,     0,       p.height, p.width, 0,          p.height,
                 weight, nullptr, out,      false,   accumulate, false};
    s.channels = N;
    s.y_step = s.v_step = P;
    stencil<A>(p.dw_size, s);
  }

  void ghost_backward(int64_t ghost, const A* y, const A* dv, A* dy) const {
    double dw[49] = {};
    stencil_weight_grad(p.dw_size, y, dv, N, p.height, p.width, dw);
    A flipped[49];
    for (int64_t t = 0; t < taps; ++t) {
      put(args.dw2, ghost * taps + t, dw[t]);
      flipped[t] = w2[ghost * taps + taps - 1 - t];
    }
    convolve(dv, flipped, dy, true);
  }

  // The row of channel c of a tensor of `total` channels.
  void read(const void* from, int64_t total, int64_t c, A* to) const {
    for (int64_t n = 0; n < N; ++n)
      read_row(static_cast<const T*>(from) + (n * total + c) * P, to + n * P, P);
  }
  void write(const A* from, int64_t total, int64_t c, void* to) const {
    for (int64_t n = 0; n < N; ++n)
      write_row(from + n * P, static_cast<T*>(to) + (n * total + c) * P, P);
  }
};

template <class T>
void tail_forward(const TailArgs& args, int64_t begin, int64_t end) {
  const TailPass<T> pass(args);
  for (int64_t i = begin; i < end; ++i) pass.forward(i);
}
template <class T>
void tail_backward(const TailArgs& args, int64_t begin, int64_t end) {
  const TailPass<T> pass(args);
  for (int64_t i = begin; i < end; ++i) pass.backward(i);
}

}  // namespace GHOST_ISA
}  // namespace ghost
