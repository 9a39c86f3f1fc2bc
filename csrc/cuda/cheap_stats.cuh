// The second pass of training: partial mean and variance, over all pixels, of
//
//   v = w2 (*) y,  y = act1(bn1(w1 * x))
//
// Tile map: tile, y and depthwise part as in apply.cuh; instead of z a thread keeps the sums of its
// pair of channels (stats.cuh), in shared memory between tiles.
// Binding resource: reading x (DRAM) for small C, the product for large C.
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
  ParamRef w2;                        // [g, d, d]
  Partials<Accumulator<T>> partials;  // splits = tile.workers
};

// Sums in shared memory: shift, sum and squares [ghosts][kThreads][2], of a ghost and of a thread's
// pair of channels; count [kThreads], the number of values of a thread, which is the same for all
// ghosts. At the end count is [slots].
template <class A>
struct Moments {
  A *shift, *sum, *squares, *count;

  __device__ __forceinline__ Moments(const CudaTile& t, unsigned char* shared)
      : shift(reinterpret_cast<A*>(shared + t.moments_at)),
        sum(shift + t.ghosts * 2 * kThreads),
        squares(sum + t.ghosts * 2 * kThreads),
        count(squares + t.ghosts * 2 * kThreads) {}

  __device__ __forceinline__ void load(int at, ShiftedSums<A> (&sums)[2]) const {
    A k[2], s[2], q[2];
    load_pair(shift + at, k);
    load_pair(sum + at, s);
    load_pair(squares + at, q);
#pragma unroll
    for (int e = 0; e < 2; ++e) sums[e] = {k[e], s[e], q[e]};
  }
  __device__ __forceinline__ void store(int at, const ShiftedSums<A> (&sums)[2]) const {
    store_pair(shift + at, sums[0].shift, sums[1].shift);
    store_pair(sum + at, sums[0].sum, sums[1].sum);
    store_pair(squares + at, sums[0].squares, sums[1].squares);
  }
};

// Adds the values of one tile. A thread takes strips of kRows rows.
template <int kRows, class T>
__device__ __forceinline__ void add_tile(const CheapStatsParams<T>& params, int index,
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
  int n = 0;
#pragma unroll 1
  for (int j = 0; j < place.ghosts; ++j) {
    n = int(moments.count[threadIdx.x]);
    const int mine = 2 * (j * kThreads + prim::opaque(int(threadIdx.x)));
    depthwise_tile<kRows, 0>(
        y, t, p, params.windows, tile, own, taps + j * p.d * p.d * t.channels, nullptr,
        [&](Strip<A>(&v)[kRows], int count, int, int rows) {
          ShiftedSums<A> sums[2];  // from shared memory: the window needs the registers
          moments.load(mine, sums);
          if (n == 0) {
#pragma unroll
            for (int e = 0; e < 2; ++e) sums[e].shift = v[0][0][e];
          }
          if (count < kStrip || rows < kRows) {  // a value equal to the shift adds nothing
#pragma unroll
            for (int i = 0; i < kRows * kStripValues; ++i) {
              const int r = i / kStripValues, s = i / 2 % kStrip;
              if (s >= count || r >= rows) v[r][s][i & 1] = sums[i & 1].shift;
            }
          }
#pragma unroll
          for (int i = 0; i < kRows * kStripValues; ++i)
            sums[i & 1].add(v[i / kStripValues][i / 2 % kStrip][i & 1]);
          n += count * rows;
          moments.store(mine, sums);
        });
    if (index < t.workers) {
      ShiftedSums<A> sums[2];
      moments.load(mine, sums);
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[e].center(A(n));
      moments.store(mine, sums);
    }
  }
  moments.count[threadIdx.x] = A(n);
}

template <class P, Layout kLayout, int kChannels, Scope kScope>
__global__ void __launch_bounds__(kThreads, sizeof(typename P::A) == 8 ? 1 : 2)
    ghost_cheap_stats_kernel(const CheapStatsParams<typename P::T> params) {
  prim::wait_for_previous_kernel();
  using T = typename P::T;
  using A = typename P::A;
  GHOST_DYN_SHARED(unsigned char, shared);
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  const Moments<A> moments(t, shared);
  {
    const Place place(t, p);
    const int ghosts_per_map = p.ghosts_per_map(), taps_count = p.d * p.d;
    const int64_t first_ghost = int64_t(place.c0) * ghosts_per_map + place.ghost0;
    A* taps = reinterpret_cast<A*>(shared + t.taps_at);
    moments.count[threadIdx.x] = A(0);
    load_intrinsic(t, place, params.intrinsic, place.worker == 0 && place.writes_y, shared);
    for (int j = 0; j < place.ghosts; ++j) {
      load_taps(taps + j * taps_count * t.channels, params.w2, first_ghost + j, ghosts_per_map,
                place.valid, t.channels, taps_count, static_cast<const A*>(nullptr));
      const int mine = 2 * (j * kThreads + int(threadIdx.x));
      moments.store(mine, {});
    }
  }

#pragma unroll 1
  for (int index = Place(t, p).worker; index < int(t.tiles); index += t.workers) {
    make_y_tile<P, kLayout, kScope, kChannels, 8>(t, p, params.intrinsic, index, 0, shared);
    add_tile<kWindowRows<T>>(params, index, shared);
  }

  const Place place(t, p);
  const StripOwner own(place.valid);
  const int ghosts_per_map = p.ghosts_per_map();
  const A seen = moments.count[threadIdx.x];
  prim::sync_threads();
  if (own.slot < own.slots && own.pair == 0) moments.count[own.slot] = seen;
  prim::sync_threads();
#pragma unroll 1
  for (int j = 0; j < place.ghosts; ++j)
    write_partials(params.partials, place.worker,
                   int64_t(place.c0) * ghosts_per_map + place.ghost0 + j, ghosts_per_map,
                   place.valid, place.c0 == 0 && place.ghost0 == 0 && j == 0, own.slots,
                   moments.count, moments.shift + j * 2 * kThreads, moments.sum + j * 2 * kThreads,
                   moments.squares + j * 2 * kThreads, 2 * own.pairs);
}

}  // namespace ghost::cuda
