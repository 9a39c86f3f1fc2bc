// A depthwise convolution with its batch norm folded in, and an activation: one pass over x.
//
//   out[c][h][w] = act(shift[c] + sum_{i,j} weight[c][i][j] * x[c][h * s + i - k/2][w * s + j -
//   k/2])
//
// NCHW, one plane an item. Stride 1 is the Ghost modules' stencil. Stride 2: every row of x that is
// needed is taken apart once into its even and its odd columns, each with a border of zeros, in
// scratch that stays in L1 / L2; then every tap reads consecutive elements of one of the two.
// NHWC, one row of out an item: channels run along the lanes.
// Binding resource: the memory bus for large maps, load ports for small ones.
#pragma once

#include <algorithm>

#include "cpu/activation.h"
#include "cpu/depthwise.h"
#include "cpu/layers.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

template <class A>
void activate_row(const Activation& a, A* row, int64_t n) {
  constexpr int L = kLanes<A>;
  with_activation(a.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    if constexpr (kAct == Act::kNone) return;
    for (int64_t i = 0; i < n; i += L) {
      const Vec<A> v = activate<kAct, A>(load_n(row + i, n - i), A(a.slope));
      store_n(row + i, v, n - i);
    }
  });
}

// One plane of a convolution of stride 2. Rows of x, taken apart, stand in `even` and `odd`, ld
// elements a row, element 0 of the image at border.
template <class T, int K>
class HalvedPlane {
  using A = ComputeOf<T>;
  static constexpr int R = K / 2, L = kLanes<A>;
  static constexpr int64_t kBorder = 16;
  const DepthwiseArgs& a;
  const int64_t ld;
  A *even, *odd, *line;

 public:
  static int64_t row_elements(const DepthwiseArgs& a) {
    return round_up(a.out_width, L) + 2 * kBorder;
  }
  static size_t bytes(const DepthwiseArgs& a) {
    return size_t(2 * a.height * row_elements(a) + 2 * a.width + 128) * sizeof(A);
  }

  explicit HalvedPlane(const DepthwiseArgs& args) : a(args), ld(row_elements(args)) {
    even = static_cast<A*>(thread_scratch(bytes(args)));
    odd = even + a.height * ld;
    line = odd + a.height * ld;
    std::fill(even, line, A(0));  // the borders stay zero from plane to plane
  }

  void run(const T* x, const A* weight, A shift, T* out, A* plane) const {
    const int64_t W = a.width, Wo = a.out_width;
    int64_t have = 0;
    A taps[K * K];
    for (int t = 0; t < K * K; ++t) taps[t] = weight[t];
    for (int64_t h = 0; h < a.out_height; ++h) {
      const int64_t last = std::min(2 * h - R + K, a.height);
      for (; have < last; ++have) split(x + have * W, have);
      const int64_t first = std::max<int64_t>(2 * h - R, 0);
      A* const row = sizeof(T) == sizeof(A) ? reinterpret_cast<A*>(out) + h * Wo : plane;
      for (int64_t w = 0; w < Wo; w += L) {
        Vec<A> acc0 = set1(shift), acc1{};
        for (int64_t r = first; r < last; ++r) {
          const A* const t = taps + (r - 2 * h + R) * K;
          const A *e = even + r * ld + kBorder + w, *o = odd + r * ld + kBorder + w;
#pragma GCC unroll 7
          for (int j = 0; j < K; ++j) {
            // Column 2 w + j - R: even or odd by the parity of j - R.
            const bool is_even = (j + R) % 2 == 0;
            const int shift_by = is_even ? (j - R) / 2 : (j - R - 1) / 2;
            const Vec<A> v = load((is_even ? e : o) + shift_by);
            (is_even ? acc0 : acc1) += set1(t[j]) * v;
          }
        }
        store_n(row + w, acc0 + acc1, Wo - w);
      }
      activate_row(a.act, row, Wo);
      if (sizeof(T) != sizeof(A)) write_row(row, out + h * Wo, Wo);
    }
  }

 private:
  void split(const T* x, int64_t r) const {
    const A* src;
    if constexpr (sizeof(T) == sizeof(A)) {
      src = reinterpret_cast<const A*>(x);
    } else {
      read_row(x, line, a.width);
      src = line;
    }
    A *e = even + r * ld + kBorder, *o = odd + r * ld + kBorder;
    const int64_t pairs = a.width / 2;
    for (int64_t w = 0; w < pairs; ++w) {
      e[w] = src[2 * w];
      o[w] = src[2 * w + 1];
    }
    if (a.width % 2) e[pairs] = src[a.width - 1];
  }
};

template <class T, int K>
void halved_planes(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  const HalvedPlane<T, K> halved(a);
  const int64_t P = a.height * a.width, Po = a.out_height * a.out_width;
  A* const row = static_cast<A*>(thread_scratch(HalvedPlane<T, K>::bytes(a))) +
                 2 * a.height * HalvedPlane<T, K>::row_elements(a) + a.width + 32;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = i % a.channels;
    halved.run(static_cast<const T*>(a.x) + i * P, static_cast<const A*>(a.weight) + c * K * K,
               static_cast<const A*>(a.shift)[c], static_cast<T*>(a.out) + i * Po, row);
  }
}

// Stride 1: the stencil of the Ghost modules, from x's own plane where that is of the compute type.
template <class T>
void full_planes(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  constexpr bool kSame = sizeof(T) == sizeof(A);
  const int64_t P = a.height * a.width, taps = a.kernel * a.kernel;
  A* scratch = nullptr;
  if (!kSame) scratch = static_cast<A*>(thread_scratch(size_t(2 * P + 64) * sizeof(A)));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = i % a.channels;
    const T* x = static_cast<const T*>(a.x) + i * P;
    T* out = static_cast<T*>(a.out) + i * P;
    A* v = reinterpret_cast<A*>(out);
    const A* y = reinterpret_cast<const A*>(x);
    if (!kSame) {
      read_row(x, scratch, P);
      y = scratch;
      v = scratch + P + 32;
    }
    Stencil<A> s{y,
                 0,
                 a.height,
                 a.width,
                 0,
                 a.height,
                 static_cast<const A*>(a.weight) + c * taps,
                 static_cast<const A*>(a.shift) + c,
                 v,
                 a.act.act == Act::kReLU,
                 false,
                 false};
    stencil<A>(a.kernel, s);
    if (a.act.act != Act::kReLU) activate_row(a.act, v, P);
    if (!kSame) write_row(v, out, P);
  }
}

// One row of out, channels_last.
template <class T>
void channel_row(const DepthwiseArgs& a, int64_t item) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  const int64_t C = a.channels, K = a.kernel, R = K / 2, n = item / a.out_height,
                h = item % a.out_height;
  const T* const x = static_cast<const T*>(a.x) + n * a.height * a.width * C;
  T* const out = static_cast<T*>(a.out) + item * a.out_width * C;
  const A* const weight = static_cast<const A*>(a.weight);
  const A* const shift = static_cast<const A*>(a.shift);
  const int64_t r0 = std::max<int64_t>(h * a.stride - R, 0),
                r1 = std::min(h * a.stride - R + K, a.height);
  with_activation(a.act.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    for (int64_t w = 0; w < a.out_width; ++w) {
      const int64_t c0 = std::max<int64_t>(w * a.stride - R, 0),
                    c1 = std::min(w * a.stride - R + K, a.width);
      for (int64_t c = 0; c < C; c += L) {
        const int64_t left = C - c;
        Vec<A> acc = load_n(shift + c, left);
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t q = c0; q < c1; ++q) {
            const int64_t tap = (r - h * a.stride + R) * K + q - w * a.stride + R;
            const T* p = x + (r * a.width + q) * C + c;
            if (left >= L)
              acc += load(weight + tap * C + c) * Storage<T>::load(p);
            else
              acc += load_n(weight + tap * C + c, left) * Storage<T>::load_n(p, left);
          }
        Storage<T>::store_n(out + w * C + c, activate<kAct, A>(acc, A(a.act.slope)), left);
      }
    }
  });
}

template <class T>
void depthwise_items(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  if (a.layout == Layout::kNHWC) {
    for (int64_t i = begin; i < end; ++i) channel_row<T>(a, i);
  } else if (a.stride == 1) {
    full_planes<T>(a, begin, end);
  } else {
    switch (a.kernel) {
      case 1:
        return halved_planes<T, 1>(a, begin, end);
      case 3:
        return halved_planes<T, 3>(a, begin, end);
      case 5:
        return halved_planes<T, 5>(a, begin, end);
      case 7:
        return halved_planes<T, 7>(a, begin, end);
    }
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
