// A depthwise convolution with its batch norm folded in, and an activation: one pass over x.
//
//   out[c][h][w] = act(shift[c] + sum_{i,j} weight[c][i][j] * x[c][h * s + i - k/2][w * s + j -
//   k/2])
//
// NCHW, a plane an item, pixels along the lanes. Stride 1 is the Ghost modules' stencil. Stride 2:
// a band of x's rows is taken apart into even and odd columns with borders of zeros, in scratch
// that stays in L1; then every tap reads consecutive elements of one of the two. Tile: M rows by N
// vectors of out. Rows of half a vector or less go in pairs of channels, one in each half.
// NHWC, a row of out an item, channels along the lanes. Tile: 7 pixels of one vector of channels
// (maps are multiples of 7 wide), the k taps of a row in registers; a column of x is loaded once
// and feeds every pixel that it reaches. Binding resource: the memory bus for large maps; else FMA
// ports, with load ports close behind.
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
__attribute__((noinline)) void activate_row(const Activation& a, A* row, int64_t n) {
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

// The activation of N vectors in registers. Those with an exponential would be too much code in
// every kernel: their vectors go through a buffer.
template <class A, int N>
GHOST_INLINE void activate_vectors(const Activation& a, Vec<A>* v) {
  constexpr int L = kLanes<A>;
  if (a.act == Act::kSiLU || a.act == Act::kGELU || a.act == Act::kGELUTanh) {
    A buffer[N * L];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(buffer + i * L, v[i]);
    activate_row(a, buffer, N * L);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = load(buffer + i * L);
    return;
  }
  with_activation(a.act, [&](auto act) __attribute__((always_inline)) {
    constexpr Act kAct = decltype(act)::value;
    if constexpr (kAct != Act::kSiLU && kAct != Act::kGELU && kAct != Act::kGELUTanh) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) v[i] = activate<kAct, A>(v[i], A(a.slope));
    }
  });
}

// The even lanes of (a, b) into a, the odd ones into b.
template <class A>
GHOST_INLINE void unzip(Vec<A>& a, Vec<A>& b) {
  constexpr int L = kLanes<A>;
  const Vec<A> x = a, y = b;
#if defined(__clang__)
  for (int l = 0; l < L; ++l) {
    a[l] = l < L / 2 ? x[2 * l % L] : y[2 * l % L];
    b[l] = l < L / 2 ? x[2 * l % L + 1] : y[2 * l % L + 1];
  }
#else
  typename Simd<A>::I even, odd;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    even[l] = 2 * l;
    odd[l] = 2 * l + 1;
  }
  a = __builtin_shuffle(x, y, even);
  b = __builtin_shuffle(x, y, odd);
#endif
}

// A band of a plane, or of two planes that share vectors, for a convolution of stride 2.
template <class A>
struct HalvedBand {
  const A *even, *odd;  // columns of x, row 0 being the first that out's first row reads
  int64_t ld;           // elements of a row of either
  const A* taps;        // [k * k] vectors
  Vec<A> shift;
  A* out[2];  // the second plane's: null if there is none
  int64_t rows, width;
  Activation act;
};

// M rows by N vectors of out at a time, from vector column v on, down the band.
template <class A, int K, int M, int N>
__attribute__((noinline)) void halved_rows(const HalvedBand<A>& b, int64_t v) {
  constexpr int L = kLanes<A>, R = K / 2;
  constexpr bool kTapsInRegisters = K <= 3;
  using V = Vec<A>;
  const int64_t ld = b.ld, width = b.width, rows = b.rows;
  const MaskT<A> inside = lane_range<A>(0, width - (v + N - 1) * L);
  const MaskT<A> second = lane_range<A>(L / 2, L / 2 + width);
  const bool whole = width >= (v + N) * L;
  const A *even = b.even + v * L, *odd = b.odd + v * L;
  // Column 2 w + j - R: even or odd by the parity of j - R.
  auto at = [&](int64_t row, int j) __attribute__((always_inline)) {
    return (j + R) % 2 == 0 ? even + row * ld + (j - R) / 2 : odd + row * ld + (j - R - 1) / 2;
  };
  V tap[kTapsInRegisters ? K * K : K];
  if constexpr (kTapsInRegisters) {
#pragma GCC unroll 9
    for (int t = 0; t < K * K; ++t) tap[t] = load(b.taps + t * L);
  }
  for (int64_t h = 0; h < rows; h += M, even += 2 * M * ld, odd += 2 * M * ld) {
    V acc[M * N];
#pragma GCC unroll 8
    for (int i = 0; i < M * N; ++i) acc[i] = b.shift;
    if constexpr (kTapsInRegisters) {
#pragma GCC unroll 15
      for (int r = 0; r < 2 * (M - 1) + K; ++r)
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            const V x = load(at(r, j) + n * L);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
              if (r >= 2 * m && r < 2 * m + K) acc[m * N + n] += tap[(r - 2 * m) * K + j] * x;
          }
    } else {
      for (int i = 0; i < K; ++i) {
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j) tap[j] = load(b.taps + (i * K + j) * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 7
          for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[m * N + n] += tap[j] * load(at(2 * m + i, j) + n * L);
      }
    }
    activate_vectors<A, M * N>(b.act, acc);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      if (h + m >= rows) break;
      A* const out = b.out[0] + (h + m) * width + v * L;
#pragma GCC unroll 4
      for (int n = 0; n + 1 < N; ++n) store(out + n * L, acc[m * N + n]);
      if (whole)
        store(out + (N - 1) * L, acc[m * N + N - 1]);
      else
        store_masked(out + (N - 1) * L, acc[m * N + N - 1], inside);
      if (N == 1 && b.out[1]) store_masked(b.out[1] + (h + m) * width - L / 2, acc[m * N], second);
    }
  }
}

template <class A, int K>
void halved_band(const HalvedBand<A>& b) {
  const int64_t n = (b.width + kLanes<A> - 1) / kLanes<A>;
  int64_t v = 0;
  if constexpr (K <= 3) {  // the taps leave AVX2 five accumulators
    for (; v + 2 <= n; v += 2) halved_rows<A, K, 2, 2>(b, v);
    if (v < n) halved_rows<A, K, 4, 1>(b, v);
  } else {
    for (; v + 4 <= n; v += 4) halved_rows<A, K, 2, 4>(b, v);
    for (; v + 2 <= n; v += 2) halved_rows<A, K, 4, 2>(b, v);
    if (v < n) halved_rows<A, K, 7, 1>(b, v);
  }
}

template <class T, int K>
class HalvedPlanes {
  using A = ComputeOf<T>;
  using V = Vec<A>;
  static constexpr int R = K / 2, L = kLanes<A>;
  static constexpr bool kSame = sizeof(T) == sizeof(A);
  // Rows of out in a band, and of x for them; a tile may compute, and not store, 6 rows more.
  static constexpr int64_t kBand = 14, kRows = 2 * kBand + K - 2;
  const DepthwiseArgs& a;
  const int64_t ld;
  // Two planes share vectors if both fit, with the zeros between them that the taps reach.
  const bool paired;
  const MaskT<A> low, high;  // columns of x in the last pair of vectors of a row
  A *even, *odd, *taps, *line, *band;

 public:
  explicit HalvedPlanes(const DepthwiseArgs& args)
      : a(args),
        ld(round_up((a.width + 1) / 2, L) + L),
        paired(L >= 8 && (a.width + 1) / 2 + (R + 1) / 2 <= L / 2),
        low(lane_range<A>(0, paired ? a.width : a.width - (ld / L - 2) * 2 * L)),
        high(lane_range<A>(0, paired ? a.width : a.width - (ld / L - 2) * 2 * L - L)) {
    const int64_t half = (kRows + 12) * ld + 2 * L, lines = kSame ? 0 : kRows * a.width + L,
                  out = kSame ? 0 : kBand * a.out_width + L;
    even = static_cast<A*>(
        thread_scratch(size_t(2 * half + K * K * L + 2 * lines + 2 * out) * sizeof(A)));
    odd = even + half;
    taps = odd + half;
    line = taps + K * K * L;
    band = line + 2 * lines;
    std::fill(even, taps, A(0));  // the borders stay zero
  }

  // Planes [begin, end) of [N, C].
  void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += paired ? 2 : 1) plane(i, paired && i + 1 < end ? 2 : 1);
  }

 private:
  void plane(int64_t i, int planes) const {
    const int64_t P = a.height * a.width, Po = a.out_height * a.out_width, Wo = a.out_width;
    const int64_t channel[2] = {i % a.channels, (i + 1) % a.channels};
    const A* const weight[2] = {static_cast<const A*>(a.weight) + channel[0] * K * K,
                                static_cast<const A*>(a.weight) + channel[1] * K * K};
    const A* const shift = static_cast<const A*>(a.shift);
    auto both = [&](A first, A second) {
      V v = set1(first);
      if (planes == 2)
        for (int l = L / 2; l < L; ++l) v[l] = second;
      return v;
    };
    for (int t = 0; t < K * K; ++t) store(taps + t * L, both(weight[0][t], weight[1][t]));
    HalvedBand<A> b{even + L, odd + L, ld, taps, both(shift[channel[0]], shift[channel[1]]),
                    {},       0,       Wo, a.act};
    for (int64_t h = 0; h < a.out_height; h += kBand) {
      b.rows = std::min(a.out_height - h, kBand);
      const int64_t first = std::max<int64_t>(2 * h - R, 0),
                    last = std::min(2 * (h + b.rows - 1) + K - R, a.height);
      const A* x[2] = {};
      for (int q = 0; q < planes; ++q) {
        const T* const from = static_cast<const T*>(a.x) + (i + q) * P + first * a.width;
        T* const to = static_cast<T*>(a.out) + (i + q) * Po + h * Wo;
        if constexpr (kSame) {
          x[q] = from;
          b.out[q] = to;
        } else {
          A* const copy = line + q * (kRows * a.width + L);
          read_row(from, copy, (last - first) * a.width);
          x[q] = copy;
          b.out[q] = band + q * (kBand * Wo + L);
        }
      }
      for (int64_t r = 2 * h - R, to = 0; r < 2 * (h + b.rows - 1) + K - R; ++r, to += ld) {
        if (r >= first && r < last)
          split(x[0] + (r - first) * a.width, x[1] ? x[1] + (r - first) * a.width : nullptr, to);
        else
          for (int64_t w = 0; w < ld; w += L) store(even + to + w, V{}), store(odd + to + w, V{});
      }
      halved_band<A, K>(b);
      if constexpr (!kSame)
        for (int q = 0; q < planes; ++q)
          write_row(b.out[q], static_cast<T*>(a.out) + (i + q) * Po + h * Wo, b.rows * Wo);
    }
  }

  void split(const A* x, const A* second, int64_t to) const {
    A *e = even + L + to, *o = odd + L + to;
    for (int64_t w = L; w < ld; w += L, x += 2 * L, e += L, o += L) {
      const bool last = w + L == ld;
      V u = last ? load_masked(x, low) : load(x);
      V v = paired ? second ? load_masked(second, high) : V{}
            : last ? load_masked(x + L, high)
                   : load(x + L);
      unzip<A>(u, v);
      store(e, u);
      store(o, v);
    }
  }
};

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

// P pixels of a row of out, channels_last: out[p][c] over all channels. x is the first of `rows`
// rows of x, at the column that the first pixel's first tap reads; columns [q0, q1) of it are
// inside the image. Channels past the last whole vector are computed with a vector that ends at the
// last one.
template <class T, int K, int S, int P, bool kInside, bool kWhole>
__attribute__((noinline)) void channel_pixels(const DepthwiseArgs& a, const T* x, int64_t rows,
                                              int64_t q0, int64_t q1, const ComputeOf<T>* weight,
                                              T* out, int64_t pixels) {
  using A = ComputeOf<T>;
  using V = Vec<A>;
  constexpr int L = kLanes<A>;
  const int64_t C = a.channels, ld = a.width * C;
  const A* const shift = static_cast<const A*>(a.shift);
  const Activation activation = a.act;
  auto load_a = [=](const A* p)
                    __attribute__((always_inline)) { return kWhole ? load(p) : load_n(p, C); };
  for (int64_t i = 0; i < C; i += L) {
    const int64_t c = kWhole ? std::min(i, C - L) : 0;
    V acc[P];
    acc[0] = load_a(shift + c);
#pragma GCC unroll 8
    for (int p = 1; p < P; ++p) acc[p] = acc[0];
    const T* row = x + c;
    const A* w = weight + c;
    for (int64_t r = 0; r < rows; ++r, row += ld, w += K * C) {
      V tap[K];
#pragma GCC unroll 7
      for (int j = 0; j < K; ++j) tap[j] = load_a(w + j * C);
#pragma GCC unroll 32
      for (int q = 0; q < (P - 1) * S + K; ++q) {
        if (!kInside && (q < q0 || q >= q1)) continue;
        const V v = kWhole ? Storage<T>::load(row + q * C) : Storage<T>::load_n(row + q * C, C);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p)
          if (q >= p * S && q < p * S + K) acc[p] += tap[q - p * S] * v;
      }
    }
    activate_vectors<A, P>(activation, acc);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      if (!kInside && p >= pixels) break;
      if (kWhole)
        Storage<T>::store(out + p * C + c, acc[p]);
      else
        Storage<T>::store_n(out + p * C, acc[p], C);
    }
  }
}

// Rows of out, channels_last.
template <class T, int K, int S>
void channel_rows(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  constexpr int R = K / 2, kPixels = 7, kFew = 4;
  const int64_t C = a.channels, W = a.width, Wo = a.out_width;
  const bool whole = C >= kLanes<A>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / a.out_height, top = i % a.out_height * S - R;
    const int64_t r0 = std::max<int64_t>(top, 0), r1 = std::min(top + K, a.height);
    const T* const x = static_cast<const T*>(a.x) + (n * a.height + r0) * W * C;
    const A* const weight = static_cast<const A*>(a.weight) + (r0 - top) * K * C;
    T* const out = static_cast<T*>(a.out) + i * Wo * C;
    for (int64_t w = 0; w < Wo;) {
      const int64_t left = Wo - w;
      const bool few = !whole || left <= kFew || left == 2 * kFew;
      const int64_t pixels = std::min<int64_t>(left, few ? kFew : kPixels);
      const int64_t column = w * S - R, columns = ((few ? kFew : kPixels) - 1) * S + K;
      const int64_t q0 = std::max<int64_t>(-column, 0), q1 = std::min(columns, W - column);
      const auto run = !whole ? channel_pixels<T, K, S, kFew, false, false>
                       : few  ? channel_pixels<T, K, S, kFew, false, true>
                       : q0 == 0 && q1 == columns && pixels == kPixels
                           ? channel_pixels<T, K, S, kPixels, true, true>
                           : channel_pixels<T, K, S, kPixels, false, true>;
      run(a, x + column * C, r1 - r0, q0, q1, weight, out + w * C, pixels);
      w += pixels;
    }
  }
}

template <class T, int K>
void depthwise_of(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  if (a.layout == Layout::kNCHW)
    HalvedPlanes<T, K>(a).run(begin, end);
  else if (a.stride == 1)
    channel_rows<T, K, 1>(a, begin, end);
  else
    channel_rows<T, K, 2>(a, begin, end);
}

template <class T>
void depthwise_items(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  if (a.layout == Layout::kNCHW && a.stride == 1) return full_planes<T>(a, begin, end);
  switch (a.kernel) {
    case 1:
      return depthwise_of<T, 1>(a, begin, end);
    case 3:
      return depthwise_of<T, 3>(a, begin, end);
    case 5:
      return depthwise_of<T, 5>(a, begin, end);
    case 7:
      return depthwise_of<T, 7>(a, begin, end);
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
