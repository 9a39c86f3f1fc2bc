// The first convolution of a network, 3x3 with few input channels, batch norm folded in, and its
// activation: one pass over x.
//
//   out[n][o][h][w] = act(shift[o] + sum over i, j < 3 and c of
//                         weight[i][j][c][o] * x[n][c][h * s + i - 1][w * s + j - 1])
//
// Tile map: a block of 256 threads owns a part of one image's pixels and all output channels. A
// thread owns a vector of output channels and four pixels; neighbouring lanes have neighbouring
// vectors of one pixel, then of the next pixel, so that a warp reads a row of x. x and out may have
// different layouts. Weights come from L1, the same for all lanes with the same vector.
// Binding resource: multiply-adds; DRAM bandwidth is close for 3 input and 16 output channels.
#pragma once

#include "core/cuda_plan_layers.h"
#include "cuda/depthwise_conv.cuh"

namespace ghost::cuda {

template <class T>
struct StemParams {
  StemPlan plan;
  const T* x = nullptr;                    // [n, c, h, w]
  const Accumulator<T>* weight = nullptr;  // [3, 3, c, o]
  const Accumulator<T>* shift = nullptr;   // [o]
  T* out = nullptr;                        // [n, o, out_h, out_w]
  int32_t c = 0, o = 0, h = 0, w = 0, out_h = 0, out_w = 0, stride = 2;
  bool x_nhwc = false, out_nhwc = false;
  Act act = Act::kNone;
  Accumulator<T> slope = 0;
};

template <int kVec, class T>
__device__ __forceinline__ void stem_pixels(const StemParams<T>& p) {
  using A = Accumulator<T>;
  const int lanes = p.plan.lanes, slots = p.plan.slots;
  const int slot = int(threadIdx.x) / lanes, o = (int(threadIdx.x) - slot * lanes) * kVec;
  if (slot >= slots) return;
  const int64_t block = blockIdx.x, n = block / p.plan.splits;
  const int pixels = p.out_h * p.out_w;
  const int first = int(block - n * p.plan.splits) * slots * kStemPixels + slot;
  const int plane = p.h * p.w, pitch = p.x_nhwc ? p.c : 1, channel = p.x_nhwc ? 1 : plane;
  const T* const x = p.x + n * p.c * int64_t(plane);
  A acc[kStemPixels][kVec];
  load_parameters<kVec>(p.shift + o, acc[0]);
#pragma unroll
  for (int i = kVec; i < kStemPixels * kVec; ++i) acc[i / kVec][i % kVec] = acc[0][i % kVec];
  int top[kStemPixels], left[kStemPixels];
#pragma unroll
  for (int k = 0; k < kStemPixels; ++k) {
    const int pixel = min_of(first + k * slots, pixels - 1), row = pixel / p.out_w;
    top[k] = row * p.stride - 1;
    left[k] = (pixel - row * p.out_w) * p.stride - 1;
  }
#pragma unroll 1
  for (int tap = 0; tap < 9; ++tap) {
    const int i = tap / 3, j = tap - i * 3;
    int at[kStemPixels];  // pixel of x, negative outside
#pragma unroll
    for (int k = 0; k < kStemPixels; ++k) {
      const int row = top[k] + i, column = left[k] + j;
      const bool inside = row >= 0 && row < p.h && column >= 0 && column < p.w;
      at[k] = inside ? (row * p.w + column) * pitch : -1;
    }
    const A* const weight = p.weight + tap * p.c * p.o + o;
#pragma unroll 1
    for (int c = 0; c < p.c; ++c) {
      A w[kVec], v[kStemPixels];
      load_parameters<kVec>(weight + c * p.o, w);
#pragma unroll
      for (int k = 0; k < kStemPixels; ++k)
        v[k] = at[k] >= 0 ? prim::to_float(x[at[k] + int64_t(c) * channel]) : A(0);
#pragma unroll
      for (int k = 0; k < kStemPixels; ++k) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) acc[k][e] = prim::fma(w[e], v[k], acc[k][e]);
      }
    }
  }
  activate(p.act, [&](int) { return p.slope; }, reinterpret_cast<A(&)[kStemPixels * kVec]>(acc));
  T* const out = p.out + n * p.o * int64_t(pixels);
#pragma unroll
  for (int k = 0; k < kStemPixels; ++k) {
    const int pixel = first + k * slots;
    if (pixel >= pixels) break;
    Vec<T, kVec> rounded;
#pragma unroll
    for (int e = 0; e < kVec; ++e) rounded.v[e] = prim::from_float<T>(acc[k][e]);
    if (p.out_nhwc) {
      store_vec<T, kVec>(out + int64_t(pixel) * p.o + o, rounded);
    } else {
#pragma unroll
      for (int e = 0; e < kVec; ++e) out[int64_t(o + e) * pixels + pixel] = rounded.v[e];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) < 8 ? 2 : 1)
    ghost_conv_stem_kernel(const StemParams<T> params) {
  prim::wait_for_previous_kernel();
  if constexpr (sizeof(T) == 2) {
    if (params.plan.vec == 8) return stem_pixels<8>(params);
  }
  if constexpr (sizeof(T) <= 4) {
    if (params.plan.vec == 4) return stem_pixels<4>(params);
  }
  stem_pixels<2>(params);
}

}  // namespace ghost::cuda
