// Training in NHWC with channels along the lanes: the formula of channels.h for modules of ratio 2
// whose slice keeps all ghosts, on u [N * P][m]. Nothing is transposed.
//
//   y = act1(bn1(u)),   v = w2 (*) y,   out = concat(y, act2(bn2(v)))
//
// A sum over all pixels ends a pass over the images. Forward has three passes: the statistics of u,
// those of v, out. Backward has three: the sums of bn2; dw2 and the sums of bn1; du. Every pass
// computes y and v again from u. A row of a map is W * m adjacent numbers, see lane_stencil.h.
//
// Tile map: an item is a fixed number of images, see lane_pass.h, and goes through them in chunks
// whose maps stay in L2: some images, or a band of rows of one. Binding resource: L2 bandwidth.
#pragma once

#include <algorithm>

#include "cpu/lane_pass.h"

namespace ghost {
namespace GHOST_ISA {

template <class A>
class LaneTrain : LanePass<A> {
  using Base = LanePass<A>;
  using Base::L, Base::p, Base::weight, Base::flipped, Base::sums, Base::put;
  using Base::N, Base::H, Base::W, Base::P, Base::m, Base::out_channels, Base::d, Base::taps,
      Base::F;
  using Base::partial;
  static constexpr int64_t kPiece = 256;  // pixels that a float32 sum spans
  const LaneTrainArgs& args;
  const int64_t R;
  const LaneItems items;
  LaneNorm<A> norm1, norm2;
  A *sum_g, *sum_gx;  // [m + L]
  A *y, *v, *dy;      // of a chunk

 public:
  explicit LaneTrain(const LaneTrainArgs& a)
      : Base(a.problem, a.problem.intrinsic, a.items.count, a.partial,
             (2 + a.problem.dw_size * a.problem.dw_size) * a.problem.intrinsic),
        args(a),
        R(d / 2),
        items(a.items) {
    const int64_t map = items.chunk_images * std::min(H, items.band + 4 * R) * F + 64;
    A *of_norm1, *of_norm2;
    this->allocate({{&of_norm1, LaneNorm<A>::elements(m)},
                    {&of_norm2, LaneNorm<A>::elements(m)},
                    {&sum_g, m + L},
                    {&sum_gx, m + L},
                    {&y, map},
                    {&v, map},
                    {&dy, map}},
                   args.w2);
    norm1 = LaneNorm<A>(of_norm1, m);
    norm2 = LaneNorm<A>(of_norm2, m);
  }

  void run(LaneStep step, int64_t begin, int64_t end) const {
    switch (step) {
      case LaneStep::kMoments1:
        for (int64_t i = begin; i < end; ++i) moments1(i);
        break;
      case LaneStep::kMergeMoments1:
        return merge_moments(args.mean1, args.var1);
      case LaneStep::kMoments2:
        norm1.set(args.norm1);
        for (int64_t i = begin; i < end; ++i) moments2(i);
        break;
      case LaneStep::kMergeMoments2:
        return merge_moments(args.mean2, args.var2);
      case LaneStep::kForward:
        norm1.set(args.norm1);
        norm2.set(args.norm2);
        for (int64_t i = begin; i < end; ++i) forward(i);
        break;
      case LaneStep::kSums2:
        norm1.set(args.norm1);
        norm2.set(args.norm2);
        for (int64_t i = begin; i < end; ++i) sums2(i);
        break;
      case LaneStep::kMergeSums2:
        return merge_sums(args.grads2, args.totals);
      case LaneStep::kGrads:
        norm1.set(args.norm1);
        norm2.set(args.norm2);
        set_means(norm2, args.norm2, args.totals);
        for (int64_t i = begin; i < end; ++i) grads(i);
        break;
      case LaneStep::kMergeGrads:
        merge_sums(args.grads1, args.totals + 2 * m);
        if (args.dw2) this->merge_tap_sums(2 * m, m, args.dw2);
        break;
      case LaneStep::kInput:
        norm1.set(args.norm1);
        set_means(norm1, args.norm1, args.totals + 2 * m);
        for (int64_t i = begin; i < end; ++i) input_grad(i);
        break;
    }
  }

 private:
  // The means that the gradient of a norm with batch statistics subtracts. totals: [2][m]
  void set_means(const LaneNorm<A>& norm, const NormArgs& n, const double* totals) const {
    if (!n.batch_stats) return;
    const A* const given = static_cast<const A*>(n.means);
    const double count = double(N * P);
    norm.set_means([&](int64_t c) { return given ? given[c] : A(totals[c] / count); },
                   [&](int64_t c) { return given ? given[m + c] : A(totals[m + c] / count); });
  }

  // Rows [r0, r1) of images [n, n + images): all rows if there are several images.
  struct Chunk {
    int64_t n, images, r0, r1;
    int64_t pixels(int64_t width) const { return images * (r1 - r0) * width; }
  };
  template <class Fn>
  void for_chunks(int64_t item, Fn&& f) const {
    const int64_t first = item * items.images, end = std::min(N, first + items.images);
    if (items.band < H) {
      for (int64_t n = first; n < end; ++n)
        for (int64_t r = 0; r < H; r += items.band) f(Chunk{n, 1, r, std::min(H, r + items.band)});
    } else {
      for (int64_t n = first; n < end; n += items.chunk_images)
        f(Chunk{n, std::min(items.chunk_images, end - n), 0, H});
    }
  }
  // The rows of a chunk's map with `halo` rows around them, those inside the image.
  template <class Number>
  LaneRows<Number> rows_of(Number* map, const Chunk& c, int64_t halo) const {
    return {map, std::max<int64_t>(c.r0 - halo, 0), std::min(H, c.r1 + halo)};
  }

  template <class Fn>
  static GHOST_INLINE void for_vectors_of(int64_t channels, Fn&& f) {
    for_channels<A, LastLanes<A>>(channels, f);
  }

  // Calls f for runs of pixels whose maps stay in L1 while all vectors of channels pass.
  template <class Fn>
  GHOST_INLINE void for_tiles(int64_t pixels, Fn&& f) const {
    const int64_t tile = std::clamp<int64_t>(2048 / m, 8, kPiece);
    for (int64_t i = 0; i < pixels; i += tile) f(i, std::min(i + tile, pixels));
  }

  // Calls f(i, c, lanes) for the vectors of a map [pixels][m]; i: numbers before the vector; c: the
  // channel of its first lane.
  template <class Fn>
  GHOST_INLINE void for_numbers(int64_t pixels, Fn&& f) const {
    const int64_t n = pixels * m, step = L % m;
    int64_t i = 0, c = 0;
    for (; i + L <= n; i += L, c += step, c -= c >= m ? m : 0) f(i, c, Lanes<A, true>{L, {}});
    if (i < n) f(i, c, LastLanes<A>{n - i, lane_range<A>(0, n - i)});
  }

  // y of the chunk's rows and of `halo` rows around them.
  LaneRows<const A> make_y(const Chunk& c, int64_t halo) const {
    const LaneRows<A> rows = rows_of(y, c, halo);
    const int64_t pixels = c.images * (rows.end - rows.begin) * W;
    const A* const u = static_cast<const A*>(args.u) + (c.n * H + rows.begin) * F;
    const LaneNorm<A> norm = norm1;  // a local: for the compiler, a store may change *this
    with_activation(p.act1.act, [&](auto act) {
      for_numbers(pixels, [&](int64_t i, int64_t c, auto lanes) {
        const Vec<A> pre = lanes.load(u + i) * load(norm.scale + c) + load(norm.shift + c);
        lanes.store(y + i, activate<decltype(act)::value, A>(pre, A(p.act1.slope)));
      });
    });
    return {y, rows.begin, rows.end};
  }
  // y as above and v = w2 (*) y of the chunk's rows.
  LaneRows<const A> make_v(const Chunk& c) const {
    const LaneRows<const A> from = make_y(c, R);
    this->template convolve<false>(from, weight, rows_of(v, c, 0), c.images, false);
    return from;
  }

  void moments1(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, 2 * m, 0.0);
    const int64_t first = item * items.images, end = std::min(N, first + items.images);
    this->add_moments(static_cast<const A*>(args.u) + first * P * m, (end - first) * P, m, kPiece,
                      0, of, of + m);
  }
  void moments2(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, 2 * m, 0.0);
    int64_t before = 0;
    for_chunks(item, [&](const Chunk& c) {
      make_v(c);
      this->add_moments(v, c.pixels(W), m, kPiece, before, of, of + m);
      before += c.pixels(W);
    });
  }
  void merge_moments(void* mean, void* var) const {
    const auto images = [&](int64_t item) {
      return std::min(items.images, N - item * items.images);
    };
    Base::merge_moments(m, images, mean, var);
  }

  void forward(int64_t item) const {
    for_chunks(item, [&](const Chunk& c) {
      const LaneNorm<A> norm = norm2;
      const LaneRows<const A> rows_y = make_v(c);
      const int64_t rows = c.r1 - c.r0;
      with_activation(p.act2.act, [&](auto act) {
        for (int64_t j = 0; j < c.images; ++j) {
          const A* from_y = rows_y.image(j, F).data + (c.r0 - rows_y.begin) * F;
          const A* from_v = v + j * rows * F;
          A* out = static_cast<A*>(args.out) + ((c.n + j) * H + c.r0) * W * out_channels;
          for (int64_t i = 0; i < rows * W; ++i, from_y += m, from_v += m, out += out_channels) {
            for_vectors_of(
                m, [&](int64_t ch, auto lanes) { lanes.store(out + ch, lanes.load(from_y + ch)); });
            for_vectors_of(m, [&](int64_t ch, auto lanes) {
              const Vec<A> pre =
                  lanes.load(from_v + ch) * load(norm.scale + ch) + load(norm.shift + ch);
              lanes.store(out + m + ch, activate<decltype(act)::value, A>(pre, A(p.act2.slope)));
            });
          }
        }
      });
    });
  }

  // dst = g = grad * act'(bn(x)) of n pixels, dst null for the sums alone. The sums of g and of
  // g * xhat, xhat the normalised x, are added to of [2][m], or null.
  // x, dst [n][m]; grad [n][ld_grad].
  void through_activation(LaneNorm<A> norm, const Activation& a, const A* x, const A* grad,
                          int64_t ld_grad, A* dst, int64_t n, double* of) const {
    with_activation(a.act, [&](auto act) {
      for (int64_t q = 0; q < n; q += kPiece) {
        std::fill_n(sum_g, norm.size, A(0));
        std::fill_n(sum_gx, norm.size, A(0));
        for_tiles(std::min(kPiece, n - q), [&](int64_t begin, int64_t end) {
          for_vectors_of(m, [&](int64_t c, auto lanes) {
            const Vec<A> k = load(norm.scale + c), s = load(norm.shift + c),
                         mean = load(norm.mean + c), inv = load(norm.inv_std + c);
            Vec<A> sum = load(sum_g + c), sum_x = load(sum_gx + c);
            for (int64_t i = q + begin; i < q + end; ++i) {
              const Vec<A> xv = lanes.load(x + i * m + c);
              const Vec<A> g = activate_grad<decltype(act)::value, A>(
                  xv * k + s, lanes.load(grad + i * ld_grad + c), A(a.slope));
              if (dst) lanes.store(dst + i * m + c, g);
              sum += g;
              sum_x += g * ((xv - mean) * inv);
            }
            lanes.store(sum_g + c, sum);
            lanes.store(sum_gx + c, sum_x);
          });
        });
        for (int64_t c = 0; of && c < m; ++c) {
          of[c] += double(sum_g[c]);
          of[m + c] += double(sum_gx[c]);
        }
      }
    });
  }
  // dst: the gradient of the norm's input x from g, the gradient of its output; all [n][m], dst may
  // be g.
  void through_norm(LaneNorm<A> norm, bool batch_stats, const A* x, const A* g, A* dst,
                    int64_t n) const {
    if (!batch_stats) {
      for_numbers(n, [&](int64_t i, int64_t c, auto lanes) {
        lanes.store(dst + i, lanes.load(g + i) * load(norm.scale + c));
      });
      return;
    }
    for_numbers(n, [&](int64_t i, int64_t c, auto lanes) {
      const Vec<A> xhat = (lanes.load(x + i) - load(norm.mean + c)) * load(norm.inv_std + c);
      const Vec<A> centered =
          lanes.load(g + i) - load(norm.mean_g + c) - xhat * load(norm.mean_gx + c);
      lanes.store(dst + i, centered * load(norm.scale + c));
    });
  }

  const A* grad_at(int64_t n, int64_t row, int64_t channel) const {
    return static_cast<const A*>(args.grad_out) + (n * H + row) * W * out_channels + channel;
  }

  void sums2(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, 2 * m, 0.0);
    for_chunks(item, [&](const Chunk& c) {
      make_v(c);
      through_activation(norm2, p.act2, v, grad_at(c.n, c.r0, m), out_channels, nullptr,
                         c.pixels(W), of);
    });
  }

  // The sums of dw2; the gradient g1 of bn1's output and its sums.
  void grads(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, (2 + taps) * m, 0.0);
    std::fill_n(sums, taps * this->ld_sums, A(0));
    int64_t rows_since = 0;
    for_chunks(item, [&](const Chunk& c) {
      const int64_t halo = args.g1 ? R : 0;  // of the rows of dv that dy reads
      const LaneRows<const A> rows_y = make_y(c, halo + R);
      const LaneRows<A> rows_v = rows_of(v, c, halo);
      const LaneRows<const A> dv = rows_of<const A>(v, c, halo);  // overwrites v
      const int64_t pixels = c.images * (dv.end - dv.begin) * W;
      this->template convolve<false>(rows_y, weight, rows_v, c.images, false);
      through_activation(norm2, p.act2, v, grad_at(c.n, dv.begin, m), out_channels, dy, pixels,
                         nullptr);
      through_norm(norm2, args.norm2.batch_stats, v, dy, v, pixels);
      for (int64_t j = 0; args.dw2 && j < c.images; ++j)
        this->add_tap_sums(rows_y.image(j, F), dv.image(j, F), c.r0, c.r1, 1);
      rows_since += c.images * (c.r1 - c.r0);
      if (rows_since >= kPiece) {
        this->flush_tap_sums(of + 2 * m);
        rows_since = 0;
      }
      if (!args.g1) return;
      const A* grad = grad_at(c.n, c.r0, 0);
      for (int64_t i = 0; i < c.pixels(W); ++i, grad += out_channels)
        for_vectors_of(m, [&](int64_t ch, auto lanes) {
          lanes.store(dy + i * m + ch, lanes.load(grad + ch));
        });
      this->template convolve<false>(dv, flipped, rows_of(dy, c, 0), c.images, true);
      const int64_t at = (c.n * H + c.r0) * F;
      through_activation(norm1, p.act1, static_cast<const A*>(args.u) + at, dy, m,
                         static_cast<A*>(args.g1) + at, c.pixels(W), of);
    });
    this->flush_tap_sums(of + 2 * m);
  }

  // totals: [2][m]
  void merge_sums(const NormGrads& out, double* totals) const {
    for (int64_t i = 0; i < 2 * m; ++i) totals[i] = this->sum_of_items(i);
    for (int64_t c = 0; c < m; ++c) {
      put(out.dbeta, c, totals[c]);
      put(out.dgamma, c, totals[m + c]);
    }
  }

  // du, in place of g1.
  void input_grad(int64_t item) const {
    const int64_t first = item * items.images, end = std::min(N, first + items.images);
    for (int64_t q = first * P; q < end * P; q += kPiece) {
      A* const g = static_cast<A*>(args.g1) + q * m;
      through_norm(norm1, args.norm1.batch_stats, static_cast<const A*>(args.u) + q * m, g, g,
                   std::min(kPiece, end * P - q));
    }
  }
};

template <class A>
void lane_train(const LaneTrainArgs& args, LaneStep step, int64_t begin, int64_t end) {
  LaneTrain<A>(args).run(step, begin, end);
}

}  // namespace GHOST_ISA
}  // namespace ghost
