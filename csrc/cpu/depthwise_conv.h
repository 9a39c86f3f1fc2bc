// A depthwise convolution with its batch norm folded in, and an activation: one pass over x.
//
//   out[c][h][w] = act(shift[c] +
//                      sum_{i,j} weight[c][i][j] * x[c][h * s + i - k/2][w * s + j - k/2])
//
// Tile map, NCHW: an item is a plane, pixels along the lanes. Stride 1 is the stencil of
// depthwise.h. Stride 2: a band of rows of x is split into even and odd columns with borders of
// zeros, in scratch that stays in L1; then every tap reads consecutive elements of one of the two.
// A tile is M rows by N vectors of out. Planes of half a vector or less go in pairs, one in each
// half of the vectors.
// Tile map, NHWC: an item is a row of out, channels along the lanes, lane_depthwise.h.
// Binding resource: the memory bus for large maps; else FMA ports, with load ports close behind.
#pragma once

#include <algorithm>

#include "cpu/activation.h"
#include "cpu/depthwise.h"
#include "cpu/lane_depthwise.h"
#include "cpu/layers.h"
#include "cpu/scratch.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// A band of a plane, or of two planes that share vectors, of a convolution of stride 2.
template <class A>
struct HalvedBand {
  // Column 0 of the first row of x that the band reads. A row is ld elements of even columns, then
  // ld of odd ones.
  const A* x;
  int64_t ld;
  const A* taps[2];  // [k * k] of each plane
  Vec<A> shift;
  A* out[2];  // [rows][width] of each plane; the second is null if there is one plane
  int64_t rows, width;
  Activation act;
};

// M rows by N vectors of out at a time, from vector column v on, down the band. kOnly: a row has no
// other vectors, which makes ld and all distances constants.
template <class A, int K, int M, int N, bool kOnly>
__attribute__((noinline)) void halved_rows(const HalvedBand<A>& b, int64_t v) {
  constexpr int L = kLanes<A>, R = K / 2;
  constexpr bool kTapsInRegisters = K <= 3 || (K == 5 && M == 2 && N == 1);
  // Two sums for a vector if one would not hide the latency of an FMA.
  constexpr int kSums = kTapsInRegisters && K == 5 ? 2 : 1;
  using V = Vec<A>;
  const int64_t ld = kOnly ? (N + 1) * L : b.ld, width = b.width, rows = b.rows;
  const MaskT<A> inside = lane_range<A>(0, width - (v + N - 1) * L);
  const MaskT<A> second = lane_range<A>(L / 2, L / 2 + width);
  const bool whole = width >= (v + N) * L;
  const A* x = b.x + v * L;
  // Column 2 w + j - R: even or odd by the parity of j - R.
  auto at = [&](const A* from, int64_t row, int j) __attribute__((always_inline)) {
    return from + row * 2 * ld + ((j + R) % 2 == 0 ? (j - R) / 2 : ld + (j - R - 1) / 2);
  };
  typename Simd<A>::I of_second;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) of_second[l] = l < L / 2 ? 0 : -1;
  auto tap_at = [&](int t) __attribute__((always_inline)) {
    const V first = set1(b.taps[0][t]);
    return N == 1 && kOnly && b.out[1] ? (of_second ? set1(b.taps[1][t]) : first) : first;
  };
  V tap[kTapsInRegisters ? K * K : K];
  if constexpr (kTapsInRegisters) {
#pragma GCC unroll 25
    for (int t = 0; t < K * K; ++t) tap[t] = tap_at(t);
  }
  for (int64_t h = 0; h < rows; h += M, x += 4 * M * ld) {
    V acc[kSums * M * N] = {};
#pragma GCC unroll 8
    for (int i = 0; i < M * N; ++i) acc[i] = b.shift;
    if constexpr (kTapsInRegisters) {
#pragma GCC unroll 15
      for (int r = 0; r < 2 * (M - 1) + K; ++r)
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j)
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            V u = load(at(x, r, j) + n * L);
            keep(u);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
              if (r >= 2 * m && r < 2 * m + K)
                acc[(kSums == 2 && j % 2 ? M * N : 0) + m * N + n] += tap[(r - 2 * m) * K + j] * u;
          }
      if constexpr (kSums == 2) {
#pragma GCC unroll 8
        for (int i = 0; i < M * N; ++i) acc[i] += acc[M * N + i];
      }
    } else {
      const A* from = x;
      for (int i = 0; i < K; ++i, from += 2 * ld) {
        // Without this the compiler keeps vectors for the next i, and spills them.
        asm("" : "+r"(from));
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j) {
          tap[j] = tap_at(i * K + j);
        }
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j)
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[m * N + n] += tap[j] * load(at(from, 2 * m, j) + n * L);
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
      if (N == 1 && kOnly && b.out[1])
        store_masked(b.out[1] + (h + m) * width - L / 2, acc[m * N], second);
    }
  }
}

// A whole band, with tiles by the number of vectors in a row.
template <class A, int K>
void halved_band(const HalvedBand<A>& b) {
  const int64_t n = (b.width + kLanes<A> - 1) / kLanes<A>;
  int64_t v = 0;
  if constexpr (K <= 3) {  // the taps leave AVX2 five accumulators
    if (n == 1) return halved_rows<A, K, 4, 1, true>(b, 0);
    if (n == 2) return halved_rows<A, K, 2, 2, true>(b, 0);
    for (; v + 2 <= n; v += 2) halved_rows<A, K, 2, 2, false>(b, v);
    if (v < n) halved_rows<A, K, 4, 1, false>(b, v);
  } else if constexpr (K == 5 && kVectorBytes == 64) {  // all taps in registers
    if (n == 1) return halved_rows<A, K, 2, 1, true>(b, 0);
    for (; v < n; ++v) halved_rows<A, K, 2, 1, false>(b, v);
  } else {
    if (n == 1) return halved_rows<A, K, 7, 1, true>(b, 0);
    if (n == 2) return halved_rows<A, K, 4, 2, true>(b, 0);
    if (n == 4) return halved_rows<A, K, 2, 4, true>(b, 0);
    for (; v + 4 <= n; v += 4) halved_rows<A, K, 2, 4, false>(b, v);
    for (; v + 2 <= n; v += 2) halved_rows<A, K, 4, 2, false>(b, v);
    if (v < n) halved_rows<A, K, 7, 1, false>(b, v);
  }
}

// Planes of a convolution of stride 2.
template <class T, int K>
class HalvedPlanes {
  using A = ComputeOf<T>;
  using V = Vec<A>;
  static constexpr int R = K / 2, L = kLanes<A>;
  static constexpr bool kSame = sizeof(T) == sizeof(A);
  // Rows of out in a band, and the rows of x that it reads. A tile may compute 6 rows more, which
  // are not stored.
  static constexpr int64_t kBand = 14, kRows = 2 * kBand + K - 2;
  const DepthwiseArgs& a;
  const int64_t x_plane, out_plane;  // elements from one plane to the next
  const int64_t ld;
  // Two planes share vectors if both fit, with zeros between them for the taps across the border.
  const bool paired;
  const int64_t pairs, step;  // whole pairs of vectors in a row of x; elements of a halved row
  const MaskT<A> low, high;   // columns of x in the last, partial pair
  A *halved, *line, *band;    // rows of x, split; rows of x and of out in the compute type

 public:
  // Elements of scratch.
  static int64_t scratch(const DepthwiseArgs& a) {
    const int64_t ld = round_up((a.width + 1) / 2, L) + L;
    const int64_t lines = kSame ? 0 : kRows * a.width + L,
                  out = kSame ? 0 : kBand * a.out_width + L;
    return (kRows + 12) * 2 * ld + 2 * L + 2 * lines + 2 * out;
  }

  HalvedPlanes(const DepthwiseArgs& args, int64_t x_step, int64_t out_step, A* memory)
      : a(args),
        x_plane(x_step),
        out_plane(out_step),
        ld(round_up((a.width + 1) / 2, L) + L),
        paired(L >= 8 && (a.width + 1) / 2 + (R + 1) / 2 <= L / 2),
        pairs(a.width / (2 * L)),
        step(2 * ld),
        low(lane_range<A>(0, a.width - pairs * 2 * L)),
        high(lane_range<A>(0, paired ? a.width : a.width - pairs * 2 * L - L)) {
    halved = memory;
    line = halved + (kRows + 12) * step + 2 * L;
    band = line + 2 * (kSame ? 0 : kRows * a.width + L);
    std::fill(halved, line, A(0));  // the borders stay zero
  }

  // Planes [begin, end); plane i has the parameters of channel i % channels.
  void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += paired ? 2 : 1) plane(i, paired && i + 1 < end ? 2 : 1);
  }

 private:
  void plane(int64_t i, int planes) const {
    const int64_t Wo = a.out_width;
    const int64_t c = i % a.channels, other = (i + planes - 1) % a.channels;
    const A* const weight = static_cast<const A*>(a.weight);
    const A* const shift = static_cast<const A*>(a.shift);
    HalvedBand<A> b{
        halved + L, ld,   {weight + c * K * K, weight + other * K * K}, set1(shift[c]), {}, 0,
        Wo,         a.act};
    if (planes == 2) {
      const V second = set1(shift[other]);
      for (int l = L / 2; l < L; ++l) b.shift[l] = second[l];
    }
    for (int64_t h = 0; h < a.out_height; h += kBand) {
      b.rows = std::min(a.out_height - h, kBand);
      const int64_t top = 2 * h - R, bottom = 2 * (h + b.rows - 1) + K - R;
      const int64_t first = std::max<int64_t>(top, 0), last = std::min(bottom, a.height);
      const A* x[2];
      for (int q = 0; q < planes; ++q) {
        const T* const from = static_cast<const T*>(a.x) + (i + q) * x_plane + first * a.width;
        T* const to = static_cast<T*>(a.out) + (i + q) * out_plane + h * Wo;
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
      A* to = halved + L;
      for (int64_t r = top; r < first; ++r, to += step) clear(to);
      const int64_t distance = planes == 2 ? x[1] - x[0] : 0;
      for (int64_t r = first; r < last; ++r, to += step)
        split(x[0] + (r - first) * a.width, distance, to);
      for (int64_t r = last; r < bottom; ++r, to += step) clear(to);
      halved_band<A, K>(b);
      if constexpr (!kSame)
        for (int q = 0; q < planes; ++q)
          write_row(b.out[q], static_cast<T*>(a.out) + (i + q) * out_plane + h * Wo, b.rows * Wo);
    }
  }

  void clear(A* to) const {
    for (int64_t w = 0; w + L < ld; w += L) {
      store(to + w, V{});
      store(to + ld + w, V{});
    }
  }

  // x is read in bursts between the bands, too short for the hardware prefetcher.
  GHOST_INLINE void fetch(const A* x) const {
    constexpr int kLine = 64 / sizeof(A), kAhead = 2048 / sizeof(A);
    if constexpr (kSame)
      for (int i = 0; i < 2 * L; i += kLine) __builtin_prefetch(x + kAhead + i);
  }

  // Splits a row of x, or one of each plane, into its even and odd columns. Locals: for the
  // compiler, a store may change *this.
  GHOST_INLINE void split(const A* x, int64_t distance, A* to) const {
    const int64_t odd = ld, n = pairs, next = paired ? distance : L;
    const bool rest = a.width != n * 2 * L;
    for (int64_t k = 0; k < n; ++k) {
      fetch(x + k * 2 * L);
      V u = load(x + k * 2 * L), v = load(x + k * 2 * L + L);
      unzip<A>(u, v);
      store(to + k * L, u);
      store(to + k * L + odd, v);
    }
    if (!rest) return;
    fetch(x + n * 2 * L);
    V u = load_masked(x + n * 2 * L, low), v = load_masked(x + n * 2 * L + next, high);
    unzip<A>(u, v);
    store(to + n * L, u);
    store(to + n * L + odd, v);
  }
};

// Stride 1, NCHW: the stencil of depthwise.h, on the planes of x and out if they are of the compute
// type, else on copies.
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

// Rows of out, NHWC. Row by row, because x may be larger than the caches.
template <class T>
void channel_rows(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  const int64_t C = a.channels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / a.out_height, h = i % a.out_height;
    const LaneDepthwise<T> rows{static_cast<const T*>(a.x) + n * a.height * a.width * C,
                                static_cast<T*>(a.out) + n * a.out_height * a.out_width * C,
                                C,
                                C,
                                a.height,
                                h,
                                h + 1,
                                a.height,
                                a.width,
                                C,
                                static_cast<const A*>(a.weight),
                                C,
                                static_cast<const A*>(a.shift),
                                a.act};
    if (a.stride == 1)
      lane_depthwise<T, 1>(a.kernel, rows);
    else
      lane_depthwise<T, 2>(a.kernel, rows);
  }
}

template <class T, int K>
void halved_planes(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  using Planes = HalvedPlanes<T, K>;
  using A = ComputeOf<T>;
  A* const memory = static_cast<A*>(thread_scratch(size_t(Planes::scratch(a)) * sizeof(A)));
  Planes(a, a.height * a.width, a.out_height * a.out_width, memory).run(begin, end);
}

// Items [begin, end): planes (NCHW) or rows of out (NHWC).
template <class T>
void depthwise_items(const DepthwiseArgs& a, int64_t begin, int64_t end) {
  if (a.layout == Layout::kNHWC) return channel_rows<T>(a, begin, end);
  if (a.stride == 1) return full_planes<T>(a, begin, end);
  with_constant<1, 3, 5, 7>(
      a.kernel, [&](auto size) { halved_planes<T, decltype(size)::value>(a, begin, end); });
}

}  // namespace GHOST_ISA
}  // namespace ghost
