// Partial statistics of u = w1 * x, and u itself where it is kept: the first pass of training.
//
// Tiles without halo. From the accumulators of the product a lane keeps mean and squared deviations
// of its columns; where u is kept it goes through shared memory to whole vectors. With u given the
// tile is read into shared memory and a thread sums a pair of channels.
// Binding resource: reading x (DRAM); writing u where it is kept.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/stats.cuh"
#include "cuda/stores.cuh"

namespace ghost::cuda {

template <class T>
struct PrimaryStatsParams {
  CudaTile tile;
  Maps maps;
  Primary<T> in;                      // w1 null: x is u
  Output<T> u;                        // out null: u is not kept
  Partials<Accumulator<T>> partials;  // splits = tile.slots
};

// The statistics that a thread keeps from tile to tile: of its columns of the product, or with u
// given of one pair of channels (column 0).
template <class A, int kColumns>
struct ColumnMoments {
  int seen = 0;  // values of each channel
  A mean[kColumns][2], m2[kColumns][2];

  __device__ __forceinline__ ColumnMoments() {
#pragma unroll
    for (int i = 0; i < kColumns * 2; ++i) mean[i / 2][i % 2] = m2[i / 2][i % 2] = A(0);
  }
};

// Adds one tile of u from shared memory.
template <class T, class Moments>
__device__ __forceinline__ void add_given(const T* u, const CudaTile& t, int valid, int sources,
                                          const PixelEntry* source, Moments& moments) {
  using A = Accumulator<T>;
  const StripOwner own(valid);
  if (own.slot >= own.slots) return;
  constexpr int kGroup = 4;
#pragma unroll 1
  for (int i = own.slot; i < sources; i += kGroup * own.slots) {
    A v[2][kGroup];
    int count = 0;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      A two[2] = {A(0), A(0)};
      if (i + k * own.slots < sources) {
        load_pair(u + source[i + k * own.slots].position * t.y_stride + 2 * own.pair, two);
        ++count;
      }
      v[0][k] = two[0];
      v[1][k] = two[1];
    }
    const A share = A(count) / A(moments.seen + count);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      add_values(v[e], count, A(moments.seen), share, moments.mean[0][e], moments.m2[0][e]);
    moments.seen += count;
  }
}

template <class T, class A, int kM, int kN>
__device__ __forceinline__ void round_to(A (&acc)[kM][kN][4]) {
#pragma unroll
  for (int i = 0; i < kM * kN * 4; ++i) {
    A& v = acc[i / (kN * 4)][i / 4 % kN][i % 4];
    v = prim::to_float(prim::from_float<T>(v));
  }
}

template <class P, Layout kLayout, int kChannels, Scope kScope>
__global__ void __launch_bounds__(kThreads, min_blocks<P>(kLayout, kChannels))
    ghost_primary_stats_kernel(const PrimaryStatsParams<typename P::T> params) {
  using T = typename P::T;
  using A = typename P::A;
  constexpr bool kDirect = kScope != Scope::kAny;
  using Grid = ProductGrid<kDirect, kChannels, 4>;
  GHOST_DYN_SHARED(unsigned char, shared);
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  T* u = reinterpret_cast<T*>(shared + t.y_at);
  const bool given = !kDirect && params.in.w1 == nullptr, keeps = params.u.out != nullptr;
  ColumnMoments<A, Grid::kTilesN> moments;

#pragma unroll 1
  for (int index = Place(t, p).slot; index < int(t.tiles); index += t.slots) {
    const Place place(t, p);
    const Tile tile = locate_tile(t, p, prim::opaque(index));
    const int sources = tile.sources();
    PixelEntry* source = reinterpret_cast<PixelEntry*>(shared + t.source_at);
    PixelEntry* inner = reinterpret_cast<PixelEntry*>(shared + t.inner_at);
    prim::sync_threads();
    build_source_table<kLayout>(source, t, tile, p);
    if (keeps) build_inner_table<kLayout>(inner, t, tile, p, p.m);
    prim::sync_threads();
    if (given) {
      read_maps<kLayout>(u, t, p, params.in.x, params.in.x_bytes, tile, place.c0, place.valid,
                         source, [](auto&, int, int) {});
      prim::sync_threads();
      add_given(u, t, place.valid, sources, source, moments);
    } else {
      primary_product<P, kLayout, kDirect, Grid, false>(
          t, p, params.in, tile, place.c0, index < t.slots, shared,
          [&](A(&acc)[Grid::kTilesM][Grid::kTilesN][4], int q0) {
            constexpr int kRows = Grid::kTilesM * 2;
            int count = 0;  // rows rise with i: the wanted ones come first
#pragma unroll
            for (int i = 0; i < kRows; ++i) count += q0 + Grid::row(i / 2, i % 2) < sources ? 1 : 0;
            if (count == 0) return;
            // The passes to come read the u that is kept: the statistics must be of the same.
            if (keeps) round_to<T>(acc);
            const A share = A(count) / A(moments.seen + count);
#pragma unroll
            for (int nt = 0; nt < Grid::kTilesN; ++nt) {
              const int n = Grid::col(nt);
              if (n >= t.channels) continue;
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                A v[kRows];
#pragma unroll
                for (int i = 0; i < kRows; ++i) v[i] = acc[i / 2][nt][i % 2 * 2 + e];
                add_values(v, count, A(moments.seen), share, moments.mean[nt][e],
                           moments.m2[nt][e]);
              }
            }
            moments.seen += count;
            if (!keeps) return;
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              if (i >= count) continue;
              T* to = u + source[q0 + Grid::row(i / 2, i % 2)].position * t.y_stride;
#pragma unroll
              for (int nt = 0; nt < Grid::kTilesN; ++nt)
                if (Grid::col(nt) < t.channels)
                  store_pair(to + Grid::col(nt), acc[i / 2][nt][i % 2 * 2],
                             acc[i / 2][nt][i % 2 * 2 + 1]);
            }
          });
      prim::sync_threads();
    }
    if (keeps) {
      const BlockMaps<T> maps{u, t.y_stride, place.valid, true, place.c0, 1, 1};
      const BlockMaps<T> none{u, t.y_stride, 0, true, 0, 1, 1};
      store_tile<kLayout>(params.u, p, tile, inner, nullptr, maps, none);
    }
  }

  // The stages are free now. A slot is a thread's share (u given) or a row of lanes (product).
  prim::sync_threads();
  const Place place(t, p);
  const StripOwner own(place.valid);
  const int slots = given ? own.slots : Grid::kWarpsM * Grid::kLaneRows;
  const int stride = given ? 2 * own.pairs : kChannels;
  A* counts = reinterpret_cast<A*>(shared + t.stage_at);
  A* means = counts + kThreads;
  A* squares = means + slots * stride;
  if (given) {
    if (own.slot < own.slots) {
      if (own.pair == 0) counts[own.slot] = A(moments.seen);
      store_pair(means + own.slot * stride + 2 * own.pair, moments.mean[0][0], moments.mean[0][1]);
      store_pair(squares + own.slot * stride + 2 * own.pair, moments.m2[0][0], moments.m2[0][1]);
    }
  } else {
    const int row = Grid::warp_m() * Grid::kLaneRows + Grid::lane_row();
    if (Grid::col(0) == 0) counts[row] = A(moments.seen);
#pragma unroll
    for (int nt = 0; nt < Grid::kTilesN; ++nt) {
      const int at = row * stride + Grid::col(nt);
      store_pair(means + at, moments.mean[nt][0], moments.mean[nt][1]);
      store_pair(squares + at, moments.m2[nt][0], moments.m2[nt][1]);
    }
  }
  prim::sync_threads();
  write_partials(params.partials, place.slot, place.c0, 1, place.valid, place.c0 == 0, slots,
                 counts, means, squares, stride);
}

}  // namespace ghost::cuda
