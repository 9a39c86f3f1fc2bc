// Depthwise D x D stencils of training with channels along the lanes: NHWC, stride 1.
//
//   out[h][i] (+)= sum_{a,b} taps[a][b][i % q] * in[h + a - D/2][i + (b - D/2) * q]
//   sums[a][b][i] += sum_{n,h} dv[n][h][i] * in[n][h + a - D/2][i + (b - D/2) * q]
//
// A row of a map of q channels is F = W * q adjacent numbers, i < F, in which the next pixel is q
// numbers further. The lanes of a vector belong to several pixels if q is less than a vector.
//
// Tile map: one vector of numbers slides down the rows; D rows of sums (of dv for the taps) stay in
// registers. Columns outside the image are masked to zero. Binding resource: L1 and L2 bandwidth.
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

// Rows [begin, end) of one or more images of F numbers a row: [images][end - begin][F]. Other rows
// are zero.
template <class A>
struct LaneRows {
  A* data;
  int64_t begin, end;

  LaneRows image(int64_t n, int64_t F) const { return {data + n * (end - begin) * F, begin, end}; }
};

// Per tap column: the lanes of the vector at i whose column is inside the image.
template <class A, int D>
GHOST_INLINE void column_masks(int64_t i, int64_t F, int64_t q, MaskT<A> (&mask)[D]) {
#pragma GCC unroll 7
  for (int b = 0; b < D; ++b) {
    const int64_t at = i + (b - D / 2) * q;
    mask[b] = lane_range<A>(-at, F - at);
  }
}

// All rows of `out`, of one image. taps [D * D][ld]: the q numbers of a tap, repeated to q + a
// vector. kTapRows: the products of a row of taps are summed before they are added to the rest.
template <class A, int D, bool kTapRows>
__attribute__((noinline)) void lane_stencil(LaneRows<const A> in, const A* taps, int64_t ld,
                                            LaneRows<A> out, int64_t F, int64_t q,
                                            bool accumulate) {
  constexpr int L = kLanes<A>, R = D / 2;
  constexpr bool kTapsInRegisters = D <= 3;
  using V = Vec<A>;
  for (int64_t i = 0; i < F; i += L) {
    const A* const tap = taps + i % q;
    const MaskT<A> inside = lane_range<A>(0, F - i);
    const bool whole = i >= R * q && i + L + R * q <= F;  // all lanes of all taps are inside
    MaskT<A> mask[D];
    column_masks<A, D>(i, F, q, mask);
    V held[kTapsInRegisters ? D * D : 1];
    if constexpr (kTapsInRegisters) {
#pragma GCC unroll 9
      for (int t = 0; t < D * D; ++t) held[t] = load(tap + t * ld);
    }
    // The tap of column b that multiplies the row being read in the sum acc[a].
    const auto tap_of = [&](int a, int b) __attribute__((always_inline)) {
      const int t = (D - 1 - a) * D + b;
      if constexpr (kTapsInRegisters)
        return held[t];
      else
        return load(tap + t * ld);
    };
    const auto rows = [&](auto full) __attribute__((always_inline)) {
      constexpr bool kFull = decltype(full)::value;
      V acc[D] = {};  // of rows r - R, ..., r + R
      for (int64_t r = out.begin - R; r < out.end + R; ++r) {
        if (r >= in.begin && r < in.end) {
          const A* const row = in.data + (r - in.begin) * F + i;
          const auto x = [&](int b) __attribute__((always_inline)) {
            const A* const p = row + (b - R) * q;
            return kFull ? load(p) : load_masked(p, mask[b]);
          };
          if constexpr (kTapRows) {
            V xs[D];
#pragma GCC unroll 7
            for (int b = 0; b < D; ++b) xs[b] = x(b);
#pragma GCC unroll 7
            for (int a = 0; a < D; ++a) {
              V sum{};
#pragma GCC unroll 7
              for (int b = 0; b < D; ++b) sum += tap_of(a, b) * xs[b];
              acc[a] += sum;
            }
          } else {
#pragma GCC unroll 7
            for (int b = 0; b < D; ++b) {
              const V xb = x(b);
#pragma GCC unroll 7
              for (int a = 0; a < D; ++a) acc[a] += tap_of(a, b) * xb;
            }
          }
        }
        if (r >= out.begin + R) {
          A* const o = out.data + (r - R - out.begin) * F + i;
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

// Rows h of [r0, r1) of some images; `dv` holds at least these. sums: [D * D][ld].
template <class A, int D>
__attribute__((noinline)) void lane_weight_grad(LaneRows<const A> in, LaneRows<const A> dv,
                                                int64_t r0, int64_t r1, int64_t images, int64_t F,
                                                int64_t q, A* sums, int64_t ld) {
  constexpr int L = kLanes<A>, R = D / 2;
  for (int64_t i = 0; i < F; i += L) {
    Vec<A> acc[D][D] = {};
    MaskT<A> mask[D];
    column_masks<A, D>(i, F, q, mask);
    const MaskT<A> inside = lane_range<A>(0, F - i);
    for (int64_t n = 0; n < images; ++n) {
      const A* const x = in.image(n, F).data + i - R * q;
      const A* const grad = dv.image(n, F).data + i;
      // Tap row a multiplies row r of the input with row r + R - a of dv.
      Vec<A> g[D] = {};
      for (int64_t r = r0 - 2 * R; r < r1 + R; ++r) {
#pragma GCC unroll 7
        for (int a = D - 1; a > 0; --a) g[a] = g[a - 1];
        g[0] = r + R >= r0 && r + R < r1 ? load_masked(grad + (r + R - dv.begin) * F, inside)
                                         : Vec<A>{};
        if (r < in.begin || r >= in.end || r < r0 - R) continue;
#pragma GCC unroll 7
        for (int b = 0; b < D; ++b) {
          const Vec<A> xb = load_masked(x + (r - in.begin) * F + b * q, mask[b]);
#pragma GCC unroll 7
          for (int a = 0; a < D; ++a) acc[a][b] += g[a] * xb;
        }
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

}  // namespace GHOST_ISA
}  // namespace ghost
