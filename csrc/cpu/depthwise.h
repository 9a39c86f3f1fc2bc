// Depthwise d x d stencils over one channel's plane, rows of W pixels packed without gaps.
//
//   v[h][w] = shift + sum_{i,j} tap[i][j] * y[h + i - d/2][w + j - d/2]
//
// y is zero outside the image. In the code D = d, R = D / 2, L lanes.
//
// Tile map: pixels of a row along the lanes. kStrips strips of one vector each slide down the rows
// together. Every input row is loaded once per tap column (d loads) and feeds d output rows, held
// as d accumulators a strip: 3 loads for 9 FMAs instead of 9. Columns outside the image are masked
// to zero and never read. Binding resource: FMA ports for d = 3, load ports and the broadcasts of
// the taps for d >= 5.
#pragma once

#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

// One stencil over `channels` planes. The *_step fields are elements from one channel to the next.
template <class A>
struct Stencil {
  const A* y;      // [channels][rows][width]: activated intrinsic maps
  int64_t y_row0;  // image row that y points at
  int64_t height, width;
  int64_t row_begin, row_end;  // rows of v to compute
  const A* taps;               // [channels][d * d]
  const A* shift;              // [channels], or null: 0
  A* v;                        // [channels][row_end - row_begin][width]
  bool relu;
  // The sums start from `from`, not from shift: the gradient of y sums over the ghosts of a map.
  bool accumulate;
  bool stream;  // non-temporal stores; every strip of v must be aligned to a vector
  int64_t channels = 1, y_step = 0, taps_step = 0, shift_step = 0, v_step = 0;
  const A* from = nullptr;  // like v; null: v itself
  int64_t from_step = 0;
};

// A stencil over whole planes: v (+)= taps (*) y for `planes` planes [H][W] that share their taps
// [d*d]; y_step, v_step: elements from plane to plane.
template <class A>
Stencil<A> whole_planes(const A* y, int64_t y_step, int64_t planes, int64_t H, int64_t W,
                        const A* taps, A* v, int64_t v_step, bool accumulate = false) {
  Stencil<A> s{y, 0, H, W, 0, H, taps, nullptr, v, false, accumulate, false};
  s.channels = planes;
  s.y_step = y_step;
  s.v_step = v_step;
  return s;
}

// Strips at columns col, col + L, ... of channels [channel, channel_end), kPair channels at a time;
// returns the first channel that remains. Only strip 0 may touch the left edge and only the last
// one the right edge. A narrow map has one strip, too few independent sums to hide the latency of
// an FMA: two channels go together.
template <class A, int D, int kStrips, int kPair, bool kAccumulate>
__attribute__((noinline)) int64_t slide(const Stencil<A>& s, int64_t col, int64_t channel,
                                        int64_t channel_end) {
  constexpr int L = kLanes<A>, R = D / 2, kLast = kStrips - 1, S = kStrips * kPair;
  constexpr bool kTapsInRegisters = D * D * kPair <= 18;
  using V = Vec<A>;
  // Locals: for the compiler, a store through v may change *s.
  const int64_t W = s.width, begin = s.row_begin, end = s.row_end, last_col = col + kLast * L;
  const int64_t y_step = s.y_step, taps_step = s.taps_step, v_step = s.v_step;
  const bool with_relu = s.relu, stream = s.stream;
  MaskT<A> first[D], last[D];  // per tap column: lanes whose column is inside the image
#pragma GCC unroll 7
  for (int j = 0; j < D; ++j) {
    first[j] = lane_range<A>(R - j - col, W + R - j - col);
    last[j] = lane_range<A>(R - j - last_col, W + R - j - last_col);
  }
  const MaskT<A> inside = lane_range<A>(0, W - last_col);
  const bool whole = W - last_col >= L;
  const int64_t r_first = begin - R > 0 ? begin - R : 0;
  const int64_t r_last = end + R < s.height ? end + R : s.height;  // exclusive
  const A* const y_first = s.y + (r_first - s.y_row0) * W + col - R;
  A* const v_first = s.v + col - begin * W;  // + row * W: output row `row`
  const A* const from_first = (s.from ? s.from : s.v) + col - begin * W;
  const int64_t from_step = s.from ? s.from_step : s.v_step;
  for (; channel + kPair <= channel_end; channel += kPair) {
    const A* const taps = s.taps + channel * taps_step;
    V tap[kTapsInRegisters ? kPair * D * D : 1];
    V shift[kPair];
#pragma GCC unroll 2
    for (int q = 0; q < kPair; ++q) {
      shift[q] = s.shift ? set1(s.shift[(channel + q) * s.shift_step]) : V{};
      if constexpr (kTapsInRegisters) {
#pragma GCC unroll 9
        for (int t = 0; t < D * D; ++t) tap[q * D * D + t] = set1(taps[q * taps_step + t]);
      }
    }
    A* const v = v_first + channel * v_step;
    const A* const from = from_first + channel * from_step;
    auto start = [=](int64_t row, int i) __attribute__((always_inline)) -> V {
      const int q = i / kStrips, k = i % kStrips;
      if (!kAccumulate || row < begin || row >= end) return shift[q];
      const A* p = from + q * from_step + row * W + k * L;
      return k == kLast ? load_masked(p, inside) : load(p);
    };
    auto finish = [=](int64_t row, int i, V r) __attribute__((always_inline)) {
      const int q = i / kStrips, k = i % kStrips;
      A* p = v + q * v_step + row * W + k * L;
      if (with_relu) r = relu(r);
      if (k == kLast && !whole)
        store_masked(p, r, inside);
      else if (stream)
        store_stream(p, r);
      else
        store(p, r);
    };
    // While input row r is read, acc[a] belongs to output row r - R + a, whose tap row for r is
    // D - 1 - a.
    V acc[D][S];
#pragma GCC unroll 7
    for (int a = 0; a < D - 1; ++a)
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) acc[a][i] = start(r_first - R + a, i);
    const A* y = y_first + channel * y_step;
    for (int64_t r = r_first; r < r_last; ++r, y += W) {
#pragma GCC unroll 4
      for (int i = 0; i < S; ++i) acc[D - 1][i] = start(r + R, i);
#pragma GCC unroll 7
      for (int j = 0; j < D; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < S; ++i) {
          const int q = i / kStrips, k = i % kStrips;
          const A* p = y + q * y_step + k * L + j;
          const V b = k == kLast        ? load_masked(p, last[j])
                      : k == 0 && j < R ? load_masked(p, first[j])
                                        : load(p);
#pragma GCC unroll 7
          for (int a = 0; a < D; ++a) {
            const int t = (D - 1 - a) * D + j;
            if constexpr (kTapsInRegisters)
              acc[a][i] += tap[q * D * D + t] * b;
            else
              acc[a][i] += set1(taps[q * taps_step + t]) * b;
          }
        }
      }
      const int64_t done = r - R;
      if (done >= begin && done < end) {
#pragma GCC unroll 4
        for (int i = 0; i < S; ++i) finish(done, i, acc[0][i]);
      }
#pragma GCC unroll 7
      for (int a = 0; a + 1 < D; ++a)
#pragma GCC unroll 4
        for (int i = 0; i < S; ++i) acc[a][i] = acc[a + 1][i];
    }
    // Rows below the image are zeros.
#pragma GCC unroll 7
    for (int a = 0; a < D - 1; ++a) {
      const int64_t row = r_last - R + a;
      if (row >= begin && row < end) {
#pragma GCC unroll 4
        for (int i = 0; i < S; ++i) finish(row, i, acc[a][i]);
      }
    }
  }
  return channel;
}

template <class A, int D, bool kAccumulate>
void slide_all(const Stencil<A>& s) {
  constexpr int L = kLanes<A>, R = D / 2;
  // D accumulators a strip and, for D = 3, the nine taps stay in registers: 32 registers with
  // AVX-512 and NEON, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kMost = D <= 3 ? 4 : D == 5 ? 3 : 2;
#else
  constexpr int kMost = D == 1 ? 4 : D == 3 ? 2 : 1;
#endif
  constexpr int kTwo = kMost >= 3 ? 2 : 1;  // channels at a time if a map has one strip
  const int64_t n = (s.width + L - 1) / L;
  // Channels whose rows stay in L1 while all groups of strips of a wide map pass over them.
  const int64_t rows = s.row_end - s.row_begin + 2 * R;
  int64_t block = 4096 / (rows * s.width + 1);
  block = n <= kMost ? s.channels : block < 1 ? 1 : block;
  for (int64_t c = 0; c < s.channels; c += block) {
    const int64_t c_end = c + block < s.channels ? c + block : s.channels;
    for (int64_t k = 0; k < n;) {
      // Inner strips of a group are read without masks: no tap of theirs may reach an edge.
      int64_t take = n - k < kMost ? n - k : kMost;
      while (take > 1 && ((k + 1) * L < R || (k + take - 1) * L + R > s.width)) --take;
      const int64_t col = k * L;
      if (take == 4)
        slide<A, D, (kMost >= 4 ? 4 : 1), 1, kAccumulate>(s, col, c, c_end);
      else if (take == 3)
        slide<A, D, (kMost >= 3 ? 3 : 1), 1, kAccumulate>(s, col, c, c_end);
      else if (take == 2)
        slide<A, D, (kMost >= 2 ? 2 : 1), 1, kAccumulate>(s, col, c, c_end);
      else
        slide<A, D, 1, 1, kAccumulate>(s, col, slide<A, D, 1, kTwo, kAccumulate>(s, col, c, c_end),
                                       c_end);
      k += take;
    }
  }
}

template <class A>
void stencil(int64_t d, const Stencil<A>& s) {
  with_constant<1, 3, 5, 7>(d, [&](auto size) {
    constexpr int D = decltype(size)::value;
    s.accumulate ? slide_all<A, D, true>(s) : slide_all<A, D, false>(s);
  });
}
// Instantiated in isa/kernels.cpp, once for each instruction set.
extern template void stencil(int64_t, const Stencil<float>&);
extern template void stencil(int64_t, const Stencil<double>&);

// Pixels that the sums of the taps' gradient span in the compute type; sums of these are added in
// double. D * D sums at once: more pixels than kSumPixels of batch_norm.h.
inline constexpr int64_t kTapSumPixels = 8192;

// The gradient of the stencil's taps, D * D sums in registers:
//   dw[a][b] += sum_{n,h,w} dv[n][h][w] * y[n][h + a - D/2][w + b - D/2]
// y, dv [N][H][W] of one channel; dw [D * D].
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
      // Tap row a multiplies row r of y with row r + R - a of dv: D rows of dv slide along in
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
// Images in groups of about kTapSumPixels pixels, at least one.
template <class A>
void stencil_weight_grad(int64_t d, const A* y, const A* dv, int64_t N, int64_t H, int64_t W,
                         double* dw) {
  const int64_t P = H * W, most = P < kTapSumPixels ? kTapSumPixels / (P > 0 ? P : 1) : 1;
  for (int64_t n = 0; n < N; n += most, y += most * P, dv += most * P) {
    const int64_t images = N - n < most ? N - n : most;
    with_constant<1, 3, 5, 7>(d, [&](auto size) {
      stencil_weight_grad<A, decltype(size)::value>(y, dv, images, H, W, dw);
    });
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
