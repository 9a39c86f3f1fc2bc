// The first pass of training: partial mean and variance, over all pixels, of
//
//   u = w1 * x
//
// and u itself if it is kept.
// Tile map: tiles without halo. From the accumulators of the product a lane keeps the sums of its
// columns (stats.cuh); a kept u goes through shared memory, to be stored in whole vectors. A given
// u is read into shared memory, and a thread sums a pair of channels.
// Binding resource: reading x (DRAM), and writing u if it is kept.
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
  Partials<Accumulator<T>> partials;  // splits = tile.workers
};

// The sums that a thread keeps from tile to tile: of its columns of the product, or of one pair of
// channels (column 0) if u is given.
template <class A, int kColumns>
struct ColumnSums {
  int seen = 0;  // values of each channel
  ShiftedSums<A> at[kColumns][2];

  // f(column, which of the pair, its sums)
  template <class F>
  __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int i = 0; i < kColumns * 2; ++i) f(i / 2, i % 2, at[i / 2][i % 2]);
  }
};

// Adds one tile of u from shared memory.
template <class T, class Sums>
__device__ __forceinline__ void add_given(const T* u, const CudaTile& t, int valid, int sources,
                                          const PixelEntry* source, Sums& sums) {
  using A = Accumulator<T>;
  const StripOwner own(valid);
  if (own.slot >= own.slots) return;
#pragma unroll 4
  for (int i = own.slot; i < sources; i += own.slots) {
    A v[2];
    load_pair(u + source[i].position * t.y_stride + 2 * own.pair, v);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (sums.seen == 0) sums.at[0][e].shift = v[e];
      sums.at[0][e].add(v[e]);
    }
    ++sums.seen;
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
__global__ void __launch_bounds__(kThreads, sizeof(typename P::A) == 8 ? 1 : 2)
    ghost_primary_stats_kernel(const PrimaryStatsParams<typename P::T> params) {
  prim::wait_for_previous_kernel();
  using T = typename P::T;
  using A = typename P::A;
  constexpr bool kDirect = kScope != Scope::kAny;
  using Grid = ProductGrid<kDirect, kChannels, 4>;
  GHOST_DYN_SHARED(unsigned char, shared);
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  T* u = reinterpret_cast<T*>(shared + t.y_at);
  const bool given = !kDirect && params.in.w1 == nullptr, keeps = params.u.out != nullptr;
  ColumnSums<A, Grid::kTilesN> sums;

#pragma unroll 1
  for (int index = Place(t, p).worker; index < int(t.tiles); index += t.workers) {
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
      add_given(u, t, place.valid, sources, source, sums);
    } else {
      primary_product<P, kLayout, kDirect, Grid, false>(
          t, p, params.in, tile, place.c0, index < t.workers, shared,
          [&](A(&acc)[Grid::kTilesM][Grid::kTilesN][4], int q0) {
            constexpr int kRows = Grid::kTilesM * 2;
            int count = 0;  // rows rise with i: the valid ones come first
#pragma unroll
            for (int i = 0; i < kRows; ++i) count += q0 + Grid::row(i / 2, i % 2) < sources ? 1 : 0;
            if (count == 0) return;
            // The statistics must be of the rounded u, which the next passes read.
            if (keeps) round_to<T>(acc);
            if (sums.seen == 0)
              sums.each([&](int nt, int e, auto& sum) { sum.shift = acc[0][nt][e]; });
            if (count < kRows)  // a value equal to the shift adds nothing
              sums.each([&](int nt, int e, auto& sum) {
#pragma unroll
                for (int i = 1; i < kRows; ++i)
                  if (i >= count) acc[i / 2][nt][i % 2 * 2 + e] = sum.shift;
              });
            sums.each([&](int nt, int e, auto& sum) {
              if (Grid::col(nt) >= t.channels) return;
#pragma unroll
              for (int i = 0; i < kRows; ++i) sum.add(acc[i / 2][nt][i % 2 * 2 + e]);
            });
            sums.seen += count;
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
    if (index < t.workers) sums.each([&](int, int, auto& sum) { sum.center(A(sums.seen)); });
    if (keeps) {
      const BlockMaps<T> maps{u, t.y_stride, place.valid, true, place.c0, 1, 1};
      const BlockMaps<T> none{u, t.y_stride, 0, true, 0, 1, 1};
      store_tile<kLayout>(params.u, p, tile, inner, nullptr, maps, none);
    }
  }

  // The shared memory from b_at on is free after the last tile. A slot is a thread's share (u
  // given) or a row of lanes (product).
  prim::sync_threads();
  const Place place(t, p);
  const StripOwner own(place.valid);
  const int slots = given ? own.slots : Grid::kWarpsM * Grid::kLaneRows;
  const int stride = given ? 2 * own.pairs : kChannels, all = slots * stride;
  A* const counts = reinterpret_cast<A*>(shared + t.b_at);
  A* const shifts = counts + kThreads;
  const auto keep = [&](int at, const ShiftedSums<A>(&pair)[2]) {
    store_pair(shifts + at, pair[0].shift, pair[1].shift);
    store_pair(shifts + all + at, pair[0].sum, pair[1].sum);
    store_pair(shifts + 2 * all + at, pair[0].squares, pair[1].squares);
  };
  if (given) {
    if (own.slot < own.slots) {
      if (own.pair == 0) counts[own.slot] = A(sums.seen);
      keep(own.slot * stride + 2 * own.pair, sums.at[0]);
    }
  } else {
    const int row = Grid::warp_m() * Grid::kLaneRows + Grid::lane_row();
    if (Grid::col(0) == 0) counts[row] = A(sums.seen);
#pragma unroll
    for (int nt = 0; nt < Grid::kTilesN; ++nt) keep(row * stride + Grid::col(nt), sums.at[nt]);
  }
  prim::sync_threads();
  write_partials(params.partials, place.worker, place.c0, 1, place.valid, place.c0 == 0, slots,
                 counts, shifts, shifts + all, shifts + 2 * all, stride);
}

}  // namespace ghost::cuda
