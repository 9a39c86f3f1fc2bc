// Training, channel by channel. A channel's planes of all images pass through L2 together, so u is
// read from memory once and nothing but results goes back:
//
//   forward   statistics of u -> y = act1(bn1(u)) -> v = w2 (*) y and its statistics ->
//             z = act2(bn2(v))
//   backward  y, v again -> dz -> bn2's sums -> dv -> dw2, dy -> bn1's sums -> du (in place of u)
//
// Given statistics are not computed; backward stops where nothing further is needed.
// Sums run in a fixed order inside a channel and channels never mix: the bits do not depend on the
// number of threads. Tile map: an item is one channel (NCHW) or a vector's width of channels (NHWC,
// so that whole cache lines are written). Binding resource: L2 bandwidth; about ten passes over a
// plane, each two or three vectors per cycle.
#pragma once

#include "cpu/activation.h"
#include "cpu/depthwise.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// Mean and sum of squared deviations of a growing set (Chan et al.), accumulated in double.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double total = count + n, delta = other_mean - mean;
    m2 += other_m2 + delta * delta * count * n / total;
    if (delta - delta == 0) {
      mean += delta * n / total;
    } else {  // an infinite mean stays infinite, as a plain sum would have it
      mean = mean * (count / total) + other_mean * (n / total);
      m2 = NAN;
    }
    count = total;
  }

  // Two passes over pieces that fit L1: exact deviations, one trip to memory. Sums are float32 over
  // kBlock values only: what a mean is off by, a gradient of gamma is off by for every pixel.
  template <class A>
  void add(const A* x, int64_t n) {
    constexpr int64_t kPiece = 2048, kBlock = 256, L = kLanes<A>;
    for (int64_t i = 0; i < n; i += kPiece) {
      const int64_t len = n - i < kPiece ? n - i : kPiece;
      const A* p = x + i;
      double sum = 0;
      for (int64_t k = 0; k < len;) {
        const int64_t end = len - k < kBlock ? len : k + kBlock;
        Vec<A> s0{}, s1{};
        for (; k + 2 * L <= end; k += 2 * L) {
          s0 += load(p + k);
          s1 += load(p + k + L);
        }
        for (; k < end; k += L) s0 += load_n(p + k, end - k);
        k = end;
        sum += double(reduce_add<A>(s0 + s1));
      }
      const double piece_mean = sum / double(len);
      const A center = A(piece_mean);
      const Vec<A> c = set1(center);
      Vec<A> q0{}, q1{};
      int64_t k = 0;
      for (; k + 2 * L <= len; k += 2 * L) {
        const Vec<A> a = load(p + k) - c, b = load(p + k + L) - c;
        q0 += a * a;
        q1 += b * b;
      }
      for (; k + L <= len; k += L) {
        const Vec<A> a = load(p + k) - c;
        q0 += a * a;
      }
      double rest = 0;
      for (; k < len; ++k) rest += double(p[k] - center) * double(p[k] - center);
      merge(double(len), piece_mean, double(reduce_add<A>(q0 + q1)) + rest);
    }
  }
  double variance() const { return count > 0 ? m2 / count : 0; }
};

// y = act(u * scale + shift) and what backward needs of it.
template <class A>
struct Affine {
  A mean, inv_std, scale, shift;

  Affine(const NormArgs& n, int64_t c, double mean_, double var) {
    const double gamma = n.gamma ? double(static_cast<const A*>(n.gamma)[c]) : 1.0;
    const double beta = n.beta ? double(static_cast<const A*>(n.beta)[c]) : 0.0;
    const double inv = 1.0 / std::sqrt(var + n.eps);
    mean = A(mean_);
    inv_std = A(inv);
    scale = A(gamma * inv);
    shift = A(beta - mean_ * gamma * inv);
  }
  Affine(const NormArgs& n, int64_t c)
      : Affine(n, c, double(static_cast<const A*>(n.mean)[c]),
               double(static_cast<const A*>(n.var)[c])) {}
};

template <class F>
GHOST_INLINE void for_vectors(int64_t n, int lanes, F&& f) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, std::true_type{});
  if (i < n) f(i, std::false_type{});
}

template <class A>
GHOST_INLINE Vec<A> load_part(const A* p, int64_t i, int64_t n, std::true_type) {
  (void)n;
  return load(p + i);
}
template <class A>
GHOST_INLINE Vec<A> load_part(const A* p, int64_t i, int64_t n, std::false_type) {
  return load_n(p + i, n - i);
}
template <class A>
GHOST_INLINE void store_part(A* p, int64_t i, int64_t n, Vec<A> v, std::true_type) {
  (void)n;
  store(p + i, v);
}
template <class A>
GHOST_INLINE void store_part(A* p, int64_t i, int64_t n, Vec<A> v, std::false_type) {
  store_n(p + i, v, n - i);
}

// dst = act(f(src) + add), add null for none.
template <class A>
void affine_activate(const Activation& a, const Affine<A>& f, const A* src, A* dst, int64_t n,
                     const A* add = nullptr) {
  const Vec<A> scale = set1(f.scale), shift = set1(f.shift);
  with_activation(a.act, [&](auto act) {
    for_vectors(n, kLanes<A>, [&](int64_t i, auto full) {
      Vec<A> v = load_part(src, i, n, full) * scale + shift;
      if (add) v += load_part(add, i, n, full);
      store_part(dst, i, n, activate<decltype(act)::value, A>(v, A(a.slope)), full);
    });
  });
}

// A sum over many pixels is taken in the compute type over this many, and of those sums in double:
// a gradient that is not zero in the mean would else lose digits with every pixel.
inline constexpr int64_t kSumPixels = 512;
inline constexpr int64_t kTapSumPixels = 8192;  // more, for d*d sums at once

// Asks for the cache lines of n values, to be written soon.
template <class A>
GHOST_INLINE void fetch_to_write(const A* p, int64_t n) {
  constexpr int64_t kLine = 64 / int64_t(sizeof(A));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i, 1, 2);
}

// Sums of a batch norm's gradient: of g = dL/d(bn output) and of g * normalised input; and that of
// a PReLU's slope behind it, of dL/d(PReLU's output) * min(bn output, 0).
struct GradSums {
  double g = 0, gx = 0, slope = 0;
};

// g = grad * act'(pre) with pre = scale * x + shift + add (null: 0); stored to `dst`, summed
// into `sums`. A PReLU has its channel's slope in `a`. `images` runs of n values: those of x
// and dst follow each other, those of grad are grad_step apart.
template <class A>
void activation_backward(const Activation& a, const Affine<A>& f, const A* x, const A* grad, A* dst,
                         int64_t n, GradSums& sums, const A* add = nullptr, int64_t images = 1,
                         int64_t grad_step = 0) {
  const Vec<A> scale = set1(f.scale), shift = set1(f.shift), mean = set1(f.mean),
               inv = set1(f.inv_std);
  const auto pass = [&](auto act, auto slope) {
    const int64_t some = n < kSumPixels ? kSumPixels / (n > 0 ? n : 1) : 1;
    for (int64_t j = 0; j < images; j += some) {
      for (int64_t begin = 0; begin < n; begin += kSumPixels) {
        const int64_t end = n - begin < kSumPixels ? n : begin + kSumPixels;
        Vec<A> s{}, sx{}, sp{};
        for (int64_t k = j; k < j + some && k < images; ++k) {
          const A* const xk = x + k * n;
          const A* const grad_k = grad + k * grad_step;
          A* const dst_k = dst + k * n;
          for_vectors(end - begin, kLanes<A>, [&](int64_t at, auto full) {
            const int64_t i = begin + at;
            const Vec<A> xv = load_part(xk, i, end, full), gv = load_part(grad_k, i, end, full);
            Vec<A> pre = xv * scale + shift;
            if (add) pre += load_part(add, i, end, full);
            const Vec<A> g = activate_grad<decltype(act)::value, A>(pre, gv, A(a.slope));
            store_part(dst_k, i, end, g, full);
            s += g;
            // Lanes past the end read x = 0 and grad = 0, so they add nothing to any sum.
            sx += g * ((xv - mean) * inv);
            if constexpr (decltype(slope)::value) sp += pre > A(0) ? Vec<A>{} : gv * pre;
          });
        }
        sums.g += double(reduce_add<A>(s));
        sums.gx += double(reduce_add<A>(sx));
        if constexpr (decltype(slope)::value) sums.slope += double(reduce_add<A>(sp));
      }
    }
  };
  if (a.act == Act::kPReLU)
    pass(std::integral_constant<Act, Act::kLeakyReLU>{}, std::true_type{});
  else
    with_activation(a.act, [&](auto act) { pass(act, std::false_type{}); });
}

// d(bn input) from g = d(bn output):  scale * (g - mean(g) - xhat * mean(g * xhat)), the means
// being sums / count; or scale * g for constant statistics.
template <class A>
void norm_backward(const Affine<A>& f, const GradSums& sums, double count, bool batch_stats,
                   const A* x, const A* g, A* dst, int64_t n) {
  const Vec<A> k1 = set1(f.scale);
  if (!batch_stats) {
    for_vectors(n, kLanes<A>, [&](int64_t i, auto full) {
      store_part(dst, i, n, load_part(g, i, n, full) * k1, full);
    });
    return;
  }
  const Vec<A> mean_g = set1(A(sums.g / count)), mean_gx = set1(A(sums.gx / count));
  const Vec<A> mean = set1(f.mean), inv = set1(f.inv_std);
  for_vectors(n, kLanes<A>, [&](int64_t i, auto full) {
    const Vec<A> xhat = (load_part(x, i, n, full) - mean) * inv;
    store_part(dst, i, n, (load_part(g, i, n, full) - mean_g - xhat * mean_gx) * k1, full);
  });
}

// dw[a][b] += sum_{h,w} dv[h][w] * y[h + a - d/2][w + b - d/2]: the stencil's gradient by its taps,
// d*d sums in registers, over the planes [N][H][W] of one channel.
template <class A, int D>
__attribute__((noinline)) void stencil_weight_grad(const A* y_all, const A* dv_all, int64_t N,
                                                   int64_t H, int64_t W, double* dw) {
  constexpr int L = kLanes<A>, R = D / 2;
  Vec<A> acc[D][D] = {};
  for (int64_t col = 0; col < W; col += L) {
    MaskT<A> mask[D];
#pragma GCC unroll 7
    for (int b = 0; b < D; ++b) mask[b] = lane_range<A>(R - b - col, W + R - b - col);
    const MaskT<A> inside = lane_range<A>(0, W - col);
    for (int64_t n = 0; n < N; ++n) {
      const A* y = y_all + n * H * W + col - R;
      const A* dv = dv_all + n * H * W + col;
      // Row r of y meets row r + R - a of dv under tap row a: those D rows slide along in
      // registers.
      Vec<A> g[D];
#pragma GCC unroll 7
      for (int a = 0; a < D; ++a) g[a] = Vec<A>{};
      for (int64_t h = 0; h < R; ++h) {
#pragma GCC unroll 7
        for (int a = D - 1; a > 0; --a) g[a] = g[a - 1];
        g[0] = h < H ? load_masked(dv + h * W, inside) : Vec<A>{};
      }
      for (int64_t r = 0; r < H; ++r) {
#pragma GCC unroll 7
        for (int a = D - 1; a > 0; --a) g[a] = g[a - 1];
        g[0] = r + R < H ? load_masked(dv + (r + R) * W, inside) : Vec<A>{};
#pragma GCC unroll 7
        for (int b = 0; b < D; ++b) {
          const Vec<A> yv = load_masked(y + r * W + b, mask[b]);
#pragma GCC unroll 7
          for (int a = 0; a < D; ++a) acc[a][b] += g[a] * yv;
        }
      }
    }
  }
#pragma GCC unroll 7
  for (int a = 0; a < D; ++a)
#pragma GCC unroll 7
    for (int b = 0; b < D; ++b) dw[a * D + b] += double(reduce_add<A>(acc[a][b]));
}
// As many images at a time as have kTapSumPixels pixels, at least one.
template <class A>
void stencil_weight_grad(int64_t d, const A* y, const A* dv, int64_t N, int64_t H, int64_t W,
                         double* dw) {
  const int64_t P = H * W, most = P < kTapSumPixels ? kTapSumPixels / (P > 0 ? P : 1) : 1;
  for (int64_t n = 0; n < N; n += most, y += most * P, dv += most * P) {
    const int64_t images = N - n < most ? N - n : most;
    switch (d) {
      case 1:
        stencil_weight_grad<A, 1>(y, dv, images, H, W, dw);
        break;
      case 3:
        stencil_weight_grad<A, 3>(y, dv, images, H, W, dw);
        break;
      case 5:
        stencil_weight_grad<A, 5>(y, dv, images, H, W, dw);
        break;
      case 7:
        stencil_weight_grad<A, 7>(y, dv, images, H, W, dw);
        break;
    }
  }
}

template <class T>
class ChannelPass {
  using A = ComputeOf<T>;
  const ChannelArgs& args;
  const Problem& p;
  const int64_t N, H, W, P, m, oup, per, d, block, row;
  const bool nhwc;
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
        oup(p.out_channels),
        per(p.ratio - 1),
        d(p.dw_size),
        block(channel_block(p)),
        row(N * P),
        nhwc(p.layout == Layout::kNHWC),
        u(static_cast<A*>(a.u)),
        w2(static_cast<const A*>(a.w2)) {}

  void forward(int64_t item) const {
    if constexpr (std::is_same_v<T, A>) {
      if (planes() && args.out && !args.u_is_y) return forward_planes(item);
    }
    const int64_t c0 = item * block, c1 = c0 + block < m ? c0 + block : m,
                  ld = round_up(row, 16) + 16;
    // A row of y a channel, then its ghosts' rows; a single row of v is enough where nothing is
    // written.
    const int64_t count = c1 - c0, v_rows = args.out ? count * per : 1;
    A* const y_all = static_cast<A*>(thread_scratch(
                         size_t((count + (v_rows > 0 ? v_rows : 1)) * ld + 128) * sizeof(A))) +
                     64;
    A* const v_all = y_all + count * ld;
    for (int64_t c = c0; c < c1; ++c) {
      const A* const uc = u + c * args.u_step;
      A* y = y_all + (c - c0) * ld;
      if (args.u_is_y)
        y = u + c * args.u_step;
      else
        affine_activate(act(p.act1, args.norm1, c),
                        normalised(args.norm1, c, uc, args.mean1, args.var1), uc, y, row);
      for (int64_t j = 0; j < per; ++j) {
        const int64_t g = c * per + j;
        const bool written = args.out && m + g < oup;
        if (args.norm2.mean && !written) continue;  // no statistics, no output
        A* const v = v_all + (args.out ? ((c - c0) * per + j) * ld : 0);
        convolve(y, w2 + g * d * d, v, false);
        const Affine<A> f = normalised(args.norm2, g, v, args.mean2, args.var2);
        if (written) affine_activate(act(p.act2, args.norm2, g), f, v, v, row);
      }
    }
    if (!args.out) return;
    write(y_all, ld, c0, count);
    write(v_all, ld, m + c0 * per, count * per);
  }

  void backward(int64_t item) const {
    if constexpr (std::is_same_v<T, A>) {
      if (planes()) return backward_planes(item);
    }
    const int64_t c0 = item * block, c1 = c0 + block < m ? c0 + block : m,
                  ld = round_up(row, 16) + 16, count = c1 - c0;
    A* const scratch =
        static_cast<A*>(thread_scratch(size_t((3 + count * (1 + per)) * ld + 128) * sizeof(A))) +
        64;
    A* const y = scratch;
    A* const v = y + ld;
    A* const t = v + ld;
    A* const grads = t + ld;  // dy of the block's channels, then dz
    A* const dz_all = grads + count * ld;
    const NormGrads &out1 = args.grads1, &out2 = args.grads2;
    const bool need_dy = args.need_du || wanted(out1), need_dv = need_dy || args.dw2,
               need_dz = need_dv || wanted(out2);
    if (need_dy) read_grad(c0, count, grads, ld);
    if (need_dz) read_grad(m + c0 * per, count * per, dz_all, ld);
    for (int64_t c = c0; c < c1; ++c) {
      const Affine<A> f1(args.norm1, c);
      const Activation act1 = act(p.act1, args.norm1, c);
      A* const uc = u + c * args.u_step;
      A* const dy = grads + (c - c0) * ld;
      if (need_dz && per > 0) affine_activate(act1, f1, uc, y, row);
      for (int64_t j = 0; need_dz && j < per; ++j) {
        const int64_t g = c * per + j;
        double dw[49] = {};
        GradSums sums;
        if (m + g < oup) {  // a ghost cut off by the slice has no gradient
          const Affine<A> f2(args.norm2, g);
          convolve(y, w2 + g * d * d, v, false);
          activation_backward(act(p.act2, args.norm2, g), f2, v, dz_all + ((c - c0) * per + j) * ld,
                              t, row, sums);
          if (need_dv) input_grad(f2, args.norm2, g, m * per, sums, v, t, t);
          if (args.dw2) stencil_weight_grad(d, y, t, N, H, W, dw);
          if (need_dy) {
            A flipped[49];
            for (int64_t i = 0; i < d * d; ++i) flipped[i] = w2[g * d * d + d * d - 1 - i];
            convolve(t, flipped, dy, true);
          }
        }
        for (int64_t i = 0; i < d * d; ++i) put(args.dw2, g * d * d + i, dw[i]);
        put(out2, g, sums);
      }
      if (!need_dy) continue;
      GradSums sums;
      activation_backward(act1, f1, uc, dy, dy, row, sums);
      put(out1, c, sums);
      if (args.need_du) input_grad(f1, args.norm1, c, m, sums, uc, dy, uc);
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
  // Where out and grad_out are planes of the compute type, of more than a few vectors, the passes
  // read and write them in place.
  bool planes() const { return !nhwc && P >= kLeastPlane; }
  static constexpr int64_t kLeastPlane = 128;
  // Of out, planes up to this size are fetched one ahead: the hardware follows longer ones.
  static constexpr int64_t kFetched = 1024;

  // One channel, y and z straight into their planes of out.
  void forward_planes(int64_t c) const {
    // Images whose planes stay in L1 between the passes over them.
    const int64_t step = oup * P, images = P < 1024 ? 1024 / P : 1;
    A* const out = static_cast<A*>(args.out);
    A* const v_scratch = static_cast<A*>(thread_scratch(size_t(images * P + 128) * sizeof(A))) + 64;
    const A* const uc = u + c * args.u_step;
    const Activation act1 = act(p.act1, args.norm1, c);
    const Affine<A> f1 = normalised(args.norm1, c, uc, args.mean1, args.var1);
    for (int64_t j = 0; j < per || j == 0; ++j) {
      const int64_t g = c * per + j;
      const bool written = per > 0 && m + g < oup,
                 needed = written || (per > 0 && !args.norm2.mean);
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
        convolve(y, step, w2 + g * d * d, v, v_step, count);
        for (int64_t i = 0; i < count; ++i) {
          if (args.norm2.mean)
            affine_activate(act2, Affine<A>(args.norm2, g), v + i * v_step, v + i * v_step, P);
          else
            moments.add(v + i * v_step, P);
          if (written && m + g + 1 < oup && P <= kFetched) fetch_to_write(v + i * v_step + P, P);
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

  // One channel, grad_out read where it is.
  void backward_planes(int64_t c) const {
    const NormGrads &out1 = args.grads1, &out2 = args.grads2;
    const bool need_dy = args.need_du || wanted(out1), need_dv = need_dy || args.dw2,
               need_dz = need_dv || wanted(out2);
    const int64_t ld = round_up(row, 16) + 16, step = oup * P;
    A* const y = static_cast<A*>(thread_scratch(size_t(4 * ld + 128) * sizeof(A))) + 64;
    A* const v = y + ld;
    A* const t = v + ld;
    A* const dy = t + ld;
    const A* const grad = static_cast<const A*>(args.grad_out);
    const A* const no_addend = nullptr;
    const Affine<A> f1(args.norm1, c);
    const Activation act1 = act(p.act1, args.norm1, c);
    A* const uc = u + c * args.u_step;
    bool summed = false;  // dy holds the gradient of y
    if (need_dz && per > 0) affine_activate(act1, f1, uc, y, row);
    for (int64_t j = 0; need_dz && j < per; ++j) {
      const int64_t g = c * per + j;
      double dw[49] = {};
      GradSums sums;
      if (m + g < oup) {  // a ghost cut off by the slice has no gradient
        const Affine<A> f2(args.norm2, g);
        convolve(y, P, w2 + g * d * d, v, P, N);
        activation_backward(act(p.act2, args.norm2, g), f2, v, grad + (m + g) * P, t, P, sums,
                            no_addend, N, step);
        if (need_dv) input_grad(f2, args.norm2, g, m * per, sums, v, t, t);
        if (args.dw2) stencil_weight_grad(d, y, t, N, H, W, dw);
        if (need_dy) {
          A flipped[49];
          for (int64_t i = 0; i < d * d; ++i) flipped[i] = w2[g * d * d + d * d - 1 - i];
          // The stencil goes over a wide plane in strips of columns: too slow a way to read
          // grad_out.
          const bool strips = W > 4 * kLanes<A>;
          if (strips && !summed) read_grad(c, 1, dy, ld);
          Stencil<A> s{t, 0, H, W, 0, H, flipped, nullptr, dy, false, true, false};
          s.channels = N;
          s.y_step = s.v_step = P;
          s.from = summed || strips ? dy : grad + c * P;
          s.from_step = summed || strips ? P : step;
          stencil<A>(d, s);
          summed = true;
        }
      }
      for (int64_t i = 0; i < d * d; ++i) put(args.dw2, g * d * d + i, dw[i]);
      put(out2, g, sums);
    }
    if (!need_dy) return;
    GradSums sums;
    activation_backward(act1, f1, uc, summed ? dy : grad + c * P, dy, P, sums, no_addend, N,
                        summed ? P : step);
    put(out1, c, sums);
    if (args.need_du) input_grad(f1, args.norm1, c, m, sums, uc, dy, uc);
  }

  // p null: the number is not wanted.
  static void put(void* p, int64_t i, double v) {
    if (p) static_cast<A*>(p)[i] = A(v);
  }
  static void put(const NormGrads& out, int64_t i, const GradSums& sums) {
    put(out.dgamma, i, sums.gx);
    put(out.dbeta, i, sums.g);
    put(out.dslopes, i, sums.slope);
  }
  static bool wanted(const NormGrads& out) { return out.dgamma || out.dbeta || out.dslopes; }

  // The activation with the slope of a channel, if that is a PReLU.
  static Activation act(Activation a, const NormArgs& n, int64_t c) {
    if (n.slopes) a.slope = double(static_cast<const A*>(n.slopes)[c]);
    return a;
  }

  // A norm with its given statistics, or with those of the row x, which are then results.
  Affine<A> normalised(const NormArgs& n, int64_t c, const A* x, void* mean, void* var) const {
    if (n.mean) return Affine<A>(n, c);
    Moments moments;
    moments.add(x, row);
    put(mean, c, moments.mean);
    put(var, c, moments.variance());
    return Affine<A>(n, c, moments.mean, moments.variance());
  }

  // The gradient of a norm's input x from g, that of its output. The norm has `channels` channels.
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

  // out (+)= taps (*) in, image by image of one channel's row.
  void convolve(const A* in, const A* taps, A* out, bool accumulate) const {
    Stencil<A> s{in, 0, H, W, 0, H, taps, nullptr, out, false, accumulate, false};
    s.channels = N;
    s.y_step = s.v_step = P;
    stencil<A>(d, s);
  }
  // out = taps (*) in, of planes in_step and out_step apart.
  void convolve(const A* in, int64_t in_step, const A* taps, A* out, int64_t out_step,
                int64_t images) const {
    Stencil<A> s{in, 0, H, W, 0, H, taps, nullptr, out, false, false, false};
    s.channels = images;
    s.y_step = in_step;
    s.v_step = out_step;
    stencil<A>(d, s);
  }

  // Rows [N * P] of output channels [ch, ch + count) into the output.
  void write(const A* src, int64_t ld, int64_t ch, int64_t count) const {
    if (ch + count > oup) count = oup - ch;
    T* out = static_cast<T*>(args.out);
    for (int64_t n = 0; n < N && count > 0; ++n) {
      if (nhwc)
        write_transposed(src + n * P, ld, out + n * oup * P + ch, oup, P, count);
      else
        for (int64_t c = 0; c < count; ++c)
          write_row(src + c * ld + n * P, out + (n * oup + ch + c) * P, P);
    }
  }

  void read_grad(int64_t ch, int64_t count, A* dst, int64_t ld) const {
    if (ch + count > oup) count = oup - ch;
    const T* g = static_cast<const T*>(args.grad_out);
    for (int64_t n = 0; n < N && count > 0; ++n) {
      if (nhwc)
        read_transposed(g + n * oup * P + ch, oup, dst + n * P, ld, P, count);
      else
        for (int64_t c = 0; c < count; ++c)
          read_row(g + (n * oup + ch + c) * P, dst + c * ld + n * P, P);
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
