// Training of a Ghost module whose batch norm and activation follow the concatenation, from the
// output y of the primary convolution on, in NCHW.
//
//   v = w2 (*) y,   u = concat(y, v)[:, :out_channels],   out = act(bn(u) + residual)
//
//   forward    u, its statistics, out
//   backward   u again
//              g = act'(bn(u) + residual) * grad_out, which is the gradient of the residual
//              the sums of g and of g * uhat: dbeta and dgamma
//              du = the gradient of bn's input from g
//              dw2 from y and du of v;   dy = du of y + flipped w2 (*) du of v
//
// y [N, m, H, W], w2 [g, d, d], u, out and residual [N, out_channels, H, W].
// N images, m intrinsic channels, P = H * W pixels of an image, d the size of the depthwise kernel.
//
// Tile map: an item is a channel of y with its ghosts, all images together; a channel of u is a row
// of N * P pixels. Order of the sums and binding resource as in channels.h.
#pragma once

#include <algorithm>

#include "cpu/batch_norm.h"
#include "cpu/depthwise.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"
#include "cpu/tail_kernels.h"

namespace ghost {
namespace GHOST_ISA {

template <class T>
class TailPass {
  using A = ComputeOf<T>;
  const TailArgs& args;
  const Problem& p;
  const int64_t N, P, m, out_channels, ghosts_per_map, taps, row, ld;
  const A* const w2;

 public:
  explicit TailPass(const TailArgs& a)
      : args(a),
        p(a.problem),
        N(p.batch),
        P(p.height * p.width),
        m(p.intrinsic),
        out_channels(p.out_channels),
        ghosts_per_map(p.ghosts_per_map()),
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
      if (residual) read(args.residual, out_channels, ch, residual);
      affine_activate(p.act2, Affine<A>(norm, ch), ui, ui, row, residual);
      write(ui, out_channels, ch, args.out);
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
      read(args.grad_out, out_channels, ch, gi);
      if (residual) read(args.residual, out_channels, ch, residual);
      activation_backward(p.act2, f, ui, gi, gi, row, sums, residual);
      put(args.dgamma, ch, sums.gx);
      put(args.dbeta, ch, sums.g);
      if (args.dresidual) write(gi, out_channels, ch, args.dresidual);
      norm_backward(f, sums, double(row), args.batch_stats, ui, gi, gi, row);
      if (i > 0) ghost_backward(c * ghosts_per_map + i - 1, u, g, du);
    }
    const int64_t cut = (c * ghosts_per_map + kept) * taps, end = (c + 1) * ghosts_per_map * taps;
    for (int64_t i = cut; i < end; ++i) put(args.dw2, i, 0.0);
    if (args.dy) write(du, m, c, args.dy);
  }

 private:
  static void put(void* p, int64_t i, double v) { static_cast<A*>(p)[i] = A(v); }

  // Ghosts of channel c that the slice does not cut off.
  int64_t ghosts(int64_t c) const {
    return std::clamp<int64_t>(out_channels - m - c * ghosts_per_map, 0, ghosts_per_map);
  }
  // The channel of u in row i of item c.
  int64_t channel(int64_t c, int64_t i) const {
    return i == 0 ? c : m + c * ghosts_per_map + i - 1;
  }

  A* scratch(int64_t rows) const {
    return static_cast<A*>(thread_scratch(size_t(rows * ld + 128) * sizeof(A))) + 64;
  }

  // u [1 + ghosts][ld] of item c.
  void make_u(int64_t c, A* u) const {
    read(args.y, m, c, u);
    for (int64_t j = 0; j < ghosts(c); ++j)
      convolve(u, w2 + (c * ghosts_per_map + j) * taps, u + (1 + j) * ld, false);
  }

  // out (+)= weight (*) in, rows of one channel.
  void convolve(const A* in, const A* weight, A* out, bool accumulate) const {
    stencil<A>(p.dw_size, whole_planes(in, P, N, p.height, p.width, weight, out, P, accumulate));
  }

  // dw2 of a ghost from its inputs y and its gradient dv, and its part of dy.
  void ghost_backward(int64_t ghost, const A* y, const A* dv, A* dy) const {
    double dw[49] = {};
    stencil_weight_grad(p.dw_size, y, dv, N, p.height, p.width, dw);
    for (int64_t t = 0; t < taps; ++t) put(args.dw2, ghost * taps + t, dw[t]);
    A flipped[49];
    std::reverse_copy(w2 + ghost * taps, w2 + (ghost + 1) * taps, flipped);
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
