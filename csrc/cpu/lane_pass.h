// The base of the passes of training in NHWC with channels along the lanes: lane_train.h has a norm
// behind each half of the module, tail_lanes.h one behind the concatenation. It holds the scratch
// memory, the vectors of channels, the parameters of a norm, the depthwise stencils, and the sums
// of items:
//
//   mean, var = moments of x over all pixels
//   sum[c]    = sum over items of partial[item][c]       in double, in the order of the items
//
// N images, m intrinsic channels, P = H * W pixels of an image, d the size of the depthwise kernel.
//
// Tile map: an item is a fixed number of images, whatever the number of threads, with its own
// partial sums. Binding resource: L2 bandwidth.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cpu/batch_norm.h"
#include "cpu/lane_stencil.h"
#include "cpu/lanes.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// One vector of channels of a pixel. kFull = false: the last, partial vector, of `count` channels.
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
  // Loads from and stores to a map of ld channels; only PixelPairs uses ld.
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

// The last few channels of a pixel, stored without a mask: masked stores are slow on some AVX2
// processors.
template <class A>
struct LastLanes {
  int64_t count;
  MaskT<A> mask;
  GHOST_INLINE Vec<A> load(const A* p) const { return load_masked(p, mask); }
  GHOST_INLINE void store(A* p, Vec<A> v) const { store_first(p, v, count); }
};

// Two pixels in a vector, if all channels fill half a vector: a masked store of half a vector would
// delay the loads of the next pixel.
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

// Calls f(c, lanes) for the vectors of a pixel's channels, the last ones as `Last`.
template <class A, class Last = Lanes<A, false>, class F>
GHOST_INLINE void for_channels(int64_t channels, F&& f) {
  constexpr int64_t L = kLanes<A>;
  int64_t c = 0;
  for (; c + L <= channels; c += L) f(c, Lanes<A, true>{L, {}});
  if (c < channels) f(c, Last{channels - c, lane_range<A>(0, channels - c)});
}
// for_channels for an f that goes through `pixels` pixels, lanes.kPixels at a time.
template <class T, class F>
GHOST_INLINE void for_lanes(int64_t channels, int64_t pixels, F&& f) {
  using A = ComputeOf<T>;
  if constexpr (std::is_same_v<T, A>) {
    if (2 * channels == kLanes<A> && pixels % 2 == 0) return f(int64_t(0), PixelPairs<A>{});
  }
  for_channels<A>(channels, f);
}

// Sums over the pixels x [pixels][channels] of a vector of channels: of x - from, or of its square.
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

// The parameters of a norm: each [channels + L], in which the first channels follow the last again.
template <class A>
struct LaneNorm {
  A *scale, *shift, *mean, *inv_std;
  A *mean_g, *mean_gx;  // the means that its gradient subtracts; 0 for constant statistics
  int64_t channels, size;

  static int64_t elements(int64_t channels) { return 6 * (channels + kLanes<A>); }
  LaneNorm() = default;
  LaneNorm(A* memory, int64_t channels_) : channels(channels_), size(channels_ + kLanes<A>) {
    for (A** const part : {&scale, &shift, &mean, &inv_std, &mean_g, &mean_gx}) {
      *part = memory;
      memory += size;
    }
  }
  void set(const NormArgs& n) const {
    for (int64_t i = 0; i < size; ++i) {
      const Affine<A> f(n, i % channels);
      scale[i] = f.scale;
      shift[i] = f.shift;
      mean[i] = f.mean;
      inv_std[i] = f.inv_std;
      mean_g[i] = mean_gx[i] = A(0);
    }
  }
  // g(c), gx(c): the means of channel c.
  template <class G, class Gx>
  void set_means(G&& g, Gx&& gx) const {
    for (int64_t i = 0; i < size; ++i) {
      mean_g[i] = g(i % channels);
      mean_gx[i] = gx(i % channels);
    }
  }
};

template <class A>
class LanePass {
 protected:
  static constexpr int L = kLanes<A>;
  const Problem& p;
  const int64_t N, H, W, P, m, out_channels, d, taps;
  const int64_t q, F;  // channels of a depthwise map; numbers in a row of such a map
  const int64_t items;
  double* const partials;  // [items][partial_size]
  const int64_t partial_size;
  const int64_t ld_taps, ld_sums;
  A *weight, *flipped;  // [taps][ld_taps]
  A* sums;              // [taps][ld_sums], of dw2

  LanePass(const Problem& problem, int64_t depthwise_channels, int64_t items_, double* partials_,
           int64_t partial_size_)
      : p(problem),
        N(p.batch),
        H(p.height),
        W(p.width),
        P(H * W),
        m(p.intrinsic),
        out_channels(p.out_channels),
        d(p.dw_size),
        taps(d * d),
        q(depthwise_channels),
        F(W * q),
        items(items_),
        partials(partials_),
        partial_size(partial_size_),
        ld_taps(q + L),
        ld_sums(F + L) {}

  struct Array {
    A** at;
    int64_t elements;
  };
  // Places the arrays in the thread's scratch memory and copies the taps of w2 [q, d * d], or null,
  // to weight and flipped.
  void allocate(std::initializer_list<Array> arrays, const void* w2) {
    const Array of_taps[] = {
        {&weight, taps * ld_taps}, {&flipped, taps * ld_taps}, {&sums, taps * ld_sums}};
    // Vectors may reach before the first element of an array and past its last one.
    constexpr int64_t kGap = 16;
    int64_t total = 4 * kGap;
    for (const Array& a : of_taps) total += round_up(a.elements, 16) + kGap;
    for (const Array& a : arrays) total += round_up(a.elements, 16) + kGap;
    A* next = static_cast<A*>(thread_scratch(size_t(total) * sizeof(A))) + 2 * kGap;
    const auto place = [&](const Array& a) {
      *a.at = next;
      next += round_up(a.elements, 16) + kGap;
    };
    for (const Array& a : of_taps) place(a);
    for (const Array& a : arrays) place(a);
    if (w2 == nullptr || q == 0) return;
    const A* const from = static_cast<const A*>(w2);
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t i = 0, c = 0; i < ld_taps; ++i, c = c + 1 < q ? c + 1 : 0)
        weight[t * ld_taps + i] = flipped[(taps - 1 - t) * ld_taps + i] = from[c * taps + t];
  }

  // p null: the result is not needed.
  static void put(void* p, int64_t i, double x) {
    if (p) static_cast<A*>(p)[i] = A(x);
  }

  // out (+)= w (*) in, image by image; w: weight or flipped.
  template <bool kTapRows>
  void convolve(const LaneRows<const A>& in, const A* w, const LaneRows<A>& out, int64_t images,
                bool accumulate) const {
    with_constant<1, 3, 5, 7>(d, [&](auto size) {
      for (int64_t n = 0; n < images; ++n)
        lane_stencil<A, decltype(size)::value, kTapRows>(in.image(n, F), w, ld_taps,
                                                         out.image(n, F), F, q, accumulate);
    });
  }
  // Adds to `sums`, over rows [r0, r1) of the images.
  void add_tap_sums(const LaneRows<const A>& in, const LaneRows<const A>& dv, int64_t r0,
                    int64_t r1, int64_t images) const {
    with_constant<1, 3, 5, 7>(d, [&](auto size) {
      lane_weight_grad<A, decltype(size)::value>(in, dv, r0, r1, images, F, q, sums, ld_sums);
    });
  }

  double* partial(int64_t item) const { return partials + item * partial_size; }
  // The sum of all items at one place of their sums.
  double sum_of_items(int64_t at) const {
    double sum = 0;
    for (int64_t item = 0; item < items; ++item) sum += partial(item)[at];
    return sum;
  }

  // Merges the moments of x [pixels][channels], `piece` pixels at a time, into mean and m2
  // [channels], which hold those of the `before` earlier pixels of the item.
  void add_moments(const A* x, int64_t pixels, int64_t channels, int64_t piece, int64_t before,
                   double* mean, double* m2) const {
    for (int64_t i = 0; i < pixels; i += piece) {
      const int64_t n = std::min(piece, pixels - i);
      for_channels<A>(channels, [&](int64_t c, auto lanes) {
        const A* const from = x + i * channels + c;
        const Vec<A> center = sum_pixels<A, false>(from, n, channels, Vec<A>{}, lanes) / set1(A(n));
        A means[L], squares[L];
        store(means, center);
        store(squares, sum_pixels<A, true>(from, n, channels, center, lanes));
        for (int64_t l = 0; l < std::min<int64_t>(lanes.count, L); ++l) {
          Moments all{double(before + i), mean[c + l], m2[c + l]};
          all.merge(double(n), double(means[l]), double(squares[l]));
          mean[c + l] = all.mean;
          m2[c + l] = all.m2;
        }
      });
    }
  }
  // The batch statistics from the items' sums, [2][channels]; images(item): those of an item.
  template <class Images>
  void merge_moments(int64_t channels, Images&& images, void* mean, void* var) const {
    for (int64_t c = 0; c < channels; ++c) {
      Moments all;
      for (int64_t item = 0; item < items; ++item) {
        const double* const of = partial(item);
        all.merge(double(images(item) * P), of[c], of[channels + c]);
      }
      put(mean, c, all.mean);
      put(var, c, all.variance());
    }
  }

  // Moves `sums` to the item's sums of dw2, [taps][q].
  void flush_tap_sums(double* of) const {
    for (int64_t t = 0; t < taps; ++t) {
      A* const s = sums + t * ld_sums;
      for (int64_t w = 0; w < W; ++w)
        for (int64_t c = 0; c < q; ++c) of[t * q + c] += double(s[w * q + c]);
      std::fill_n(s, F, A(0));
    }
  }
  // dw2 [ghosts, taps] from the items' sums at `at`; the slice cuts off ghosts from q on.
  void merge_tap_sums(int64_t at, int64_t ghosts, void* dw2) const {
    for (int64_t g = 0; g < ghosts; ++g)
      for (int64_t t = 0; t < taps; ++t)
        put(dw2, g * taps + t, g < q ? sum_of_items(at + t * q + g) : 0.0);
  }
};

}  // namespace GHOST_ISA
}  // namespace ghost
