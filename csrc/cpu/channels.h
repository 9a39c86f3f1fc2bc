// Training, channel by channel, on the output u of the primary convolution. All planes of a channel
// pass through L2 together: u is read from memory once, and only results are written.
//
//   forward    y = act1(bn1(u))      bn1 by the statistics of u, or by given ones
//              v = w2 (*) y
//              z = act2(bn2(v))      out = concat(y, z)[:, :out_channels]
//   backward   y, v again -> dz -> sums of bn2 -> dv -> dw2, dy -> sums of bn1 -> du, in place of u
//
// N images, m intrinsic channels, P = H * W pixels of an image, d the size of the depthwise kernel.
//
// Given statistics are not computed; backward stops at the last gradient that is needed. Sums run
// in a fixed order inside a channel and channels never mix: the bits do not depend on the number of
// threads.
//
// Tile map: an item is one channel (NCHW) or 16 channels (NHWC, so that whole cache lines are
// written) with their ghosts. Binding resource: L2 bandwidth; about ten passes over a plane, each
// of two or three vectors a cycle.
#pragma once

#include <algorithm>

#include "cpu/batch_norm.h"
#include "cpu/depthwise.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// Prefetches the cache lines of n values that are written soon.
template <class A>
GHOST_INLINE void fetch_to_write(const A* p, int64_t n) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(A));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i, 1, 2);
}

template <class T>
class ChannelPass {
  using A = ComputeOf<T>;
  const ChannelArgs& args;
  const Problem& p;
  const int64_t N, H, W, P, m, out_channels, ghosts_per_map, d;
  const int64_t block, row;  // channels of an item, pixels of a channel
  const bool nhwc;
  const bool need_dy, need_dv, need_dz;
  A* const u;
  const A* const w2;

 public:
  explicit ChannelPass(const ChannelArgs& a)
      : args(a),
        p(a.problem),
        N(p.batch),
        H(p.height),
        W(p.width),
        P(H * W),
        m(p.intrinsic),
        out_channels(p.out_channels),
        ghosts_per_map(p.ghosts_per_map()),
        d(p.dw_size),
        block(channel_block(p)),
        row(N * P),
        nhwc(p.layout == Layout::kNHWC),
        need_dy(a.need_du || wanted(a.grads1)),
        need_dv(need_dy || a.dw2),
        need_dz(need_dv || wanted(a.grads2)),
        u(static_cast<A*>(a.u)),
        w2(static_cast<const A*>(a.w2)) {}

  void forward(int64_t item) const {
    if constexpr (std::is_same_v<T, A>) {
      if (planes_in_place() && args.out && !args.u_is_y) return forward_planes(item);
    }
    const int64_t c0 = item * block, c1 = std::min(c0 + block, m), count = c1 - c0,
                  ld = row_stride();
    // Rows of y, then the rows of v; one row of v if nothing is written.
    const int64_t v_rows = args.out ? count * ghosts_per_map : 1;
    A* const y_all = row_scratch((count + std::max<int64_t>(v_rows, 1)) * ld);
    A* const v_all = y_all + count * ld;
    for (int64_t c = c0; c < c1; ++c) {
      const A* const uc = u + c * args.u_step;
      A* y = y_all + (c - c0) * ld;
      if (args.u_is_y)
        y = u + c * args.u_step;
      else
        affine_activate(act(p.act1, args.norm1, c),
                        normalised(args.norm1, c, uc, args.mean1, args.var1), uc, y, row);
      for (int64_t j = 0; j < ghosts_per_map; ++j) {
        const int64_t g = c * ghosts_per_map + j;
        const bool written = args.out && m + g < out_channels;
        if (args.norm2.mean && !written) continue;  // no statistics, no output
        A* const v = v_all + (args.out ? ((c - c0) * ghosts_per_map + j) * ld : 0);
        stencil<A>(d, whole_planes(y, P, N, H, W, taps(g), v, P));
        const Affine<A> f = normalised(args.norm2, g, v, args.mean2, args.var2);
        if (written) affine_activate(act(p.act2, args.norm2, g), f, v, v, row);
      }
    }
    if (!args.out) return;
    write(y_all, ld, c0, count);
    write(v_all, ld, m + c0 * ghosts_per_map, count * ghosts_per_map);
  }

  void backward(int64_t item) const {
    const bool in_place = planes_in_place();
    const int64_t c0 = item * block, count = std::min(block, m - c0), ld = row_stride(),
                  rows = in_place ? 4 : 3 + count * (1 + ghosts_per_map);
    A* const y = row_scratch(rows * ld);
    A* const grads = y + 3 * ld;            // of y
    A* const grads_z = grads + count * ld;  // of z, unless grad_out is read in place
    if (!in_place) {
      if (need_dy) read_grad(c0, count, grads, ld);
      if (need_dz) read_grad(m + c0 * ghosts_per_map, count * ghosts_per_map, grads_z, ld);
    }
    const A* const planes = static_cast<const A*>(args.grad_out);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = c0 + i, g = c * ghosts_per_map;
      A* const dy = grads + i * ld;
      if (in_place)
        channel_backward(c, y, dy, {planes + c * P, P, N, out_channels * P},
                         {planes + (m + g) * P, P, N, out_channels * P}, P);
      else
        channel_backward(c, y, dy, {dy, row, 1, P}, {grads_z + i * ghosts_per_map * ld, row, 1, P},
                         ld);
    }
  }

  void primary_stats(int64_t item) const {
    for (int64_t c = item * block; c < (item + 1) * block && c < m; ++c) {
      Moments mu;
      mu.add(u + c * args.u_step, row);
      put(args.mean1, c, mu.mean);
      put(args.var1, c, mu.variance());
    }
  }

 private:
  const A* taps(int64_t ghost) const { return w2 + ghost * d * d; }
  // A row of one channel: all images, with room for whole vectors.
  int64_t row_stride() const { return round_up(row, 16) + 16; }
  // Vectors may reach before the first element and past the last one.
  static A* row_scratch(int64_t elements) {
    return static_cast<A*>(thread_scratch(size_t(elements + 128) * sizeof(A))) + 64;
  }

  // Planes of out and grad_out in the compute type, of more than a few vectors, are written and
  // read in place.
  bool planes_in_place() const { return std::is_same_v<T, A> && !nhwc && P >= kLeastPlane; }
  static constexpr int64_t kLeastPlane = 128;
  // Planes of out up to this size are prefetched one ahead: the hardware prefetches longer ones.
  static constexpr int64_t kFetched = 1024;

  // One channel: y and z are made in their planes of out.
  void forward_planes(int64_t c) const {
    // images: as many as have planes that stay in L1 between the passes over them.
    const int64_t step = out_channels * P, images = P < 1024 ? 1024 / P : 1;
    A* const out = static_cast<A*>(args.out);
    A* const v_scratch = row_scratch(images * P);
    const A* const uc = u + c * args.u_step;
    const Activation act1 = act(p.act1, args.norm1, c);
    const Affine<A> f1 = normalised(args.norm1, c, uc, args.mean1, args.var1);
    for (int64_t j = 0; j < ghosts_per_map || j == 0; ++j) {
      const int64_t g = c * ghosts_per_map + j;
      const bool written = ghosts_per_map > 0 && m + g < out_channels,
                 needed = written || (ghosts_per_map > 0 && !args.norm2.mean);
      if (j > 0 && !needed) continue;
      const Activation act2 = act(p.act2, args.norm2, g);
      Moments moments;
      for (int64_t n = 0; n < N; n += images) {
        const int64_t count = N - n < images ? N - n : images;
        A* const y = out + n * step + c * P;
        A* const v = written ? out + n * step + (m + g) * P : v_scratch;
        const int64_t v_step = written ? step : P;
        for (int64_t i = 0; j == 0 && i < count; ++i) {
          affine_activate(act1, f1, uc + (n + i) * P, y + i * step, P);
          if (c + 1 < m && P <= kFetched) fetch_to_write(y + i * step + P, P);
        }
        if (!needed) continue;
        stencil<A>(d, whole_planes(y, step, count, H, W, taps(g), v, v_step));
        for (int64_t i = 0; i < count; ++i) {
          if (args.norm2.mean)
            affine_activate(act2, Affine<A>(args.norm2, g), v + i * v_step, v + i * v_step, P);
          else
            moments.add(v + i * v_step, P);
          if (written && m + g + 1 < out_channels && P <= kFetched)
            fetch_to_write(v + i * v_step + P, P);
        }
      }
      if (!needed || args.norm2.mean) continue;
      put(args.mean2, g, moments.mean);
      put(args.var2, g, moments.variance());
      const Affine<A> f2(args.norm2, g, moments.mean, moments.variance());
      for (int64_t n = 0; written && n < N; ++n) {
        A* const v = out + n * step + (m + g) * P;
        affine_activate(act2, f2, v, v, P);
      }
    }
  }

  // The gradient of one channel of out: `images` runs of n pixels, `step` elements apart.
  struct GradRuns {
    const A* at;
    int64_t n, images, step;
  };

  // The gradients of channel c and of its ghosts. y: scratch for the rows y, v and dv, followed by
  // dy. grad_y, grad_z: the gradients of y and of the first ghost; next_ghost: elements from the
  // gradient of a ghost to that of the next ghost.
  void channel_backward(int64_t c, A* y, A* dy, GradRuns grad_y, const GradRuns& grad_z,
                        int64_t next_ghost) const {
    const int64_t ld = row_stride();
    A* const v = y + ld;
    A* const dv = v + ld;
    const A* const no_addend = nullptr;
    const Affine<A> f1(args.norm1, c);
    const Activation act1 = act(p.act1, args.norm1, c);
    A* const uc = u + c * args.u_step;
    if (need_dz && ghosts_per_map > 0) affine_activate(act1, f1, uc, y, row);
    for (int64_t j = 0; need_dz && j < ghosts_per_map; ++j) {
      const int64_t g = c * ghosts_per_map + j;
      double dw[49] = {};
      GradSums sums;
      if (m + g < out_channels) {  // a ghost cut off by the slice has no gradient
        const Affine<A> f2(args.norm2, g);
        stencil<A>(d, whole_planes(y, P, N, H, W, taps(g), v, P));
        activation_backward(act(p.act2, args.norm2, g), f2, v, grad_z.at + j * next_ghost, dv,
                            grad_z.n, sums, no_addend, grad_z.images, grad_z.step);
        if (need_dv) input_grad(f2, args.norm2, g, m * ghosts_per_map, sums, v, dv, dv);
        if (args.dw2) stencil_weight_grad(d, y, dv, N, H, W, dw);
        if (need_dy) add_ghost_grad(c, g, dv, dy, grad_y);
      }
      for (int64_t i = 0; i < d * d; ++i) put(args.dw2, g * d * d + i, dw[i]);
      put(args.grads2, g, sums);
    }
    if (!need_dy) return;
    GradSums sums;
    activation_backward(act1, f1, uc, grad_y.at, dy, grad_y.n, sums, no_addend, grad_y.images,
                        grad_y.step);
    put(args.grads1, c, sums);
    if (args.need_du) input_grad(f1, args.norm1, c, m, sums, uc, dy, uc);
  }

  // dy = grad_y + flipped taps of ghost g (*) dv; grad_y becomes dy.
  void add_ghost_grad(int64_t c, int64_t g, const A* dv, A* dy, GradRuns& grad_y) const {
    A flipped[49];
    std::reverse_copy(taps(g), taps(g + 1), flipped);
    // The stencil reads a wide plane in strips of columns, which is slow for grad_out in memory: it
    // is copied first.
    if (grad_y.at != dy && W > 4 * kLanes<A>) {
      read_grad(c, 1, dy, row_stride());
      grad_y = {dy, P, N, P};
    }
    Stencil<A> s = whole_planes(dv, P, N, H, W, flipped, dy, P, true);
    s.from = grad_y.at;
    s.from_step = grad_y.step;
    stencil<A>(d, s);
    if (grad_y.at != dy) grad_y = {dy, P, N, P};
  }

  // p null: the result is not needed.
  static void put(void* p, int64_t i, double v) {
    if (p) static_cast<A*>(p)[i] = A(v);
  }
  static void put(const NormGrads& out, int64_t i, const GradSums& sums) {
    put(out.dgamma, i, sums.gx);
    put(out.dbeta, i, sums.g);
    put(out.dslopes, i, sums.slope);
  }
  static bool wanted(const NormGrads& out) { return out.dgamma || out.dbeta || out.dslopes; }

  // The activation of channel c: a PReLU gets the channel's slope.
  static Activation act(Activation a, const NormArgs& n, int64_t c) {
    if (n.slopes) a.slope = double(static_cast<const A*>(n.slopes)[c]);
    return a;
  }

  // The norm of channel c with its given statistics, or with those of the row x, which are then
  // written to mean and var.
  Affine<A> normalised(const NormArgs& n, int64_t c, const A* x, void* mean, void* var) const {
    if (n.mean) return Affine<A>(n, c);
    Moments moments;
    moments.add(x, row);
    put(mean, c, moments.mean);
    put(var, c, moments.variance());
    return Affine<A>(n, c, moments.mean, moments.variance());
  }

  // dst: the gradient of a norm's input x from g, the gradient of its output. The norm has
  // `channels` channels.
  void input_grad(const Affine<A>& f, const NormArgs& n, int64_t c, int64_t channels, GradSums sums,
                  const A* x, const A* g, A* dst) const {
    double count = double(row);
    if (n.means) {
      const A* const means = static_cast<const A*>(n.means);
      sums.g = double(means[c]);
      sums.gx = double(means[channels + c]);
      count = 1;
    }
    norm_backward(f, sums, count, n.batch_stats, x, g, dst, row);
  }

  // src [count][N * P], ld elements from row to row, into channels [ch, ch + count) of out.
  void write(const A* src, int64_t ld, int64_t ch, int64_t count) const {
    if (ch + count > out_channels) count = out_channels - ch;
    T* out = static_cast<T*>(args.out);
    for (int64_t n = 0; n < N && count > 0; ++n) {
      if (nhwc)
        write_transposed(src + n * P, ld, out + n * out_channels * P + ch, out_channels, P, count);
      else
        for (int64_t c = 0; c < count; ++c)
          write_row(src + c * ld + n * P, out + (n * out_channels + ch + c) * P, P);
    }
  }

  // Channels [ch, ch + count) of grad_out into dst [count][N * P].
  void read_grad(int64_t ch, int64_t count, A* dst, int64_t ld) const {
    if (ch + count > out_channels) count = out_channels - ch;
    const T* g = static_cast<const T*>(args.grad_out);
    for (int64_t n = 0; n < N && count > 0; ++n) {
      if (nhwc)
        read_transposed(g + n * out_channels * P + ch, out_channels, dst + n * P, ld, P, count);
      else
        for (int64_t c = 0; c < count; ++c)
          read_row(g + (n * out_channels + ch + c) * P, dst + c * ld + n * P, P);
    }
  }
};

template <class T>
void channels_forward(const ChannelArgs& args, int64_t begin, int64_t end) {
  const ChannelPass<T> pass(args);
  for (int64_t i = begin; i < end; ++i) pass.forward(i);
}
template <class T>
void channels_backward(const ChannelArgs& args, int64_t begin, int64_t end) {
  const ChannelPass<T> pass(args);
  for (int64_t i = begin; i < end; ++i) pass.backward(i);
}
template <class A>
void primary_stats(const ChannelArgs& args, int64_t begin, int64_t end) {
  const ChannelPass<A> pass(args);
  for (int64_t i = begin; i < end; ++i) pass.primary_stats(i);
}

}  // namespace GHOST_ISA
}  // namespace ghost
