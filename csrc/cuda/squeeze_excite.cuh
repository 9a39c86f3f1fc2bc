// The gate of a squeeze-and-excitation, for a few images a block.
//
//   mean[n][c]   = sum over pixels of x[n][c] / P           from x, or from given partial sums
//   hidden[n][r] = act(b_reduce[r] + sum over c of w_reduce[r][c] * mean[n][c])
//   gate[n][c]   = f(b_expand[c] + sum over r of w_expand[r][c] * hidden[n][r])
//
// c: channels, r: reduced channels, P: pixels of a map, f: sigmoid or hard sigmoid.
// Tile map: a block of 512 threads owns plan.images images; if these are cut into parts, some rows
// of hidden or some channels of the gate, in two launches. Means: in NHWC a thread owns a vector of
// channels and every slots-th pixel, in NCHW a warp owns four channels. Reduce: a warp owns a row
// of weights. Expand: a thread owns a vector of channels and every parts-th row. Partial sums are
// added through shared memory in a fixed order.
// Binding resource: x from DRAM for large batches, else the weights from L2 (64 bytes a clock of a
// multiprocessor), read once for all images of a block.
#pragma once

#include "core/cuda_plan_layers.h"
#include "cuda/depthwise_conv.cuh"

namespace ghost::cuda {

enum class GatePhase : int { kBoth, kReduce, kExpand };

template <class T>
struct GateParams {
  using A = Accumulator<T>;
  GatePlan plan;
  const T* x = nullptr;         // [n, c, h, w], or not read
  const A* sums = nullptr;      // [n, splits, c], or null
  const T* w_reduce = nullptr;  // [r, c]
  const A* b_reduce = nullptr;  // [r]
  const T* w_expand = nullptr;  // [r, c]
  const A* b_expand = nullptr;  // [c]
  A* hidden = nullptr;          // [n, r], between two launches
  T* gate = nullptr;            // [n, c]
  GatePhase phase = GatePhase::kBoth;
  int64_t n = 0;
  int32_t c = 0, r = 0, pixels = 0, splits = 0;
  int32_t x_bytes = 0, w_bytes = 0;  // widest aligned loads of channels
  Act act = Act::kNone;
  A slope = 0;
  bool sigmoid = false;
};

// Means of one image from its sums.
template <class T>
__device__ __forceinline__ void means_from_sums(const GateParams<T>& p, int64_t n,
                                                Accumulator<T>* means) {
  using A = Accumulator<T>;
  const A* const sums = p.sums + n * p.splits * p.c;
#pragma unroll 1
  for (int c = int(threadIdx.x); c < p.c; c += kGateThreads) {
    A total = A(0);
#pragma unroll 4
    for (int s = 0; s < p.splits; ++s) total += sums[int64_t(s) * p.c + c];
    means[c] = total / A(p.pixels);
  }
}

// Means of one image [pixels, c]. scratch: kGateThreads vectors. Ends with a sync_threads.
template <class T>
__device__ __forceinline__ void means_nhwc(const GateParams<T>& p, const T* x,
                                           Accumulator<T>* means, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  with_bytes<T>(p.x_bytes, [&](auto bytes) {
    constexpr int kVec = decltype(bytes)::value / int(sizeof(T));
    const int vecs = p.c / kVec, lanes = min_of(vecs, kGateThreads), slots = kGateThreads / lanes;
    const int slot = int(threadIdx.x) / lanes, lane = int(threadIdx.x) - slot * lanes;
#pragma unroll 1
    for (int first = 0; first < vecs; first += lanes) {
      const int own = first + lane;
      const bool mine = slot < slots && own < vecs;
      if (mine) {
        A sum[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) sum[e] = A(0);
#pragma unroll 4
        for (int i = slot; i < p.pixels; i += slots) {
          A v[kVec];
          load_numbers<kVec>(x + int64_t(i) * p.c + own * kVec, v);
#pragma unroll
          for (int e = 0; e < kVec; ++e) sum[e] += v[e];
        }
#pragma unroll
        for (int e = 0; e < kVec; ++e) scratch[(slot * lanes + lane) * kVec + e] = sum[e];
      }
      prim::sync_threads();
#pragma unroll 1
      for (int k = int(threadIdx.x); k < lanes * kVec; k += kGateThreads) {
        const int c = first * kVec + k;
        if (c >= p.c) break;
        A total = A(0);
#pragma unroll 1
        for (int s = 0; s < slots; ++s) total += scratch[s * lanes * kVec + k];
        means[c] = total / A(p.pixels);
      }
      prim::sync_threads();
    }
  });
}

// Means of one image [c, pixels]: a warp takes four channels at a time.
template <class T>
__device__ __forceinline__ void means_nchw(const GateParams<T>& p, const T* x,
                                           Accumulator<T>* means) {
  using A = Accumulator<T>;
  constexpr int kAtOnce = 4, kStep = kGateThreads / 32 * kAtOnce;
  const int lane = int(prim::lane());
#pragma unroll 1
  for (int first = int(prim::warp()) * kAtOnce; first < p.c; first += kStep) {
    const T* plane[kAtOnce];
    A sum[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      plane[k] = x + int64_t(min_of(first + k, p.c - 1)) * p.pixels;
      sum[k] = A(0);
    }
#pragma unroll 2
    for (int i = lane; i < p.pixels; i += 32) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum[k] += prim::to_float(plane[k][i]);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum[k] += prim::shuffle_xor(sum[k], mask);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (lane == k && first + k < p.c) means[first + k] = sum[k] / A(p.pixels);
  }
}

// hidden[i][r], r in [first, last), of the block's images: a warp a row of w_reduce.
template <class T>
__device__ __forceinline__ void reduce_channels(const GateParams<T>& p, int images, int first,
                                                int last, const Accumulator<T>* means,
                                                Accumulator<T>* hidden) {
  using A = Accumulator<T>;
  const int lane = int(prim::lane());
  with_bytes<T>(p.w_bytes, [&](auto bytes) {
    constexpr int kVec = decltype(bytes)::value / int(sizeof(T));
#pragma unroll 1
    for (int r = first + int(prim::warp()); r < last; r += kGateThreads / 32) {
      A dot[kGateImages];
#pragma unroll
      for (int i = 0; i < kGateImages; ++i) dot[i] = A(0);
#pragma unroll 2
      for (int c = lane * kVec; c < p.c; c += 32 * kVec) {
        A w[kVec];
        load_numbers<kVec>(p.w_reduce + int64_t(r) * p.c + c, w);
#pragma unroll
        for (int i = 0; i < kGateImages; ++i) {
          if (i >= images) break;
#pragma unroll
          for (int e = 0; e < kVec; ++e) dot[i] = prim::fma(w[e], means[i * p.c + c + e], dot[i]);
        }
      }
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) {
#pragma unroll
        for (int i = 0; i < kGateImages; ++i) dot[i] += prim::shuffle_xor(dot[i], mask);
      }
      const A bias = p.b_reduce[r];
#pragma unroll
      for (int i = 0; i < kGateImages; ++i) dot[i] += bias;
      activate(p.act, [&](int) { return p.slope; }, dot);
#pragma unroll
      for (int i = 0; i < kGateImages; ++i)
        if (lane == i && i < images) hidden[i * p.r + r] = dot[i];
    }
  });
}

// gate of the block's images, from n0 on, and of its channels [first, last). scratch:
// [threads that share a channel][images][channels].
template <class T>
__device__ __forceinline__ void expand_channels(const GateParams<T>& p, int64_t n0, int images,
                                                int first, int last, const Accumulator<T>* hidden,
                                                Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  int parts = 1;
  const int count = last - first;
  with_bytes<T>(p.w_bytes, [&](auto bytes) {
    constexpr int kVec = decltype(bytes)::value / int(sizeof(T));
    const int vecs = count / kVec, lanes = min_of(vecs, kGateThreads);
    parts = kGateThreads / lanes;
    const int part = int(threadIdx.x) / lanes, lane = int(threadIdx.x) - part * lanes;
    if (part >= parts) return;
#pragma unroll 1
    for (int own = lane; own < vecs; own += lanes) {
      A sum[kGateImages][kVec];
#pragma unroll
      for (int k = 0; k < kGateImages * kVec; ++k) sum[k / kVec][k % kVec] = A(0);
#pragma unroll 4
      for (int r = part; r < p.r; r += parts) {
        A w[kVec];
        load_numbers<kVec>(p.w_expand + int64_t(r) * p.c + first + own * kVec, w);
#pragma unroll
        for (int i = 0; i < kGateImages; ++i) {
          if (i >= images) break;
          const A h = hidden[i * p.r + r];
#pragma unroll
          for (int e = 0; e < kVec; ++e) sum[i][e] = prim::fma(w[e], h, sum[i][e]);
        }
      }
#pragma unroll
      for (int i = 0; i < kGateImages; ++i) {
        if (i >= images) break;
#pragma unroll
        for (int e = 0; e < kVec; ++e)
          scratch[(part * images + i) * count + own * kVec + e] = sum[i][e];
      }
    }
  });
  prim::sync_threads();
#pragma unroll 1
  for (int k = int(threadIdx.x); k < images * count; k += kGateThreads) {
    const int image = k / count, c = first + k - image * count;
    A v = p.b_expand[c];
#pragma unroll 1
    for (int s = 0; s < parts; ++s) v += scratch[s * images * count + k];
    v = p.sigmoid ? sigmoid(v) : clamp6(v + A(3)) / A(6);
    p.gate[(n0 + image) * p.c + c] = prim::from_float<T>(v);
  }
}

template <class T, Layout kLayout>
__global__ void __launch_bounds__(kGateThreads, 1)
    ghost_squeeze_excite_gate_kernel(const GateParams<T> params) {
  prim::wait_for_previous_kernel();
  using A = Accumulator<T>;
  GHOST_DYN_SHARED(unsigned char, shared);
  const GateParams<T>& p = params;
  const int group = int(blockIdx.x) / p.plan.parts, part = int(blockIdx.x) % p.plan.parts;
  const int64_t n0 = int64_t(group) * p.plan.images;
  const int images = p.n - n0 < p.plan.images ? int(p.n - n0) : p.plan.images;
  A* const means = reinterpret_cast<A*>(shared);
  A* const hidden = means + p.plan.images * p.c;
  A* const scratch = reinterpret_cast<A*>(shared + p.plan.scratch_at);
  if (p.phase != GatePhase::kExpand) {
#pragma unroll 1
    for (int i = 0; i < images; ++i) {
      const T* const x = p.x + (n0 + i) * (int64_t(p.c) * p.pixels);
      if (p.sums != nullptr)
        means_from_sums(p, n0 + i, means + i * p.c);
      else if constexpr (kLayout == Layout::kNHWC)
        means_nhwc(p, x, means + i * p.c, scratch);
      else
        means_nchw(p, x, means + i * p.c);
    }
    prim::sync_threads();
    const int rows = ceil_div(p.r, p.plan.parts), first = part * rows;
    reduce_channels(p, images, first, min_of(first + rows, p.r), means,
                    p.phase == GatePhase::kReduce ? p.hidden + n0 * p.r : hidden);
    if (p.phase == GatePhase::kReduce) return;
  } else {
#pragma unroll 1
    for (int k = int(threadIdx.x); k < images * p.r; k += kGateThreads)
      hidden[k] = p.hidden[n0 * p.r + k];
  }
  prim::sync_threads();
  // In whole vectors: a part has a multiple of 8 channels.
  const int channels = ceil_div(ceil_div(p.c, 8), p.plan.parts) * 8;
  const int first = part * channels, last = min_of(first + channels, p.c);
  if (first < last) expand_channels(p, n0, images, first, last, hidden, scratch);
}

}  // namespace ghost::cuda
