// Depthwise d x d stencils over one channel's plane, rows of W pixels packed without gaps.
//
//   v[h][w] = shift + sum_{i,j} tap[i][j] * y[h + i - d/2][w + j - d/2]      (zero outside the image)
//
// Tile map: kStrips strips of one vector each slide down the rows together. Every input row is loaded once per tap column
// (d loads) and feeds d output rows, held as d accumulators a strip: 3 loads for 9 FMAs instead of 9. Columns outside the
// image are masked to zero and never read.
// Binding resource: FMA ports for d = 3, load ports and the taps' broadcasts for d >= 5.
#pragma once

#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

template <class A>
struct Stencil {
  const A* y;      // plane of activated intrinsic maps
  int64_t y_row0;  // the image row that y points at
  int64_t height, width;
  int64_t row_begin, row_end;  // output rows wanted
  const A* taps;   // [d*d]
  A shift;
  A* v;            // output row row_begin, row stride = width
  bool relu;
  bool accumulate; // start from v instead of from shift (the input gradient sums over a map's ghosts)
  bool stream;     // non-temporal stores: v and width must keep every strip aligned
};

// Strips at columns col, col + L, ... Only strip 0 may touch the left edge and only the last one the right edge.
template <class A, int D, int kStrips, bool kAccumulate>
__attribute__((noinline)) void slide(const Stencil<A>& s, int64_t col) {
  constexpr int L = kLanes<A>, R = D / 2, kLast = kStrips - 1;
  using V = Vec<A>;
  // Locals, because a store through v could alias *s as far as the compiler knows.
  const int64_t W = s.width, begin = s.row_begin, end = s.row_end, last_col = col + kLast * L;
  const bool with_relu = s.relu, stream = s.stream;
  const A* const taps = s.taps;
  MaskT<A> first[D], last[D];  // lanes whose column is inside the image, by tap column
#pragma GCC unroll 7
  for (int j = 0; j < D; ++j) {
    first[j] = lane_range<A>(R - j - col, W + R - j - col);
    last[j] = lane_range<A>(R - j - last_col, W + R - j - last_col);
  }
  const MaskT<A> inside = lane_range<A>(0, W - last_col);
  const bool whole = W - last_col >= L;
  V tap[D <= 3 ? D * D : 1];
  if constexpr (D <= 3) {
#pragma GCC unroll 9
    for (int t = 0; t < D * D; ++t) tap[t] = set1(taps[t]);
  }
  const V shift = set1(s.shift);
  const int64_t r_first = begin - R > 0 ? begin - R : 0;
  const int64_t r_last = end + R < s.height ? end + R : s.height;  // exclusive
  A* const v = s.v + col - begin * W;                               // v + row * W: output row `row`
  auto start = [=](int64_t row, int k) __attribute__((always_inline)) -> V {
    if (!kAccumulate || row < begin || row >= end) return shift;
    const A* p = v + row * W + k * L;
    return k == kLast ? load_masked(p, inside) : load(p);
  };
  auto finish = [=](int64_t row, int k, V r) __attribute__((always_inline)) {
    A* p = v + row * W + k * L;
    if (with_relu) r = relu(r);
    if (k == kLast && !whole)
      store_masked(p, r, inside);
    else if (stream)
      store_stream(p, r);
    else
      store(p, r);
  };
  // While input row r is read, acc[a] belongs to output row r - R + a, for which r is tap row D - 1 - a.
  V acc[D][kStrips];
#pragma GCC unroll 7
  for (int a = 0; a < D - 1; ++a)
#pragma GCC unroll 4
    for (int k = 0; k < kStrips; ++k) acc[a][k] = start(r_first - R + a, k);
  const A* y = s.y + (r_first - s.y_row0) * W + col - R;
  for (int64_t r = r_first; r < r_last; ++r, y += W) {
#pragma GCC unroll 4
    for (int k = 0; k < kStrips; ++k) acc[D - 1][k] = start(r + R, k);
#pragma GCC unroll 7
    for (int j = 0; j < D; ++j) {
#pragma GCC unroll 4
      for (int k = 0; k < kStrips; ++k) {
        const A* p = y + k * L + j;
        const V b = k == kLast        ? load_masked(p, last[j])
                    : k == 0 && j < R ? load_masked(p, first[j])
                                      : load(p);
#pragma GCC unroll 7
        for (int a = 0; a < D; ++a) {
          const int t = (D - 1 - a) * D + j;
          if constexpr (D <= 3)
            acc[a][k] += tap[t] * b;
          else
            acc[a][k] += set1(taps[t]) * b;
        }
      }
    }
    const int64_t done = r - R;
    if (done >= begin && done < end) {
#pragma GCC unroll 4
      for (int k = 0; k < kStrips; ++k) finish(done, k, acc[0][k]);
    }
#pragma GCC unroll 7
    for (int a = 0; a + 1 < D; ++a)
#pragma GCC unroll 4
      for (int k = 0; k < kStrips; ++k) acc[a][k] = acc[a + 1][k];
  }
  // At the lower edge of the image the missing rows are zeros.
#pragma GCC unroll 7
  for (int a = 0; a < D - 1; ++a) {
    const int64_t row = r_last - R + a;
    if (row >= begin && row < end) {
#pragma GCC unroll 4
      for (int k = 0; k < kStrips; ++k) finish(row, k, acc[a][k]);
    }
  }
}

template <class A, int D, bool kAccumulate>
void slide_all(const Stencil<A>& s) {
  constexpr int L = kLanes<A>, R = D / 2;
  // Accumulators (d a strip) and, for d = 3, the nine taps stay in registers: 32 of them with AVX-512 and NEON, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kMost = D <= 3 ? 4 : D == 5 ? 3 : 2;
#else
  constexpr int kMost = D == 1 ? 4 : D == 3 ? 2 : 1;
#endif
  const int64_t n = (s.width + L - 1) / L;
  for (int64_t k = 0; k < n;) {
    // Inner strips of a group are read without masks, so they must stay clear of both edges.
    int64_t take = n - k < kMost ? n - k : kMost;
    while (take > 1 && ((k + 1) * L < R || (k + take - 1) * L + R > s.width)) --take;
    const int64_t col = k * L;
    if (take == 4)
      slide<A, D, (kMost >= 4 ? 4 : 1), kAccumulate>(s, col);
    else if (take == 3)
      slide<A, D, (kMost >= 3 ? 3 : 1), kAccumulate>(s, col);
    else if (take == 2)
      slide<A, D, (kMost >= 2 ? 2 : 1), kAccumulate>(s, col);
    else
      slide<A, D, 1, kAccumulate>(s, col);
    k += take;
  }
}

template <class A>
void stencil(int64_t d, const Stencil<A>& s) {
#define GHOST_STENCIL(D) \
  case D: return s.accumulate ? slide_all<A, D, true>(s) : slide_all<A, D, false>(s);
  switch (d) {
    GHOST_STENCIL(1)
    GHOST_STENCIL(3)
    GHOST_STENCIL(5)
    GHOST_STENCIL(7)
  }
#undef GHOST_STENCIL
}

}  // namespace GHOST_ISA
}  // namespace ghost
