// Partial statistics of v = w2 (*) y, y = act1(bn1(w1 * x)): the second pass of training.
//
// The tile and its y as in apply.cuh, the depthwise part likewise; instead of z a thread keeps the
// mean and squared deviations of its pair of channels, in shared memory between tiles.
// Binding resource: reading x (DRAM) for small C, the product for wide ones.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/stats.cuh"

namespace ghost::cuda {

template <class T>
struct CheapStatsParams {
  CudaTile tile;
  Maps maps;
  WindowGrid windows;
  Intrinsic<T> intrinsic;
  ParamRef w2;                        // [m * (ratio - 1), d, d]
  Partials<Accumulator<T>> partials;  // splits = tile.slots
};

// Of ghost j and thread i, in shared memory: means [j][2 i + {0, 1}], then squared deviations
// likewise; then the number of values of each slot.
template <class A>
struct Moments {
  A *mean, *m2, *count;

  __device__ __forceinline__ Moments(const CudaTile& t, unsigned char* shared)
      : mean(reinterpret_cast<A*>(shared + t.moments_at)),
        m2(mean + t.ghosts * 2 * kThreads),
        count(m2 + t.ghosts * 2 * kThreads) {}
};

// Adds the values of one tile, after `seen` of each channel of this thread; returns how many it has
// seen then.
template <class T>
__device__ __forceinline__ int add_tile(const CheapStatsParams<T>& params, int index, int seen,
                                        unsigned char* shared) {
  using A = Accumulator<T>;
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  const Place place(t, p);
  const Tile tile = locate_tile(t, p, prim::opaque(index));
  const StripOwner own(place.valid);
  const Moments<A> moments(t, shared);
  const T* y = reinterpret_cast<const T*>(shared + t.y_at);
  const A* taps = reinterpret_cast<const A*>(shared + t.taps_at);
  int n = seen;
#pragma unroll 1
  for (int j = 0; j < place.ghosts; ++j) {
    n = seen;
    A mean[2], m2[2];
    const int mine = 2 * (j * kThreads + prim::opaque(int(threadIdx.x)));
    load_pair(moments.mean + mine, mean);
    load_pair(moments.m2 + mine, m2);
    depthwise_tile<1, 0>(y, t, p, params.windows, tile, own, taps + j * p.d * p.d * t.channels,
                         nullptr, [&](Strip<A>(&v)[1], int count, int, int) {
                           const A share = A(count) / A(n + count);
#pragma unroll
                           for (int e = 0; e < 2; ++e) {
                             A values[kStrip];
#pragma unroll
                             for (int s = 0; s < kStrip; ++s) values[s] = v[0][s][e];
                             add_values(values, count, A(n), share, mean[e], m2[e]);
                           }
                           n += count;
                         });
    store_pair(moments.mean + mine, mean[0], mean[1]);
    store_pair(moments.m2 + mine, m2[0], m2[1]);
  }
  return n;
}

template <class P, Layout kLayout, int kChannels, Scope kScope>
__global__ void __launch_bounds__(kThreads, sizeof(typename P::A) == 8 ? 1 : 2)
    ghost_cheap_stats_kernel(const CheapStatsParams<typename P::T> params) {
  using T = typename P::T;
  using A = typename P::A;
  GHOST_DYN_SHARED(unsigned char, shared);
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  const Moments<A> moments(t, shared);
  {
    const Place place(t, p);
    const int step = p.ratio - 1, taps_count = p.d * p.d;
    const int64_t first_ghost = int64_t(place.c0) * step + place.ghost0;
    A* taps = reinterpret_cast<A*>(shared + t.taps_at);
    load_intrinsic(t, place, params.intrinsic, place.slot == 0 && place.writes_y, shared);
    for (int j = 0; j < place.ghosts; ++j) {
      load_taps(taps + j * taps_count * t.channels, params.w2, first_ghost + j, step, place.valid,
                t.channels, taps_count, static_cast<const A*>(nullptr));
      const int mine = 2 * (j * kThreads + int(threadIdx.x));
      store_pair(moments.mean + mine, A(0), A(0));
      store_pair(moments.m2 + mine, A(0), A(0));
    }
  }

  int seen = 0;
#pragma unroll 1
  for (int index = Place(t, p).slot; index < int(t.tiles); index += t.slots) {
    make_y_tile<P, kLayout, kScope, kChannels, 8>(t, p, params.intrinsic, index, 0, shared);
    seen = add_tile(params, index, seen, shared);
  }

  const Place place(t, p);
  const StripOwner own(place.valid);
  const int step = p.ratio - 1;
  if (own.slot < own.slots && own.pair == 0) moments.count[own.slot] = A(seen);
  prim::sync_threads();
#pragma unroll 1
  for (int j = 0; j < place.ghosts; ++j)
    write_partials(params.partials, place.slot, int64_t(place.c0) * step + place.ghost0 + j, step,
                   place.valid, place.c0 == 0 && place.ghost0 == 0 && j == 0, own.slots,
                   moments.count, moments.mean + j * 2 * kThreads, moments.m2 + j * 2 * kThreads,
                   2 * own.pairs);
}

}  // namespace ghost::cuda
