// Batch norm of one channel in training: statistics, the affine map with its activation, and their
// gradients. A channel is a row of n pixels in the compute type.
//
//   mean, var = moments of x           xhat = (x - mean) / sqrt(var + eps)
//   y = act(scale * x + shift)         scale = gamma / sqrt(var + eps), shift = beta - mean * scale
//
// Tile map: one thread takes a whole row, a vector of pixels at a time. Sums run in a fixed order.
// Binding resource: L2 bandwidth.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

// Mean and sum of squared deviations of a growing set of values (Chan, Golub and LeVeque), in
// double.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void merge(double n, double other_mean, double other_m2) {
    if (n == 0) return;
    const double total = count + n, delta = other_mean - mean;
    m2 += other_m2 + delta * delta * count * n / total;
    if (delta - delta == 0) {
      mean += delta * n / total;
    } else {  // an infinite mean stays infinite, as in a plain sum
      mean = mean * (count / total) + other_mean * (n / total);
      m2 = NAN;
    }
    count = total;
  }

  // x [n]. Two passes over each piece of kPiece values, which fits into L1: the deviations are
  // those from the piece's mean, and memory is read once. A float32 sum spans kBlock values only:
  // every pixel adds the error of a mean to the gradient of gamma.
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

// A batch norm of one channel as an affine map, y = scale * u + shift, and the statistics that its
// gradient needs.
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

// Calls f(i, full) for vectors of `lanes` values from i on; full: std::true_type, or
// std::false_type for a last partial vector.
template <class F>
GHOST_INLINE void for_vectors(int64_t n, int lanes, F&& f) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) f(i, std::true_type{});
  if (i < n) f(i, std::false_type{});
}

template <class A, class Full>
GHOST_INLINE Vec<A> load_part(const A* p, int64_t i, int64_t n, Full) {
  return Full::value ? load(p + i) : load_n(p + i, n - i);
}
template <class A, class Full>
GHOST_INLINE void store_part(A* p, int64_t i, int64_t n, Vec<A> v, Full) {
  Full::value ? store(p + i, v) : store_n(p + i, v, n - i);
}

// dst = act(scale * src + shift + add) with the scale and shift of f; src, dst, add [n]; add may be
// null.
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

// Pixels that one sum in the compute type spans; sums of these are added in double. A longer sum of
// a gradient whose mean is not zero loses digits with every pixel.
inline constexpr int64_t kSumPixels = 512;

// Sums over the pixels of one channel:
//   g      of g = dL/d(output of the norm), the gradient of beta
//   gx     of g * xhat, xhat the normalised input: the gradient of gamma
//   slope  of dL/d(output of the PReLU) * min(output of the norm, 0): the gradient of its slope
struct GradSums {
  double g = 0, gx = 0, slope = 0;
};

//   dst = grad * act'(scale * x + shift + add)
// and its sums into `sums`. x, dst [images][n]; grad [images][n], grad_step elements from image to
// image; add [n], of a single image, or null. `a` holds the channel's slope of a PReLU.
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

// The gradient of a norm's input from g, the gradient of its output:
//   dst = scale * (g - mean(g) - xhat * mean(g * xhat))     statistics of the batch
//   dst = scale * g                                         constant statistics
// The means are sums / count. x, g, dst [n]; dst may be g or x.
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

}  // namespace GHOST_ISA
}  // namespace ghost
