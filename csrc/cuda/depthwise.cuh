// The cheap operation, depthwise windows over the y tile in shared memory:
//
//   v[h][w] = start + sum over i, j < d of w2[i][j] * y[h + i - d / 2][w + j - d / 2]
//
// Tile map: a thread owns one pair of neighbouring channels and takes strips of kCudaStrip pixels,
// of two rows if the registers allow it: each row of y with its halo is read once and used by
// all d taps of a row, for both rows of v. Lanes run over the channel pairs first, so that a warp
// reads neighbouring words.
// Binding resource: multiply-adds and reads of shared memory.
//
// Products and sums are float32 for the 16-bit types as well: before sm_100 there is no 2-wide
// arithmetic that keeps their digits, only 2-wide conversions and comparisons.
#pragma once

#include "cuda/tile.cuh"

namespace ghost::cuda {

inline constexpr int kStrip = kCudaStrip;
inline constexpr int kStripValues = 2 * kStrip;  // of a pair of channels

// Rows of a thread's windows: two if the register budget allows it.
template <class T>
inline constexpr int kWindowRows = sizeof(T) == 2 ? 2 : 1;

// A strip of v for a pair of channels.
template <class A>
using Strip = A[kStrip][2];

// acc[s] += sum over j of taps[j] * row[s + j], for both channels. row: a strip with its halo.
template <int kD, int kStep, class A>
__device__ __forceinline__ void add_row(const A (&row)[kStrip + kD - 1][2], const A* taps,
                                        Strip<A>& acc) {
#pragma unroll
  for (int j = 0; j < kD; ++j) {
    A w[2];
    load_pair(taps + 2 * j * kStep, w);
#pragma unroll
    for (int s = 0; s < kStrip; ++s) {
      acc[s][0] = prim::fma(w[0], row[s + j][0], acc[s][0]);
      acc[s][1] = prim::fma(w[1], row[s + j][1], acc[s][1]);
    }
  }
}

// acc[s][e] += sum over taps (i, j) of w(i, j) * y(row i, column s + j), channels e = 0, 1. y
// points at the pair's first channel, at the window's upper left position. The pair's taps follow
// each other (load_taps); kReversed takes them from the last to the first.
template <int kD, bool kReversed, class T, class A>
__device__ __forceinline__ void depthwise_window(const T* y, int stride, int row_stride,
                                                 const A* taps, Strip<A>& acc) {
  constexpr int kStep = kReversed ? -1 : 1;
  if (kReversed) taps += 2 * (kD * kD - 1);
  constexpr int kUnroll = kD <= 3 ? kD : 1;
#pragma unroll kUnroll
  for (int i = 0; i < kD; ++i) {
    A row[kStrip + kD - 1][2];
#pragma unroll
    for (int s = 0; s < kStrip + kD - 1; ++s) load_pair(y + i * row_stride + s * stride, row[s]);
    add_row<kD, kStep>(row, taps + 2 * i * kD * kStep, acc);
  }
}

// depthwise_window for a size d of the kernel that is known at run time: 1, 3, 5 or 7.
template <bool kReversed = false, class T, class A>
__device__ __forceinline__ void depthwise_window(int d, const T* y, int stride, int row_stride,
                                                 const A* taps, Strip<A>& acc) {
  switch (d) {
    case 1:
      return depthwise_window<1, kReversed>(y, stride, row_stride, taps, acc);
    case 3:
      return depthwise_window<3, kReversed>(y, stride, row_stride, taps, acc);
    case 5:
      return depthwise_window<5, kReversed>(y, stride, row_stride, taps, acc);
    default:
      return depthwise_window<7, kReversed>(y, stride, row_stride, taps, acc);
  }
}

// Two windows, one below the other: acc[0] of the rows from y on and, if `both`, acc[1] of the rows
// from the next row on. A row is read once for both windows.
template <int kD, class T, class A>
__device__ __forceinline__ void depthwise_two(const T* y, int stride, int row_stride, const A* taps,
                                              bool both, Strip<A> (&acc)[2]) {
  constexpr int kUnroll = kD <= 3 ? kD + 1 : 1;
#pragma unroll kUnroll
  for (int i = 0; i <= kD; ++i) {
    if (i == kD && !both) break;
    A row[kStrip + kD - 1][2];
#pragma unroll
    for (int s = 0; s < kStrip + kD - 1; ++s) load_pair(y + i * row_stride + s * stride, row[s]);
    if (i < kD) add_row<kD, 1>(row, taps + 2 * i * kD, acc[0]);
    if (i > 0 && both) add_row<kD, 1>(row, taps + 2 * (i - 1) * kD, acc[1]);
  }
}
// kRows windows, one or two, of size kD, or of size d if kD is 0.
template <int kRows, int kD, class T, class A>
__device__ __forceinline__ void depthwise_rows(int d, const T* y, int stride, int row_stride,
                                               const A* taps, bool both, Strip<A> (&acc)[kRows]) {
  if constexpr (kRows == 2 && kD > 0) {
    depthwise_two<kD>(y, stride, row_stride, taps, both, acc);
  } else if constexpr (kRows == 1) {
    depthwise_window(d, y, stride, row_stride, taps, acc[0]);
  } else {
    switch (d) {
      case 1:
        return depthwise_two<1>(y, stride, row_stride, taps, both, acc);
      case 3:
        return depthwise_two<3>(y, stride, row_stride, taps, both, acc);
      case 5:
        return depthwise_two<5>(y, stride, row_stride, taps, both, acc);
      default:
        return depthwise_two<7>(y, stride, row_stride, taps, both, acc);
    }
  }
}

// The windows of a tile: strips side by side in a row, groups of t.window_rows rows in an image.
struct WindowGrid {
  FastDiv by_row, by_group;

  WindowGrid() = default;
  explicit WindowGrid(const CudaTile& t)
      : by_row((t.cols + kStrip - 1) / kStrip),
        by_group((t.rows + t.window_rows - 1) / t.window_rows) {}
};

// How the threads of a block share pairs of channels and strips; the same for all its tiles.
struct StripOwner {
  int pairs, slots, pair, slot;

  __device__ __forceinline__ StripOwner(int valid_channels)
      : pairs((valid_channels + 1) / 2), slots(kThreads / pairs) {
    const int thread = prim::opaque(int(threadIdx.x));
    slot = thread / pairs;
    pair = thread - slot * pairs;
  }
};

// Offset in shared memory of tap k of a block's channel c. The taps of a pair of channels follow
// each other, so that the windows read them at fixed distances.
__device__ __forceinline__ int tap_at(int c, int k, int taps_count) {
  return (c >> 1) * (2 * taps_count) + 2 * k + (c & 1);
}

// Taps of one ghost map for each channel of a block, in shared memory, zeros past `valid`, times
// scale [channels] (null: 1). Channel i of the block has ghost first + i * step of w2 [g, d, d], a
// ParamRef or a const A*.
template <class A, class Taps>
__device__ __forceinline__ void load_taps(A* taps, const Taps& w2, int64_t first, int step,
                                          int valid, int channels, int taps_count, const A* scale) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < channels * taps_count; i += kThreads) {
    const int c = i / taps_count, k = i - c * taps_count;
    A tap = A(0);
    if (c < valid) tap = load_param<A>(w2, (first + int64_t(c) * step) * taps_count + k);
    taps[tap_at(c, k, taps_count)] = scale != nullptr ? tap * scale[c] : tap;
  }
}

// v of one ghost map of every channel over the tile's own pixels, with start [channels] (nullptr:
// 0) as the start value of the sums. Calls f(v, count, inner, rows) for kRows strips of this
// thread, one below the other; v[r][s] are its two channels at inner pixel
// inner + r * tile.cols + s, valid for s < count and r < rows.
// kD: the size of the kernel, or 0 if it is known only at run time.
template <int kRows, int kD, class T, class A, class Start, class F>
__device__ __forceinline__ void depthwise_tile(const T* y, const CudaTile& t, const Maps& p,
                                               const WindowGrid& windows, const Tile& tile,
                                               const StripOwner& own, const A* taps, Start start,
                                               F&& f) {
  if (own.slot >= own.slots) return;
  const int d = kD > 0 ? kD : p.d, pad = d / 2;
  const int total = tile.images * windows.by_group.divisor * windows.by_row.divisor;
#pragma unroll 1
  for (int s = own.slot; s < total; s += own.slots) {
    int w = s, h = windows.by_row.split(w);
    const int image = windows.by_group.split(h);
    w *= kStrip;
    h *= kRows;
    const int count = min_of(tile.cols - w, kStrip), rows = min_of(tile.rows - h, kRows);
    if (rows <= 0 || count <= 0) continue;
    const int at = y_position(t, tile, image, tile.h0 + h - pad, tile.w0 + w - pad);
    A first[2] = {A(0), A(0)};
    if constexpr (!std::is_null_pointer_v<Start>) load_pair(start + 2 * own.pair, first);
    Strip<A> v[kRows];
#pragma unroll
    for (int i = 0; i < 2 * kRows * kStrip; ++i)
      v[i / kStripValues][i / 2 % kStrip][i & 1] = first[i & 1];
    depthwise_rows<kRows, kD>(d, y + 2 * own.pair + at * t.y_stride, t.y_stride,
                              t.pitch * t.y_stride, taps + tap_at(2 * own.pair, 0, d * d), rows > 1,
                              v);
    f(v, count, (image * tile.rows + h) * tile.cols + w, rows);
  }
}

}  // namespace ghost::cuda
