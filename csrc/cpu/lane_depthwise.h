// Depthwise rows with channels along the lanes: NHWC.
//
//   out[h][w][c] = act(shift[c] + sum_{i,j} taps[i][j][c] * x[h * s + i - k/2][w * s + j - k/2][c])
//
// Tile map: one vector of channels slides along the k rows of x under a row of out; every pixel is
// loaded once per row and feeds all sums that it belongs to. Columns outside the image are never
// visited, rows outside are zeros. Binding resource: FMA ports.
#pragma once

#include <algorithm>

#include "cpu/activation.h"
#include "cpu/lanes.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// Rows [row0, row1) of out.
template <class T>
struct LaneDepthwise {
  using A = ComputeOf<T>;
  const T* x;                  // [height][width][ld_x], from channel 0
  T* out;                      // [out_height][out_width][ld_out], from channel 0
  int64_t ld_x, ld_out, ring;  // row r of x and out is at r % ring
  int64_t row0, row1, height, width, channels;
  const A* taps;  // [k * k][ld_taps]
  int64_t ld_taps;
  const A* shift;  // [channels]
  Activation act;
};

// The rows for channels [c, c + n); kFull: n is a whole vector.
template <class T, int K, int S, bool kFull>
GHOST_INLINE void lane_slide(const LaneDepthwise<T>& s, int64_t c, int64_t n) {
  using A = ComputeOf<T>;
  using V = Vec<A>;
  constexpr int R = K / 2, kLast = (S - 1 + R) / S, kSums = kLast + R / S + 1;
  constexpr bool kSame = sizeof(T) == sizeof(A);
  static constexpr T kZeros[kLanes<A>] = {};
  auto get = [n](const A* p)
                 __attribute__((always_inline)) { return kFull ? load(p) : load_n(p, n); };
  V tap[K][K];
#pragma GCC unroll 7
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < K; ++j) tap[i][j] = get(s.taps + (i * K + j) * s.ld_taps + c);
  const V shift = get(s.shift + c);
  const bool with_relu = s.act.act == Act::kReLU;
  const int64_t width = s.width, out_width = (width - 1) / S + 1, ld_out = s.ld_out;
  const auto at = [&](int64_t r) { return r < s.ring ? r : r % s.ring; };
  T* out = nullptr;
  auto finish = [&](V r) __attribute__((always_inline)) {
    if (with_relu)
      r = relu(r);
    else if (!kSame)
      activate_vectors<A, 1>(s.act, &r);
    if (kFull)
      Storage<T>::store(out, r);
    else if constexpr (kSame)
      store_first(out, r, n);
    else
      Storage<T>::store_n(out, r, n);
    out += ld_out;
  };
  for (int64_t row = s.row0; row < s.row1; ++row) {
    const T* x[K];
    int64_t step[K];
#pragma GCC unroll 7
    for (int i = 0; i < K; ++i) {
      const int64_t r = row * S + i - R;
      const bool inside = r >= 0 && r < s.height;
      x[i] = inside ? s.x + at(r) * width * s.ld_x + c : kZeros;
      step[i] = inside ? s.ld_x : 0;
    }
    out = s.out + at(row) * out_width * ld_out + c;
    // While columns [w * S, (w + 1) * S) are read, sum[a] belongs to output column w - R / S + a.
    V sum[kSums];
#pragma GCC unroll 7
    for (int a = 0; a < kSums; ++a) sum[a] = shift;
    for (int64_t w = 0; w < out_width; ++w) {
#pragma GCC unroll 2
      for (int u = 0; u < S; ++u) {
        if (u > 0 && w * S + u >= width) break;
#pragma GCC unroll 7
        for (int i = 0; i < K; ++i) {
          V v = kFull ? Storage<T>::load(x[i]) : Storage<T>::load_n(x[i], n);
          keep(v);
          x[i] += step[i];
#pragma GCC unroll 7
          for (int a = 0; a < kSums; ++a) {
            const int j = u + R - S * (a - R / S);
            if (j >= 0 && j < K) sum[a] += tap[i][j] * v;
          }
        }
      }
      if (w >= R / S) finish(sum[0]);
#pragma GCC unroll 7
      for (int a = 0; a + 1 < kSums; ++a) sum[a] = sum[a + 1];
      sum[kSums - 1] = shift;
    }
#pragma GCC unroll 3
    for (int a = 0; a < R / S; ++a)
      if (out_width - R / S + a >= 0) finish(sum[a]);
    if constexpr (kSame) {
      if (!with_relu && s.act.act != Act::kNone)
        activate_pixels(s.act, out - out_width * ld_out, ld_out, out_width, n);
    }
  }
}

template <class T, int K, int S>
__attribute__((noinline)) void lane_depthwise(const LaneDepthwise<T>& s) {
  constexpr int L = kLanes<ComputeOf<T>>;
  const int64_t C = s.channels;
  if (C < L) return lane_slide<T, K, S, false>(s, 0, C);
  // The last vector ends at the last channel.
  for (int64_t c = 0; c < C; c += L) lane_slide<T, K, S, true>(s, std::min(c, C - L), L);
}
template <class T, int S = 1>
void lane_depthwise(int64_t k, const LaneDepthwise<T>& s) {
  with_constant<1, 3, 5, 7>(k, [&](auto size) { lane_depthwise<T, decltype(size)::value, S>(s); });
}

}  // namespace GHOST_ISA
}  // namespace ghost
