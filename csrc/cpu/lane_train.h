// Training in NHWC with channels along the lanes: what channels.h computes, for modules of ratio 2
// whose slice keeps all ghosts, on u [N * P][m]. Nothing is transposed.
//
//   y = act1(bn1(u)),   v = w2 (*) y,   out = concat(y, act2(bn2(v)))
//
// Each sum over all pixels splits a direction into passes over the images: forward has three (the
// statistics of u, those of v, out), backward has three (the sums of bn2, those of bn1 with dw2,
// du). Every pass makes y and v again from u. A row of a map is W * m neighbouring numbers, in
// which a step of one pixel is a step of m, see tail_lanes.h.
//
// Tile map: an item is a fixed number of images, whatever the number of threads, and goes through
// them by chunks whose maps stay in L2: some images, or a band of rows of one. Every item has its
// own sums, which are added up in the order of the items. Binding resource: L2 bandwidth.
#pragma once

#include <algorithm>
#include <iterator>

#include "cpu/lanes.h"
#include "cpu/tail_lanes.h"

namespace ghost {
namespace GHOST_ISA {

// out[h][i] (+)= sum_{a,b} taps[a][b][i % q] * in[h + a - D/2][i + (b - D/2) * q]
//   rows h of [out0, out1), at `out`; in holds rows [in0, in1), those outside are zero; the rest as
//   in lane_stencil
template <class A, int D>
__attribute__((noinline)) void lane_stencil_rows(const A* in, int64_t in0, int64_t in1,
                                                 const A* taps, int64_t ld, A* out, int64_t out0,
                                                 int64_t out1, int64_t F, int64_t q,
                                                 bool accumulate) {
  constexpr int L = kLanes<A>, R = D / 2;
  constexpr bool kTapsInRegisters = D <= 3;
  using V = Vec<A>;
  for (int64_t i = 0; i < F; i += L) {
    const A* const tap = taps + i % q;
    const MaskT<A> inside = lane_range<A>(0, F - i);
    const bool whole = i >= R * q && i + L + R * q <= F;  // no lane of any tap is outside
    MaskT<A> mask[D];
    V held[kTapsInRegisters ? D * D : 1];
#pragma GCC unroll 7
    for (int b = 0; b < D; ++b) {
      const int64_t at = i + (b - R) * q;
      mask[b] = lane_range<A>(-at, F - at);
    }
    if constexpr (kTapsInRegisters) {
#pragma GCC unroll 9
      for (int t = 0; t < D * D; ++t) held[t] = load(tap + t * ld);
    }
    const auto rows = [&](auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      V acc[D] = {};  // of rows r - R, ..., r + R
      for (int64_t r = out0 - R; r < out1 + R; ++r) {
        if (r >= in0 && r < in1) {
          const A* const x = in + (r - in0) * F + i;
#pragma GCC unroll 7
          for (int b = 0; b < D; ++b) {
            const A* const p = x + (b - R) * q;
            const V xb = kFull ? load(p) : load_masked(p, mask[b]);
#pragma GCC unroll 7
            for (int a = 0; a < D; ++a) {
              const int t = (D - 1 - a) * D + b;
              if constexpr (kTapsInRegisters)
                acc[a] += held[t] * xb;
              else
                acc[a] += load(tap + t * ld) * xb;
            }
          }
        }
        if (r >= out0 + R) {
          A* const o = out + (r - R - out0) * F + i;
          if constexpr (kFull)
            store(o, accumulate ? acc[0] + load(o) : acc[0]);
          else
            store_masked(o, accumulate ? acc[0] + load_masked(o, inside) : acc[0], inside);
        }
#pragma GCC unroll 7
        for (int a = 0; a + 1 < D; ++a) acc[a] = acc[a + 1];
        acc[D - 1] = V{};
      }
    };
    if (whole)
      rows(std::true_type{});
    else
      rows(std::false_type{});
  }
}

// sums[a][b][i] += sum_h dv[h][i] * in[h + a - D/2][i + (b - D/2) * q]
//   rows h of [r0, r1); dv and in hold rows from dv0 and in0 on; rows of `in` outside [in0, in1)
//   are zero; sums: [D * D][ld]
template <class A, int D>
__attribute__((noinline)) void lane_weight_grad_rows(const A* in, int64_t in0, int64_t in1,
                                                     const A* dv, int64_t dv0, int64_t r0,
                                                     int64_t r1, int64_t F, int64_t q, A* sums,
                                                     int64_t ld) {
  constexpr int L = kLanes<A>, R = D / 2;
  for (int64_t i = 0; i < F; i += L) {
    Vec<A> acc[D][D] = {};
    MaskT<A> mask[D];
#pragma GCC unroll 7
    for (int b = 0; b < D; ++b) {
      const int64_t at = i + (b - R) * q;
      mask[b] = lane_range<A>(-at, F - at);
    }
    const MaskT<A> inside = lane_range<A>(0, F - i);
    // Row r of the input meets row r + R - a of dv under tap row a.
    Vec<A> g[D] = {};
    for (int64_t r = r0 - 2 * R; r < r1 + R; ++r) {
#pragma GCC unroll 7
      for (int a = D - 1; a > 0; --a) g[a] = g[a - 1];
      g[0] = r + R >= r0 && r + R < r1 ? load_masked(dv + (r + R - dv0) * F + i, inside) : Vec<A>{};
      if (r < in0 || r >= in1 || r < r0 - R) continue;
#pragma GCC unroll 7
      for (int b = 0; b < D; ++b) {
        const Vec<A> x = load_masked(in + (r - in0) * F + i + (b - R) * q, mask[b]);
#pragma GCC unroll 7
        for (int a = 0; a < D; ++a) acc[a][b] += g[a] * x;
      }
    }
#pragma GCC unroll 7
    for (int a = 0; a < D; ++a)
#pragma GCC unroll 7
      for (int b = 0; b < D; ++b) {
        A* const s = sums + (a * D + b) * ld + i;
        store_masked(s, load_masked(s, inside) + acc[a][b], inside);
      }
  }
}

// The last few channels of a pixel. A masked store is slow on some AVX2 processors.
template <class A>
struct LastLanes {
  int64_t count;
  MaskT<A> mask;
  GHOST_INLINE Vec<A> load(const A* p) const { return load_masked(p, mask); }
  GHOST_INLINE void store(A* p, Vec<A> v) const { store_first(p, v, count); }
};
// Calls f(c, lanes) for vectors of a pixel's channels.
template <class A, class F>
GHOST_INLINE void for_vectors_of(int64_t channels, F&& f) {
  constexpr int64_t L = kLanes<A>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) f(c, Lanes<A, true>{L, {}});
  if (c < channels) f(c, LastLanes<A>{channels - c, lane_range<A>(0, channels - c)});
}

template <class A>
class LaneTrain {
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kPiece = 256;  // pixels whose sums are float32
  const LaneTrainArgs& args;
  const Problem& p;
  const int64_t N, H, W, P, m, oup, d, taps, R, F;
  const LaneItems items;
  const int64_t ld_taps, ld_sums, ld_norm;
  // Parameters of both norms, repeated to m + a vector.
  A *norm, *acc;               // [12][m + L], [2][m + L]
  A *weight, *flipped, *sums;  // [taps][ld_taps] twice, [taps][ld_sums]
  A *y, *v, *dy;               // of a chunk

  enum Parameter { kScale, kShift, kMean, kInvStd, kMeanG, kMeanGx, kParameters };
  A* param(int which, Parameter i) const {
    return norm + ((which - 1) * kParameters + i) * ld_norm;
  }

 public:
  explicit LaneTrain(const LaneTrainArgs& a)
      : args(a),
        p(a.problem),
        N(p.batch),
        H(p.height),
        W(p.width),
        P(H * W),
        m(p.intrinsic),
        oup(p.out_channels),
        d(p.dw_size),
        taps(d * d),
        R(d / 2),
        F(W * m),
        items(a.items),
        ld_taps(m + L),
        ld_sums(F + L),
        ld_norm(m + L) {
    const int64_t map = items.chunk_images * std::min(H, items.band + 4 * R) * F + 64;
    const int64_t sizes[] = {2 * kParameters * ld_norm,
                             2 * ld_norm,
                             taps * ld_taps,
                             taps * ld_taps,
                             taps * ld_sums,
                             map,
                             map,
                             map};
    A** const parts[] = {&norm, &acc, &weight, &flipped, &sums, &y, &v, &dy};
    int64_t total = 64;
    for (int64_t size : sizes) total += round_up(size, 16) + 16;
    A* next = static_cast<A*>(thread_scratch(size_t(total) * sizeof(A))) + 32;
    for (size_t i = 0; i < std::size(sizes); ++i) {
      *parts[i] = next;
      next += round_up(sizes[i], 16) + 16;
    }
    const A* const w2 = static_cast<const A*>(args.w2);
    for (int64_t t = 0; t < taps && w2; ++t)
      for (int64_t i = 0, c = 0; i < ld_taps; ++i, c = c + 1 < m ? c + 1 : 0)
        weight[t * ld_taps + i] = flipped[(taps - 1 - t) * ld_taps + i] = w2[c * taps + t];
  }

  void run(LaneStep step, int64_t begin, int64_t end) const {
    switch (step) {
      case LaneStep::kMoments1:
        for (int64_t i = begin; i < end; ++i) moments1(i);
        break;
      case LaneStep::kMergeMoments1:
        return merge_moments(args.mean1, args.var1);
      case LaneStep::kMoments2:
        set_norm(1, args.norm1);
        for (int64_t i = begin; i < end; ++i) moments2(i);
        break;
      case LaneStep::kMergeMoments2:
        return merge_moments(args.mean2, args.var2);
      case LaneStep::kForward:
        set_norm(1, args.norm1);
        set_norm(2, args.norm2);
        for (int64_t i = begin; i < end; ++i) forward(i);
        break;
      case LaneStep::kSums2:
        set_norm(1, args.norm1);
        set_norm(2, args.norm2);
        for (int64_t i = begin; i < end; ++i) sums2(i);
        break;
      case LaneStep::kMergeSums2:
        return merge_sums(args.grads2, args.totals);
      case LaneStep::kGrads:
        set_norm(1, args.norm1);
        set_norm(2, args.norm2);
        set_means(2, args.norm2, args.totals);
        for (int64_t i = begin; i < end; ++i) grads(i);
        break;
      case LaneStep::kMergeGrads:
        merge_sums(args.grads1, args.totals + 2 * m);
        return merge_taps();
      case LaneStep::kInput:
        set_norm(1, args.norm1);
        set_means(1, args.norm1, args.totals + 2 * m);
        for (int64_t i = begin; i < end; ++i) input_grad(i);
        break;
    }
  }

 private:
  static void put(void* p, int64_t i, double x) {
    if (p) static_cast<A*>(p)[i] = A(x);
  }

  void set_norm(int which, const NormArgs& n) const {
    for (int64_t c = 0; c < ld_norm; ++c) {
      const Affine<A> f(n, c % m);
      param(which, kScale)[c] = f.scale;
      param(which, kShift)[c] = f.shift;
      param(which, kMean)[c] = f.mean;
      param(which, kInvStd)[c] = f.inv_std;
      param(which, kMeanG)[c] = param(which, kMeanGx)[c] = A(0);
    }
  }
  // What a norm with batch statistics subtracts from its gradient. totals: [2][m]
  void set_means(int which, const NormArgs& n, const double* totals) const {
    if (!n.batch_stats) return;
    const A* const given = static_cast<const A*>(n.means);
    const double count = double(N * P);
    for (int64_t i = 0; i < ld_norm; ++i) {
      const int64_t c = i % m;
      param(which, kMeanG)[i] = given ? given[c] : A(totals[c] / count);
      param(which, kMeanGx)[i] = given ? given[m + c] : A(totals[m + c] / count);
    }
  }

  double* partial(int64_t item) const { return args.partial + item * (2 + taps) * m; }

  // Rows [r0, r1) of images [n, n + images); all rows where there are several images.
  struct Chunk {
    int64_t n, images, r0, r1;
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
  int64_t above(const Chunk& c, int64_t halo) const { return std::max<int64_t>(c.r0 - halo, 0); }
  int64_t below(const Chunk& c, int64_t halo) const { return std::min(H, c.r1 + halo); }

  // Calls f for runs of pixels whose maps stay in L1 while the vectors of channels pass.
  template <class Fn>
  GHOST_INLINE void for_tiles(int64_t pixels, Fn&& f) const {
    const int64_t tile = std::clamp<int64_t>(2048 / m, 8, kPiece);
    for (int64_t i = 0; i < pixels; i += tile) f(i, std::min(i + tile, pixels));
  }

  // Calls f(i, c, lanes) for the vectors of a map of some pixels, i numbers from its start, where
  // channel c is the first.
  template <class Fn>
  GHOST_INLINE void for_numbers(int64_t pixels, Fn&& f) const {
    const int64_t n = pixels * m, step = L % m;
    int64_t i = 0, c = 0;
    for (; i + L <= n; i += L, c += step, c -= c >= m ? m : 0) f(i, c, Lanes<A, true>{L, {}});
    if (i < n) f(i, c, LastLanes<A>{n - i, lane_range<A>(0, n - i)});
  }

  // y of the chunk's rows and `halo` rows around them.
  void make_y(const Chunk& c, int64_t halo) const {
    const int64_t rows = below(c, halo) - above(c, halo), n = c.images * rows * W;
    const A* const u = static_cast<const A*>(args.u) + (c.n * H + above(c, halo)) * F;
    const A* const scale = param(1, kScale);
    const A* const shift = param(1, kShift);
    with_activation(p.act1.act, [&](auto act) {
      for_numbers(n, [&](int64_t i, int64_t c, auto lanes) {
        lanes.store(y + i,
                    activate<decltype(act)::value, A>(
                        lanes.load(u + i) * load(scale + c) + load(shift + c), A(p.act1.slope)));
      });
    });
  }

  // Rows of the chunk with `halo` rows around them, of what has `in_halo` such rows.
  void convolve(const Chunk& c, const A* in, int64_t in_halo, const A* w, A* out, int64_t halo,
                bool accumulate) const {
    const int64_t in0 = above(c, in_halo), in1 = below(c, in_halo), out0 = above(c, halo),
                  out1 = below(c, halo);
    for (int64_t j = 0; j < c.images; ++j) {
      const A* const x = in + j * (in1 - in0) * F;
      A* const o = out + j * (out1 - out0) * F;
      switch (d) {
#define GHOST_TAPS(D)                                                                  \
  case D:                                                                              \
    lane_stencil_rows<A, D>(x, in0, in1, w, ld_taps, o, out0, out1, F, m, accumulate); \
    break;
        GHOST_TAPS(1)
        GHOST_TAPS(3)
        GHOST_TAPS(5)
        GHOST_TAPS(7)
#undef GHOST_TAPS
      }
    }
  }

  // Adds the moments of x [pixels][m], the item's pixels from `before` on.
  void add_moments(const A* x, int64_t pixels, int64_t before, double* of) const {
    for (int64_t q = 0; q < pixels; q += kPiece) {
      const int64_t n = std::min(kPiece, pixels - q);
      for_vectors_of<A>(m, [&](int64_t c, auto lanes) {
        const A* const from = x + q * m + c;
        const Vec<A> mean = sum_pixels<A, false>(from, n, m, Vec<A>{}, lanes) / set1(A(n));
        A means[L], squares[L];
        store(means, mean);
        store(squares, sum_pixels<A, true>(from, n, m, mean, lanes));
        for (int64_t l = 0; l < std::min<int64_t>(lanes.count, L); ++l) {
          Moments all{double(before + q), of[c + l], of[m + c + l]};
          all.merge(double(n), double(means[l]), double(squares[l]));
          of[c + l] = all.mean;
          of[m + c + l] = all.m2;
        }
      });
    }
  }
  void moments1(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, 2 * m, 0.0);
    const int64_t first = item * items.images, end = std::min(N, first + items.images);
    add_moments(static_cast<const A*>(args.u) + first * P * m, (end - first) * P, 0, of);
  }
  void moments2(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, 2 * m, 0.0);
    int64_t before = 0;
    for_chunks(item, [&](const Chunk& c) {
      make_y(c, R);
      convolve(c, y, R, weight, v, 0, false);
      const int64_t pixels = c.images * (c.r1 - c.r0) * W;
      add_moments(v, pixels, before, of);
      before += pixels;
    });
  }
  void merge_moments(void* mean, void* var) const {
    for (int64_t c = 0; c < m; ++c) {
      Moments all;
      for (int64_t item = 0; item < items.count; ++item) {
        const int64_t first = item * items.images, images = std::min(items.images, N - first);
        all.merge(double(images * P), partial(item)[c], partial(item)[m + c]);
      }
      put(mean, c, all.mean);
      put(var, c, all.variance());
    }
  }

  void forward(int64_t item) const {
    const A* const scale = param(2, kScale);
    const A* const shift = param(2, kShift);
    for_chunks(item, [&](const Chunk& c) {
      make_y(c, R);
      convolve(c, y, R, weight, v, 0, false);
      const int64_t y0 = above(c, R), y1 = below(c, R), rows = c.r1 - c.r0;
      with_activation(p.act2.act, [&](auto act) {
        for (int64_t j = 0; j < c.images; ++j) {
          const A* from_y = y + (j * (y1 - y0) + c.r0 - y0) * F;
          const A* from_v = v + j * rows * F;
          A* out = static_cast<A*>(args.out) + ((c.n + j) * H + c.r0) * W * oup;
          for (int64_t i = 0; i < rows * W; ++i, from_y += m, from_v += m, out += oup) {
            for_vectors_of<A>(
                m, [&](int64_t ch, auto lanes) { lanes.store(out + ch, lanes.load(from_y + ch)); });
            for_vectors_of<A>(m, [&](int64_t ch, auto lanes) {
              const Vec<A> pre = lanes.load(from_v + ch) * load(scale + ch) + load(shift + ch);
              lanes.store(out + m + ch, activate<decltype(act)::value, A>(pre, A(p.act2.slope)));
            });
          }
        }
      });
    });
  }

  // g = grad * act'(bn(x)) of n pixels, stored to dst if that is not null; their sums of g and of g
  // times the normalised x are added to of [2][m], if that is not null.
  void through_activation(int which, const Activation& a, const A* x, const A* grad,
                          int64_t ld_grad, A* dst, int64_t n, double* of) const {
    A* const sum_g = acc;
    A* const sum_gx = acc + ld_norm;
    with_activation(a.act, [&](auto act) {
      for (int64_t q = 0; q < n; q += kPiece) {
        std::fill_n(acc, 2 * ld_norm, A(0));
        for_tiles(std::min(kPiece, n - q), [&](int64_t begin, int64_t end) {
          for_vectors_of<A>(m, [&](int64_t c, auto lanes) {
            const Vec<A> k = load(param(which, kScale) + c), s = load(param(which, kShift) + c),
                         mean = load(param(which, kMean) + c),
                         inv = load(param(which, kInvStd) + c);
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
  // dst = d(bn input) of n pixels from g, in place of g too.
  void through_norm(int which, const NormArgs& norm_args, const A* x, const A* g, A* dst,
                    int64_t n) const {
    const A* const scale = param(which, kScale);
    if (!norm_args.batch_stats) {
      for_numbers(n, [&](int64_t i, int64_t c, auto lanes) {
        lanes.store(dst + i, lanes.load(g + i) * load(scale + c));
      });
      return;
    }
    const A* const mean = param(which, kMean);
    const A* const inv = param(which, kInvStd);
    const A* const mean_g = param(which, kMeanG);
    const A* const mean_gx = param(which, kMeanGx);
    for_numbers(n, [&](int64_t i, int64_t c, auto lanes) {
      const Vec<A> xhat = (lanes.load(x + i) - load(mean + c)) * load(inv + c);
      lanes.store(dst + i, (lanes.load(g + i) - load(mean_g + c) - xhat * load(mean_gx + c)) *
                               load(scale + c));
    });
  }

  const A* grad_at(int64_t n, int64_t row, int64_t channel) const {
    return static_cast<const A*>(args.grad_out) + (n * H + row) * W * oup + channel;
  }

  void sums2(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, 2 * m, 0.0);
    for_chunks(item, [&](const Chunk& c) {
      make_y(c, R);
      convolve(c, y, R, weight, v, 0, false);
      through_activation(2, p.act2, v, grad_at(c.n, c.r0, m), oup, nullptr,
                         c.images * (c.r1 - c.r0) * W, of);
    });
  }

  // dw2's sums, and g of bn1 with its sums.
  void grads(int64_t item) const {
    double* const of = partial(item);
    std::fill_n(of, (2 + taps) * m, 0.0);
    std::fill_n(sums, taps * ld_sums, A(0));
    int64_t rows_since = 0;
    for_chunks(item, [&](const Chunk& c) {
      // dv of the rows that dy needs, from v in the same place.
      const int64_t halo = args.g1 ? R : 0, t0 = above(c, halo), t1 = below(c, halo),
                    y0 = above(c, halo + R), y1 = below(c, halo + R),
                    pixels = c.images * (t1 - t0) * W, rows = c.r1 - c.r0;
      make_y(c, halo + R);
      convolve(c, y, halo + R, weight, v, halo, false);
      through_activation(2, p.act2, v, grad_at(c.n, t0, m), oup, dy, pixels, nullptr);
      through_norm(2, args.norm2, v, dy, v, pixels);
      for (int64_t j = 0; args.dw2 && j < c.images; ++j)
        weight_grad(y + j * (y1 - y0) * F, y0, y1, v + j * (t1 - t0) * F, t0, c.r0, c.r1);
      rows_since += c.images * rows;
      if (rows_since >= kPiece) {
        flush_taps(of);
        rows_since = 0;
      }
      if (!args.g1) return;
      const A* grad = grad_at(c.n, c.r0, 0);
      for (int64_t i = 0; i < c.images * rows * W; ++i, grad += oup)
        for_vectors_of<A>(m, [&](int64_t ch, auto lanes) {
          lanes.store(dy + i * m + ch, lanes.load(grad + ch));
        });
      convolve(c, v, halo, flipped, dy, 0, true);
      const int64_t at = (c.n * H + c.r0) * F;
      through_activation(1, p.act1, static_cast<const A*>(args.u) + at, dy, m,
                         static_cast<A*>(args.g1) + at, c.images * rows * W, of);
    });
    flush_taps(of);
  }
  void weight_grad(const A* in, int64_t in0, int64_t in1, const A* dv, int64_t dv0, int64_t r0,
                   int64_t r1) const {
    switch (d) {
#define GHOST_TAPS(D)                                                                \
  case D:                                                                            \
    lane_weight_grad_rows<A, D>(in, in0, in1, dv, dv0, r0, r1, F, m, sums, ld_sums); \
    break;
      GHOST_TAPS(1)
      GHOST_TAPS(3)
      GHOST_TAPS(5)
      GHOST_TAPS(7)
#undef GHOST_TAPS
    }
  }
  // Moves dw2's sums to double: of [2 .. 2 + taps)[m].
  void flush_taps(double* of) const {
    for (int64_t t = 0; t < taps; ++t) {
      A* const s = sums + t * ld_sums;
      double* const to = of + (2 + t) * m;
      for (int64_t w = 0; w < W; ++w)
        for (int64_t c = 0; c < m; ++c) to[c] += double(s[w * m + c]);
      std::fill_n(s, F, A(0));
    }
  }

  void merge_sums(const NormGrads& out, double* totals) const {
    std::fill_n(totals, 2 * m, 0.0);
    for (int64_t item = 0; item < items.count; ++item)
      for (int64_t i = 0; i < 2 * m; ++i) totals[i] += partial(item)[i];
    for (int64_t c = 0; c < m; ++c) {
      put(out.dbeta, c, totals[c]);
      put(out.dgamma, c, totals[m + c]);
    }
  }
  void merge_taps() const {
    for (int64_t c = 0; args.dw2 && c < m; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        double sum = 0;
        for (int64_t item = 0; item < items.count; ++item) sum += partial(item)[(2 + t) * m + c];
        put(args.dw2, c * taps + t, sum);
      }
  }

  // du, in place of g1.
  void input_grad(int64_t item) const {
    const int64_t first = item * items.images, end = std::min(N, first + items.images);
    for (int64_t q = first * P; q < end * P; q += kPiece) {
      A* const g = static_cast<A*>(args.g1) + q * m;
      through_norm(1, args.norm1, static_cast<const A*>(args.u) + q * m, g, g,
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
