// The passes of tail.h in NHWC, with channels along the lanes.
//
// A row of a depthwise map of q channels is W * q neighbouring numbers, in which a step of one
// pixel is a step of q: the stencil slides down the rows of one vector of them, whose lanes belong
// to several pixels where q is less than a vector. Its taps repeat every q lanes. The ghosts kept
// by the slice are such a map, v [P][kept]; their inputs are y itself, or copies of its channels
// where ghosts_per_map is not 1 or the slice cuts some off.
//
// Forward and backward are two passes over the images with the sums of all in between. Tile map: an
// item is a fixed number of images, whatever the number of threads, and goes through them by groups
// whose maps stay in L1 or L2; both passes make v again from y. Every item has its own sums, which
// are added up in the order of the items. Binding resource: L1 and L2 bandwidth.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "cpu/channels.h"
#include "cpu/tail_kernels.h"

namespace ghost {
namespace GHOST_ISA {

// out[h][i] (+)= sum_{a,b} taps[a][b][i % q] * in[h + a - D/2][i + (b - D/2) * q]
//   i < F, which is W * q; taps: [D * D][ld], the q of a tap repeated to q + a vector
template <class A, int D>
__attribute__((noinline)) void lane_stencil(const A* in, const A* taps, int64_t ld, A* out,
                                            int64_t H, int64_t F, int64_t q, bool accumulate) {
  constexpr int L = kLanes<A>, R = D / 2;
  constexpr bool kTapsInRegisters = D <= 3;
  using V = Vec<A>;
  for (int64_t i = 0; i < F; i += L) {
    const A* const tap = taps + i % q;
    const MaskT<A> inside = lane_range<A>(0, F - i);
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
    auto finish = [=](int64_t h, V v) __attribute__((always_inline)) {
      A* const o = out + h * F + i;
      store_masked(o, accumulate ? v + load_masked(o, inside) : v, inside);
    };
    V acc[D] = {};  // of rows r - R, ..., r + R
    for (int64_t r = 0; r < H; ++r) {
      V x[D];
#pragma GCC unroll 7
      for (int b = 0; b < D; ++b) x[b] = load_masked(in + r * F + i + (b - R) * q, mask[b]);
#pragma GCC unroll 7
      for (int a = 0; a < D; ++a) {
        V sum{};
#pragma GCC unroll 7
        for (int b = 0; b < D; ++b) {
          const int t = (D - 1 - a) * D + b;
          if constexpr (kTapsInRegisters)
            sum += held[t] * x[b];
          else
            sum += load(tap + t * ld) * x[b];
        }
        acc[a] += sum;
      }
      if (r >= R) finish(r - R, acc[0]);
#pragma GCC unroll 7
      for (int a = 0; a + 1 < D; ++a) acc[a] = acc[a + 1];
      acc[D - 1] = V{};
    }
#pragma GCC unroll 7
    for (int a = 0; a < R; ++a)
      if (H - R + a >= 0) finish(H - R + a, acc[a]);
  }
}

// sums[a][b][i] += sum_{n,h} dv[n][h][i] * in[n][h + a - D/2][i + (b - D/2) * q]
//   sums: [D * D][ld]
template <class A, int D>
__attribute__((noinline)) void lane_weight_grad(const A* in_all, const A* dv_all, int64_t N,
                                                int64_t H, int64_t F, int64_t q, A* sums,
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
    for (int64_t n = 0; n < N; ++n) {
      const A* const in = in_all + n * H * F + i - R * q;
      const A* const dv = dv_all + n * H * F + i;
      // Row r of the input meets row r + R - a of dv under tap row a.
      Vec<A> g[D] = {};
      for (int64_t r = -R; r < H; ++r) {
#pragma GCC unroll 7
        for (int a = D - 1; a > 0; --a) g[a] = g[a - 1];
        g[0] = r + R < H ? load_masked(dv + (r + R) * F, inside) : Vec<A>{};
        if (r < 0) continue;
#pragma GCC unroll 7
        for (int b = 0; b < D; ++b) {
          const Vec<A> x = load_masked(in + r * F + b * q, mask[b]);
#pragma GCC unroll 7
          for (int a = 0; a < D; ++a) acc[a][b] += g[a] * x;
        }
      }
    }
#pragma GCC unroll 7
    for (int a = 0; a < D; ++a)
#pragma GCC unroll 7
      for (int b = 0; b < D; ++b) {
        A* const s = sums + (a * D + b) * ld + i;
        store(s, load(s) + acc[a][b]);
      }
  }
}

// A vector's width of channels of a pixel, or the last few of them.
template <class A, bool kFull>
struct Lanes {
  int64_t count;
  MaskT<A> mask;
  static constexpr int64_t kPixels = 1;

  template <class T>
  GHOST_INLINE Vec<A> load(const T* p) const {
    if constexpr (kFull) return Storage<T>::load(p);
    if constexpr (std::is_same_v<T, A>) return load_masked(p, mask);
    return Storage<T>::load_n(p, count);
  }
  template <class T>
  GHOST_INLINE void store(T* p, Vec<A> v) const {
    if constexpr (kFull)
      Storage<T>::store(p, v);
    else if constexpr (std::is_same_v<T, A>)
      store_masked(p, v, mask);
    else
      Storage<T>::store_n(p, v, count);
  }
  // The same of a map with ld channels.
  template <class T>
  GHOST_INLINE Vec<A> load_map(const T* p, int64_t) const {
    return load(p);
  }
  template <class T>
  GHOST_INLINE void store_map(T* p, int64_t, Vec<A> v) const {
    store(p, v);
  }
  GHOST_INLINE Vec<A> param(const A* p) const { return GHOST_ISA::load(p); }
  int64_t channel(int64_t lane) const { return lane; }
};

// All channels, half a vector of them, of two pixels: a masked store of half a vector would delay
// the loads of its neighbour.
template <class A>
struct PixelPairs {
  static constexpr int64_t kPixels = 2, count = kLanes<A>, kHalf = count / 2;
  const MaskT<A> low = lane_range<A>(0, kHalf), high = lane_range<A>(kHalf, count);

  GHOST_INLINE Vec<A> load(const A* p) const { return GHOST_ISA::load(p); }
  GHOST_INLINE void store(A* p, Vec<A> v) const { GHOST_ISA::store(p, v); }
  GHOST_INLINE Vec<A> load_map(const A* p, int64_t ld) const {
    return load_masked(p, low) + load_masked(p + ld - kHalf, high);
  }
  GHOST_INLINE void store_map(A* p, int64_t ld, Vec<A> v) const {
    store_masked(p, v, low);
    store_masked(p + ld - kHalf, v, high);
  }
  Vec<A> param(const A* p) const {
    A twice[count];
    for (int64_t l = 0; l < count; ++l) twice[l] = p[l % kHalf];
    return GHOST_ISA::load(twice);
  }
  int64_t channel(int64_t lane) const { return lane % kHalf; }
};

// Calls f(c, lanes) for vectors of channels.
template <class A, class F>
GHOST_INLINE void for_channels(int64_t channels, F&& f) {
  constexpr int64_t L = kLanes<A>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) f(c, Lanes<A, true>{L, {}});
  if (c < channels) {
    const int64_t rest = channels - c;
    f(c, Lanes<A, false>{rest, lane_range<A>(0, rest)});
  }
}
// The same, where f goes through `pixels` pixels by kPixels.
template <class T, class F>
GHOST_INLINE void for_lanes(int64_t channels, int64_t pixels, F&& f) {
  using A = ComputeOf<T>;
  if constexpr (std::is_same_v<T, A>) {
    if (2 * channels == kLanes<A> && pixels % 2 == 0) return f(int64_t(0), PixelPairs<A>{});
  }
  for_channels<A>(channels, f);
}

// Sums of a channel's pixels, or of the squares of their distances from `from`.
template <class A, bool kSquared, class Lanes>
GHOST_INLINE Vec<A> sum_pixels(const A* x, int64_t pixels, int64_t channels, Vec<A> from,
                               const Lanes& lanes) {
  Vec<A> s[4] = {};
  auto term = [&](const A* at) __attribute__((always_inline)) {
    const Vec<A> v = lanes.load(at) - from;
    return kSquared ? v * v : v;
  };
  int64_t i = 0;
  for (; i + 4 <= pixels; i += 4)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) s[k] += term(x + (i + k) * channels);
  for (; i < pixels; ++i) s[0] += term(x + i * channels);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

template <class T>
class TailLanes {
  using A = ComputeOf<T>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kPiece = 1024;  // pixels whose sums are float32
  const TailArgs& args;
  const Problem& p;
  const int64_t N, H, W, P, m, oup, per, kept, d, taps;
  const bool copies;  // the inputs of the ghosts are not y as it is
  const TailItems items;
  const int64_t ld_taps, ld_sums;
  A *norm, *weight, *flipped, *sums;  // [6][oup + L], [taps][ld_taps] twice, [taps][ld_sums]
  A *y, *inputs, *v, *dy, *dinputs;   // of a group of images

  A* params(int i) const { return norm + i * (oup + L); }
  A* scale() const { return params(0); }
  A* shift() const { return params(1); }
  A* mean() const { return params(2); }
  A* inv_std() const { return params(3); }

 public:
  explicit TailLanes(const TailArgs& a)
      : args(a),
        p(a.problem),
        N(p.batch),
        H(p.height),
        W(p.width),
        P(H * W),
        m(p.intrinsic),
        oup(p.out_channels),
        per(p.ratio - 1),
        kept(oup - m),
        d(p.dw_size),
        taps(d * d),
        copies(per != 1 || kept != m),
        items(p),
        ld_taps(kept + L),
        ld_sums(W * kept + L) {
    const int64_t pixels = items.group * P, map = pixels * m + 64, ghost_map = pixels * kept + 64;
    const int64_t copy = copies ? ghost_map : 0;
    const int64_t sizes[] = {6 * (oup + L), taps * ld_taps, taps * ld_taps, taps * ld_sums,
                             map,           copy,           ghost_map,      map,
                             copy};
    A** const parts[] = {&norm, &weight, &flipped, &sums, &y, &inputs, &v, &dy, &dinputs};
    int64_t total = 64;
    for (int64_t size : sizes) total += round_up(size, 16);
    A* next = static_cast<A*>(thread_scratch(size_t(total) * sizeof(A)));
    for (size_t i = 0; i < std::size(sizes); ++i) {
      *parts[i] = next;
      next += round_up(sizes[i], 16);
    }
    const A* const w2 = static_cast<const A*>(args.w2);
    for (int64_t t = 0; t < taps && kept > 0; ++t)
      for (int64_t i = 0; i < ld_taps; ++i) {
        weight[t * ld_taps + i] = w2[i % kept * taps + t];
        flipped[(taps - 1 - t) * ld_taps + i] = w2[i % kept * taps + t];
      }
  }

  // Forward's first pass: mean and squared deviations of an item's images.
  void moments(int64_t item) const {
    double* const partial = args.partial + item * 2 * oup;
    std::fill(partial, partial + 2 * oup, 0.0);
    for_parts(item, [&](const Part& part) {
      const int64_t channels = part.channels;
      for (int64_t q = 0; q < part.pixels; q += kPiece) {
        const int64_t pixels = std::min(kPiece, part.pixels - q);
        for_channels<A>(channels, [&](int64_t c, auto lanes) {
          const A* const x = part.src + q * channels + c;
          const Vec<A> mean =
              sum_pixels<A, false>(x, pixels, channels, Vec<A>{}, lanes) / set1(A(pixels));
          const Vec<A> squares = sum_pixels<A, true>(x, pixels, channels, mean, lanes);
          double* const of = partial + part.offset + c;
          for (int64_t l = 0; l < std::min<int64_t>(lanes.count, L); ++l) {
            Moments all{double(part.before + q), of[l], of[oup + l]};
            all.merge(double(pixels), double(mean[l]), double(squares[l]));
            of[l] = all.mean;
            of[oup + l] = all.m2;
          }
        });
      }
    });
  }
  void merge_moments() const {
    for (int64_t c = 0; c < oup; ++c) {
      Moments all;
      for (int64_t item = 0; item < items.count; ++item) {
        const double* const partial = args.partial + item * 2 * oup;
        all.merge(double(items.images(item) * P), partial[c], partial[oup + c]);
      }
      put(args.mean, c, all.mean);
      put(args.var, c, all.variance());
    }
  }

  // Forward's second pass.
  void forward(int64_t item) const {
    set_norm();
    for_parts(item, [&](const Part& part) {
      const int64_t channels = part.channels, end = part.pixels, ld = oup;
      T* const out = static_cast<T*>(args.out) + part.first;
      const T* const residual = at(args.residual, part);
      const A slope = A(p.act2.slope);
      with_activation(p.act2.act, [&](auto act) {
        for_lanes<T>(channels, end, [&](int64_t c, auto lanes) {
          const Vec<A> k = lanes.param(scale() + part.offset + c),
                       s = lanes.param(shift() + part.offset + c);
          for (int64_t i = 0; i < end; i += lanes.kPixels) {
            Vec<A> x = lanes.load(part.src + i * channels + c) * k + s;
            if (residual) x += lanes.load_map(residual + i * ld + c, ld);
            lanes.store_map(out + i * ld + c, ld, activate<decltype(act)::value, A>(x, slope));
          }
        });
      });
    });
  }

  // Backward's first pass: what the batch norm's gradient sums, over an item's images.
  void grad_sums(int64_t item) const {
    set_norm();
    double* const partial = args.partial + item * 2 * oup;
    std::fill(partial, partial + 2 * oup, 0.0);
    for_parts(item, [&](const Part& part) {
      const int64_t channels = part.channels, ld = oup;
      const T *const grad = at(args.grad_out, part), *const residual = at(args.residual, part);
      const A slope = A(p.act2.slope);
      for (int64_t q = 0; q < part.pixels; q += kPiece) {
        const int64_t end = std::min(q + kPiece, part.pixels);
        with_activation(p.act2.act, [&](auto act) {
          for_lanes<T>(channels, end - q, [&](int64_t c, auto lanes) {
            const int64_t o = part.offset + c;
            const Vec<A> k = lanes.param(scale() + o), s = lanes.param(shift() + o),
                         mu = lanes.param(mean() + o), inv = lanes.param(inv_std() + o);
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
              partial[o + lanes.channel(l)] += double(sum[l]);
              partial[oup + o + lanes.channel(l)] += double(sum_x[l]);
            }
          });
        });
      }
    });
  }
  void merge_grad_sums() const {
    for (int64_t c = 0; c < oup; ++c) {
      double g = 0, gx = 0;
      for (int64_t item = 0; item < items.count; ++item) {
        g += args.partial[item * 2 * oup + c];
        gx += args.partial[item * 2 * oup + oup + c];
      }
      put(args.dbeta, c, g);
      put(args.dgamma, c, gx);
    }
  }

  // Backward's second pass: dresidual, dy, and dw2 over an item's images.
  void grads(int64_t item) const {
    set_norm();
    const double count = double(N * P);
    for (int64_t c = 0; c < oup; ++c) {
      params(4)[c] = A(get(args.dbeta, c) / count);
      params(5)[c] = A(get(args.dgamma, c) / count);
    }
    std::fill(sums, sums + taps * ld_sums, A(0));
    for_parts(item, [&](const Part& part) {
      T* const out = args.dy ? static_cast<T*>(args.dy) + part.n * P * m : nullptr;
      A* target = dy;
      if constexpr (std::is_same_v<T, A>) target = out ? out : dy;
      part_du(part, part.offset == 0 ? target : v);
      if (part.offset + part.channels < oup) return;  // the ghosts are the second part
      if (kept > 0) ghosts_backward(part.n, part.images, target);
      if constexpr (!std::is_same_v<T, A>) {
        if (out) write_row(target, out, part.images * P * m);
      }
    });
    double* const partial = args.partial + item * kept * taps;
    std::fill(partial, partial + kept * taps, 0.0);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t i = 0; i < W * kept; ++i)
        partial[i % kept * taps + t] += double(sums[t * ld_sums + i]);
  }
  void merge_grads() const {
    for (int64_t i = 0; i < m * per * taps; ++i) {
      double sum = 0;
      for (int64_t item = 0; item < items.count && i < kept * taps; ++item)
        sum += args.partial[item * kept * taps + i];
      put(args.dw2, i, sum);
    }
  }

 private:
  static void put(void* p, int64_t i, double v) { static_cast<A*>(p)[i] = A(v); }
  static double get(const void* p, int64_t i) { return double(static_cast<const A*>(p)[i]); }

  // y or its ghosts, of a group of images.
  struct Part {
    int64_t n, images, pixels, before;  // first image; pixels of the item before it
    const A* src;                       // [pixels][channels]
    int64_t channels, offset, first;    // channels of u from offset on; where that starts in out
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
      f(Part{n, images, images * P, before, in, m, 0, n * P * oup});
      if (kept == 0) continue;
      stencil_of(ghost_inputs(in, images), weight, v, images, false);
      f(Part{n, images, images * P, before, v, kept, m, n * P * oup + m});
    }
  }

  void set_norm() const {
    std::fill(norm, norm + 6 * (oup + L), A(0));
    for (int64_t c = 0; c < oup; ++c) {
      const Affine<A> f(args.norm, c);
      scale()[c] = f.scale;
      shift()[c] = f.shift;
      mean()[c] = f.mean;
      inv_std()[c] = f.inv_std;
    }
  }

  // y in the compute type, [pixels][m].
  const A* wide_y(int64_t n, int64_t images) const {
    const T* const from = static_cast<const T*>(args.y) + n * P * m;
    if constexpr (std::is_same_v<T, A>) return from;
    read_row(from, y, images * P * m);
    return y;
  }

  // What the ghosts are made of, [pixels][kept].
  const A* ghost_inputs(const A* in, int64_t images) const {
    if (!copies) return in;
    for (int64_t i = 0; i < images * P; ++i)
      for (int64_t q = 0; q < kept; ++q) inputs[i * kept + q] = in[i * m + q / per];
    return inputs;
  }

  void stencil_of(const A* in, const A* w, A* out, int64_t images, bool accumulate) const {
    const int64_t F = W * kept;
    for (int64_t n = 0; n < images; ++n) {
      const A* const x = in + n * H * F;
      A* const o = out + n * H * F;
      switch (d) {
        case 1:
          lane_stencil<A, 1>(x, w, ld_taps, o, H, F, kept, accumulate);
          break;
        case 3:
          lane_stencil<A, 3>(x, w, ld_taps, o, H, F, kept, accumulate);
          break;
        case 5:
          lane_stencil<A, 5>(x, w, ld_taps, o, H, F, kept, accumulate);
          break;
        case 7:
          lane_stencil<A, 7>(x, w, ld_taps, o, H, F, kept, accumulate);
          break;
      }
    }
  }

  // du of a part, which may be in the place of its source; dresidual.
  void part_du(const Part& part, A* du) const {
    const T *const grad = at(args.grad_out, part), *const residual = at(args.residual, part);
    T* const dresidual = const_cast<T*>(at(args.dresidual, part));
    const int64_t channels = part.channels, end = part.pixels, ld = oup;
    const A slope = A(p.act2.slope);
    const bool batch_stats = args.batch_stats;
    with_activation(p.act2.act, [&](auto act) {
      for_lanes<T>(channels, end, [&](int64_t c, auto lanes) {
        const int64_t o = part.offset + c;
        const Vec<A> k = lanes.param(scale() + o), s = lanes.param(shift() + o),
                     mu = lanes.param(mean() + o), inv = lanes.param(inv_std() + o),
                     mean_g = lanes.param(params(4) + o), mean_gx = lanes.param(params(5) + o);
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

  // dw2's sums, and what goes through the ghosts to dy; du of the ghosts is in v.
  void ghosts_backward(int64_t n, int64_t images, A* to) const {
    const int64_t F = W * kept, pixels = images * P;
    const A* const in = copies ? inputs : wide_y(n, images);
    switch (d) {
      case 1:
        lane_weight_grad<A, 1>(in, v, images, H, F, kept, sums, ld_sums);
        break;
      case 3:
        lane_weight_grad<A, 3>(in, v, images, H, F, kept, sums, ld_sums);
        break;
      case 5:
        lane_weight_grad<A, 5>(in, v, images, H, F, kept, sums, ld_sums);
        break;
      case 7:
        lane_weight_grad<A, 7>(in, v, images, H, F, kept, sums, ld_sums);
        break;
    }
    if (!args.dy) return;
    if (!copies) return stencil_of(v, flipped, to, images, true);
    stencil_of(v, flipped, dinputs, images, false);
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t q = 0; q < kept; ++q) to[i * m + q / per] += dinputs[i * kept + q];
  }
};

template <class T>
void tail_lanes(const TailArgs& args, TailStep step, int64_t begin, int64_t end) {
  const TailLanes<T> pass(args);
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
