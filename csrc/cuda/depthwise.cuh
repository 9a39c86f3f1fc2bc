// The cheap operation: depthwise windows over the y tile in shared memory.
//
// A thread owns one pair of neighbouring channels and takes strips of kCudaStrip pixels of a row:
// for each row of taps the strip and its halo are read once into registers and used by all d taps
// of the row. Lanes run over the channel pairs first, so that a warp reads neighbouring words.
#pragma once

#include "cuda/tile.cuh"

namespace ghost::cuda {

inline constexpr int kStrip = kCudaStrip;

// acc[s][e] = sum over taps (i, j) of taps[i * kD + j] * y(row i, column s + j), channels e = 0, 1.
// y points at the pair's first channel, at the window's upper left position.
template <int kD, class T, class A>
__device__ __forceinline__ void depthwise_window(const T* y, int stride, int row_stride,
                                                 const A* taps, int tap_stride,
                                                 A (&acc)[kStrip][2]) {
#pragma unroll
  for (int s = 0; s < kStrip; ++s) acc[s][0] = acc[s][1] = A(0);
#pragma unroll 1
  for (int i = 0; i < kD; ++i) {
    A row[kStrip + kD - 1][2];
#pragma unroll
    for (int s = 0; s < kStrip + kD - 1; ++s) load_pair(y + i * row_stride + s * stride, row[s]);
#pragma unroll
    for (int j = 0; j < kD; ++j) {
      A w[2];
      load_pair(taps + (i * kD + j) * tap_stride, w);
#pragma unroll
      for (int s = 0; s < kStrip; ++s) {
        acc[s][0] = prim::fma(w[0], row[s + j][0], acc[s][0]);
        acc[s][1] = prim::fma(w[1], row[s + j][1], acc[s][1]);
      }
    }
  }
}

// The same with the size of the kernel known at run time: 1, 3, 5 or 7.
template <class T, class A>
__device__ __forceinline__ void depthwise_window(int d, const T* y, int stride, int row_stride,
                                                 const A* taps, int tap_stride,
                                                 A (&acc)[kStrip][2]) {
  switch (d) {
    case 1:
      return depthwise_window<1>(y, stride, row_stride, taps, tap_stride, acc);
    case 3:
      return depthwise_window<3>(y, stride, row_stride, taps, tap_stride, acc);
    case 5:
      return depthwise_window<5>(y, stride, row_stride, taps, tap_stride, acc);
    default:
      return depthwise_window<7>(y, stride, row_stride, taps, tap_stride, acc);
  }
}

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

// Taps of one ghost map for each channel of a block, in shared memory: [d * d][channels], zeros
// past `valid`. Channel i is ghost first + i * step of w2 [ghosts, d, d].
template <class A>
__device__ __forceinline__ void load_taps(A* taps, const ParamRef& w2, int64_t first, int step,
                                          int valid, int channels, int taps_count) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < channels * taps_count; i += kThreads) {
    const int c = i / taps_count, k = i - c * taps_count;
    taps[k * channels + c] =
        c < valid ? load_param<A>(w2, (first + int64_t(c) * step) * taps_count + k) : A(0);
  }
}

// v of one ghost map of every channel over the tile's own pixels: f(v, count, inner) for each strip
// of this thread; v[s] are its two channels at inner pixel inner + s, valid for s < count.
template <class T, class A, class F>
__device__ __forceinline__ void depthwise_tile(const T* y, const CudaTile& t, const Maps& p,
                                               const Tile& tile, const StripOwner& own,
                                               const A* taps, F&& f) {
  if (own.slot >= own.slots) return;
  const int strips_per_row = ceil_div(t.cols, kStrip), pad = p.d / 2;
  const FastDiv by_row(strips_per_row), by_image(t.rows);
  const int total = tile.images * t.rows * strips_per_row;
  const T* mine = y + 2 * own.pair;
  const int row_stride = t.pitch * t.y_stride;
#pragma unroll 1
  for (int s = own.slot; s < total; s += own.slots) {
    const int row = by_row(s), w = (s - row * strips_per_row) * kStrip;
    const int image = by_image(row), h = row - image * t.rows;
    const int count = min_of(tile.cols - w, kStrip);
    if (h >= tile.rows || count <= 0) continue;
    const int at = y_position(t, tile, image, tile.h0 + h - pad, tile.w0 + w - pad);
    A v[kStrip][2];
    const T* window = mine + at * t.y_stride;
    depthwise_window(p.d, window, t.y_stride, row_stride, taps + 2 * own.pair, t.channels, v);
    f(v, count, (image * tile.rows + h) * tile.cols + w);
  }
}

}  // namespace ghost::cuda
