// A depthwise convolution with its batch norm folded in, and an activation: one pass over x.
//
//   out[n][c][h][w] = act(shift[c] + sum over i, j < d of
//                         weight[i][j][c] * x[n][c][h * s + i - d / 2][w * s + j - d / 2])
//   sums[n][part][c] = sum of out[n][c] over the pixels of a part of the image
//
// Tile map: a block of 256 threads owns one image or a part of its strips, and a block of channels.
// NHWC: a thread owns a vector of neighbouring channels and computes strips of four, two or one
// pixels of a row; a pixel of x is loaded once a row of taps and used by all pixels of the strip.
// Neighbouring lanes have neighbouring vectors. NCHW (and float64): a thread owns one channel and
// computes one pixel at a time; neighbouring lanes have neighbouring pixels. Taps come from L1.
// Sums are added in a fixed order.
// Binding resource: DRAM bandwidth, x once and out once; rows that strips share come from L1 and
// L2.
#pragma once

#include "core/cuda_plan_layers.h"
#include "cuda/tile.cuh"

namespace ghost::cuda {

template <int kD>
inline constexpr int kStripOf = depthwise_strip(kD);

template <class T>
struct DepthwiseParams {
  DepthwisePlan plan;
  const T* x = nullptr;                    // [n, c, h, w]
  const Accumulator<T>* weight = nullptr;  // [d * d, c]
  const Accumulator<T>* shift = nullptr;   // [c]
  T* out = nullptr;                        // [n, c, out_h, out_w]
  Accumulator<T>* sums = nullptr;          // [n, splits, c], or null
  int32_t c = 0, h = 0, w = 0, out_h = 0, out_w = 0, d = 3, stride = 1;
  Act act = Act::kNone;
  Accumulator<T> slope = 0;
};

// kCount neighbouring elements as numbers of the compute type.
template <int kCount, class T>
__device__ __forceinline__ void load_numbers(const T* p, Accumulator<T> (&v)[kCount]) {
  const Vec<T, kCount> raw = load_vec<T, kCount>(p);
#pragma unroll
  for (int e = 0; e < kCount; ++e) v[e] = prim::to_float(raw.v[e]);
}
// Per-channel parameters, in pieces of at most 16 bytes.
template <int kCount, class A>
__device__ __forceinline__ void load_parameters(const A* p, A (&v)[kCount]) {
  constexpr int kMost = 16 / int(sizeof(A)), kPiece = kCount < kMost ? kCount : kMost;
#pragma unroll
  for (int e = 0; e < kCount; e += kPiece) {
    const Vec<A, kPiece> piece = load_vec<A, kPiece>(p + e);
#pragma unroll
    for (int k = 0; k < kPiece; ++k) v[e + k] = piece.v[k];
  }
}

// A thread's share: image n, channels [channel, channel + vec), and every slots-th of the block's
// strips [first, last).
struct DepthwisePlace {
  int64_t n;
  int split, lane, slot, channel;  // channel: the thread's first, c if it has none
  int first, last;                 // strips of the block

  __device__ __forceinline__ DepthwisePlace(const DepthwisePlan& p, int channels,
                                            bool pixels_first) {
    const int64_t block = blockIdx.x, rest = block / p.channel_blocks;
    const int channel_block = int(block - rest * p.channel_blocks), thread = int(threadIdx.x);
    n = rest / p.splits;
    split = int(rest - n * p.splits);
    lane = pixels_first ? thread / p.slots : thread % p.lanes;
    slot = pixels_first ? thread % p.slots : thread / p.lanes;
    channel = (channel_block * p.lanes + lane) * p.vec;
    if (lane >= p.lanes || slot >= p.slots || channel >= channels) channel = channels;
    const int each = ceil_div(p.strips, p.splits);
    first = split * each;
    last = min_of(first + each, p.strips);
  }
};

// Writes the block's sums: those of the threads of a channel are added in the order of their slots.
template <int kVec, class T>
__device__ __forceinline__ void store_sums(const DepthwiseParams<T>& p, const DepthwisePlace& place,
                                           const Accumulator<T> (&sum)[kVec],
                                           Accumulator<T>* shared) {
  using A = Accumulator<T>;
  const bool mine = place.channel < p.c;
  const int width = p.plan.lanes * kVec;
  if (mine) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) shared[place.slot * width + place.lane * kVec + e] = sum[e];
  }
  prim::sync_threads();
  if (!mine || place.slot != 0) return;
  A* const to = p.sums + (place.n * p.plan.splits + place.split) * p.c + place.channel;
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    A total = A(0);
#pragma unroll 1
    for (int s = 0; s < p.plan.slots; ++s) total += shared[s * width + place.lane * kVec + e];
    to[e] = total;
  }
}

// One row of taps over a strip: acc[s] += sum over j of taps[j] * row[column + s * kStride + j].
// Columns outside [0, width) are zeros.
template <int kD, int kStride, int kVec, class T, class A>
__device__ __forceinline__ void depthwise_row(const T* row, int column, int width, int channels,
                                              const A* weight, A (&acc)[kStripOf<kD>][kVec]) {
  A taps[kD][kVec];
#pragma unroll
  for (int j = 0; j < kD; ++j) load_parameters<kVec>(weight + j * channels, taps[j]);
#pragma unroll
  for (int k = 0; k < (kStripOf<kD> - 1) * kStride + kD; ++k) {
    A v[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) v[e] = A(0);
    const int at = column + k;
    if (at >= 0 && at < width) load_numbers<kVec>(row + int64_t(at) * channels, v);
#pragma unroll
    for (int s = 0; s < kStripOf<kD>; ++s) {
      const int j = k - s * kStride;
      if (j < 0 || j >= kD) continue;
#pragma unroll
      for (int e = 0; e < kVec; ++e) acc[s][e] = prim::fma(taps[j][e], v[e], acc[s][e]);
    }
  }
}

// NHWC, by strips.
template <int kD, int kStride, int kVec, class T>
__device__ __forceinline__ void depthwise_strips(const DepthwiseParams<T>& p,
                                                 Accumulator<T>* shared) {
  using A = Accumulator<T>;
  constexpr int kStrip = kStripOf<kD>, kValues = kStrip * kVec;
  const DepthwisePlace place(p.plan, p.c, false);
  A sum[kVec];
#pragma unroll
  for (int e = 0; e < kVec; ++e) sum[e] = A(0);
  if (place.channel < p.c) {
    const T* const x = p.x + place.n * (int64_t(p.h) * p.w * p.c) + place.channel;
    T* const out = p.out + place.n * (int64_t(p.out_h) * p.out_w * p.c) + place.channel;
    const A* const weight = p.weight + place.channel;
#pragma unroll 1
    for (int strip = place.first + place.slot; strip < place.last; strip += p.plan.slots) {
      const int h = strip / p.plan.per_row, w = (strip - h * p.plan.per_row) * kStrip;
      A acc[kStrip][kVec];
      load_parameters<kVec>(p.shift + place.channel, acc[0]);
#pragma unroll
      for (int i = kVec; i < kValues; ++i) acc[i / kVec][i % kVec] = acc[0][i % kVec];
      constexpr int kUnroll = kD <= 3 ? kD : 1;
#pragma unroll kUnroll
      for (int i = 0; i < kD; ++i) {
        const int row = h * kStride + i - kD / 2;
        if (row >= 0 && row < p.h)
          depthwise_row<kD, kStride, kVec>(x + int64_t(row) * p.w * p.c, w * kStride - kD / 2, p.w,
                                           p.c, weight + i * kD * p.c, acc);
      }
      A(&v)[kValues] = reinterpret_cast<A(&)[kValues]>(acc);
      activate(p.act, [&](int) { return p.slope; }, v);
      T* const to = out + (int64_t(h) * p.out_w + w) * p.c;
#pragma unroll
      for (int s = 0; s < kStrip; ++s) {
        if (w + s >= p.out_w) break;
        Vec<T, kVec> rounded;
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          rounded.v[e] = prim::from_float<T>(acc[s][e]);
          sum[e] += prim::to_float(rounded.v[e]);
        }
        store_vec<T, kVec>(to + int64_t(s) * p.c, rounded);
      }
    }
  }
  if (p.sums != nullptr) store_sums<kVec>(p, place, sum, shared);
}

// Any layout, size and stride, by pixels.
template <Layout kLayout, class T>
__device__ __forceinline__ void depthwise_pixels(const DepthwiseParams<T>& p,
                                                 Accumulator<T>* shared) {
  using A = Accumulator<T>;
  constexpr bool kNhwc = kLayout == Layout::kNHWC;
  const DepthwisePlace place(p.plan, p.c, !kNhwc);
  A sum[1] = {A(0)};
  if (place.channel < p.c) {
    // Elements from one pixel to the next, and from one channel to the next in NCHW.
    const int64_t pixel = kNhwc ? p.c : 1, plane = int64_t(p.h) * p.w;
    const int64_t out_plane = int64_t(p.out_h) * p.out_w;
    const T* const x = p.x + place.n * p.c * plane + place.channel * (kNhwc ? 1 : plane);
    T* const out = p.out + place.n * p.c * out_plane + place.channel * (kNhwc ? 1 : out_plane);
    const A* const weight = p.weight + place.channel;
    const A shift = p.shift[place.channel];
    const int pad = p.d / 2;
#pragma unroll 1
    for (int strip = place.first + place.slot; strip < place.last; strip += p.plan.slots) {
      const int h = strip / p.out_w, w = strip - h * p.out_w;
      const int top = h * p.stride - pad, left = w * p.stride - pad;
      A v[1] = {shift};
#pragma unroll 1
      for (int i = max_of(-top, 0); i < min_of(p.d, p.h - top); ++i) {
        const T* const row = x + (int64_t(top + i) * p.w + left) * pixel;
#pragma unroll 2
        for (int j = max_of(-left, 0); j < min_of(p.d, p.w - left); ++j)
          v[0] = prim::fma(weight[(i * p.d + j) * p.c], prim::to_float(row[j * pixel]), v[0]);
      }
      activate(p.act, [&](int) { return p.slope; }, v);
      const T rounded = prim::from_float<T>(v[0]);
      sum[0] += prim::to_float(rounded);
      out[strip * pixel] = rounded;
    }
  }
  if (p.sums != nullptr) store_sums<1>(p, place, sum, shared);
}

// kD: the size of the kernel; 0: the kernel by pixels, for any size and stride.
template <class T, Layout kLayout, int kD, int kStride>
__global__ void __launch_bounds__(kThreads, sizeof(T) < 8 ? 2 : 1)
    ghost_depthwise_conv_kernel(const DepthwiseParams<T> params) {
  prim::wait_for_previous_kernel();
  using A = Accumulator<T>;
  GHOST_DYN_SHARED(A, shared);
  if constexpr (kD == 0) {
    depthwise_pixels<kLayout>(params, shared);
  } else {
    with_bytes<T>(params.plan.vec * int(sizeof(T)), [&](auto bytes) {
      constexpr int kVec = decltype(bytes)::value / int(sizeof(T));
      depthwise_strips<kD, kStride, kVec>(params, shared);
    });
  }
}

}  // namespace ghost::cuda
