// ghost_apply in one pass over x:
//
//   y   = act1(bn1(w1 * x))                          x times in_gate, if given
//   z   = act2(bn2(w2 (*) y))
//   out = concat(y, z)[:, :out_channels]             times gate, plus residual, if given
//
// Tile map: a block of 256 threads owns one block of intrinsic channels with their ghosts and takes
// tile after tile of pixels. Product: the warps share it as tiles of mma; 16-bit NHWC maps go
// straight from global memory to registers (product.cuh). Depthwise: a thread owns a pair of
// channels and strips of 7 pixels, two rows of them for 16-bit types. Stores: through shared
// memory, so that a warp writes whole neighbouring vectors of both halves of the concatenation.
// Binding resource: DRAM bandwidth (x once, out once; the halo of y is recomputed from x in L2).
// The phases of one block do not overlap; the phases of the blocks of a multiprocessor do.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/stores.cuh"

namespace ghost::cuda {

template <class T>
struct ApplyParams {
  CudaTile tile;
  Maps maps;
  WindowGrid windows;
  Intrinsic<T> intrinsic;
  ParamRef w2;  // [g, d, d]
  Norm<Accumulator<T>> norm2;
  Activated<Accumulator<T>> act2;
  Output<T> output;
  bool pooled = false;  // output.out is [n, m], the means over the pixels of y
};

inline constexpr int kLeanSize = 3;  // d of a lean instance

// Scales, shifts, slopes and taps of the block's channels into shared memory. The scale of batch
// norm 2 is multiplied into the taps; its shift is the start value of the depthwise sums.
template <Scope kScope, class T>
__device__ __forceinline__ void load_apply_parameters(const ApplyParams<T>& params,
                                                      unsigned char* shared) {
  using A = Accumulator<T>;
  constexpr bool kLean = kScope == Scope::kLean;
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  const Place place(t, p);
  const int ghosts_per_map = p.ghosts_per_map();
  const int taps_count = kLean ? kLeanSize * kLeanSize : p.d * p.d;
  const int64_t first_ghost = int64_t(place.c0) * ghosts_per_map + place.ghost0;
  // [3][channels] of the intrinsic maps, then of each ghost.
  A* const affine = reinterpret_cast<A*>(shared + t.affine_at) + 3 * t.channels;
  A* const taps = reinterpret_cast<A*>(shared + t.taps_at);
  load_intrinsic<kScope>(t, place, params.intrinsic, place.worker == 0 && place.writes_y, shared);
#pragma unroll 1
  for (int j = 0; j < place.ghosts; ++j) {
    A* const own = affine + j * 3 * t.channels;
    if constexpr (kLean) {
      load_ready_norm(params.norm2, first_ghost + j, ghosts_per_map, place.valid, t.channels, own,
                      own + t.channels);
    } else {
      load_norm(params.norm2, first_ghost + j, ghosts_per_map, place.valid, t.channels,
                place.worker == 0, own, own + t.channels);
      load_slopes(params.act2, first_ghost + j, ghosts_per_map, place.valid, t.channels,
                  own + 2 * t.channels);
    }
  }
  prim::sync_threads();
#pragma unroll 1
  for (int j = 0; j < place.ghosts; ++j) {
    const auto load = [&](const auto& w2) {
      load_taps(taps + j * taps_count * t.channels, w2, first_ghost + j, ghosts_per_map,
                place.valid, t.channels, taps_count, affine + j * 3 * t.channels);
    };
    if constexpr (kLean)
      load(static_cast<const A*>(params.w2.data));
    else
      load(params.w2);
  }
}

// z of a tile from its y, into shared memory. A thread computes strips of kRows rows.
template <Scope kScope, class T>
__device__ __forceinline__ void make_z_tile(const ApplyParams<T>& params, int index,
                                            unsigned char* shared) {
  using A = Accumulator<T>;
  constexpr int kRows = kWindowRows<T>, kD = kScope == Scope::kLean ? kLeanSize : 0;
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  const Place place(t, p);
  const Tile tile = locate_tile(t, p, prim::opaque(index));
  const StripOwner own(place.valid);
  const T* y = reinterpret_cast<const T*>(shared + t.y_at);
  const A* const shared_affine = reinterpret_cast<const A*>(shared + t.affine_at);
  const A* const taps = reinterpret_cast<const A*>(shared + t.taps_at);
  const int taps_count = kD > 0 ? kD * kD : p.d * p.d;
  T* z = reinterpret_cast<T*>(shared + t.stage_at) + 2 * own.pair * place.ghosts;
#pragma unroll 1
  for (int j = 0; j < place.ghosts; ++j) {
    const A* const affine = shared_affine + (j + 1) * 3 * t.channels;
    depthwise_tile<kRows, kD>(
        y, t, p, params.windows, tile, own, taps + j * taps_count * t.channels, affine + t.channels,
        [&](Strip<A>(&v)[kRows], int count, int first, int rows) {
          constexpr int kValues = kRows * kStripValues;
          PairOf<T> pairs[kValues / 2];
          activate_pairs<T, kScope != Scope::kLean>(
              params.act2.act, [&](int i) { return affine[2 * (t.channels + own.pair) + (i & 1)]; },
              reinterpret_cast<A(&)[kValues]>(v), pairs);
          const int stride = t.z_stride;
          T* to = z + first * stride + j;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (r >= rows) break;
            if constexpr (kScope == Scope::kLean) {
#pragma unroll
              for (int s = 0; s < kStrip; ++s)
                if (s < count) store_pair(to + s * stride, pairs[r * kStrip + s]);
            } else if (place.ghosts == 1 && count == kStrip) {  // the common case, unmasked
#pragma unroll
              for (int s = 0; s < kStrip; ++s) store_pair(to + s * stride, pairs[r * kStrip + s]);
            } else {
#pragma unroll
              for (int s = 0; s < kStrip; ++s)
                if (s < count) {
                  store_one(to + s * stride, pairs[r * kStrip + s], 0);
                  store_one(to + s * stride + place.ghosts, pairs[r * kStrip + s], 1);
                }
            }
            to += tile.cols * stride;
          }
        });
  }
}

// y and z of a tile from shared memory to the output.
template <Layout kLayout, Scope kScope, class T>
__device__ __forceinline__ void store_apply_tile(const ApplyParams<T>& params, int index,
                                                 unsigned char* shared) {
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  const Place place(t, p);
  const Tile tile = locate_tile(t, p, prim::opaque(index));
  const int ghosts_per_map = p.ghosts_per_map();
  const int first_z = p.m + place.c0 * ghosts_per_map + place.ghost0;
  int z_count = 0;  // ghosts past out_channels are dropped
  if (ghosts_per_map > 0 && first_z < p.out_channels) {
    const int left = p.out_channels - first_z;
    z_count = min_of(place.valid * place.ghosts, left / ghosts_per_map * place.ghosts +
                                                     min_of(left % ghosts_per_map, place.ghosts));
  }
  const BlockMaps<T> y{reinterpret_cast<const T*>(shared + t.y_at),
                       t.y_stride,
                       place.writes_y ? place.valid : 0,
                       true,
                       place.c0,
                       1,
                       1};
  const BlockMaps<T> z{reinterpret_cast<const T*>(shared + t.stage_at),
                       t.z_stride,
                       z_count,
                       false,
                       first_z,
                       place.ghosts,
                       ghosts_per_map};
  store_tile<kLayout, kScope != Scope::kLean>(
      params.output, p, tile, reinterpret_cast<const PixelEntry*>(shared + t.inner_at),
      reinterpret_cast<const int32_t*>(shared + t.gate_at), y, z);
}

// Means of y over the pixels of a tile's images, to the output [n, m]. A thread takes one channel
// of one image; neighbouring threads take neighbouring channels.
template <class T>
__device__ __forceinline__ void pool_tile(const ApplyParams<T>& params, int index,
                                          unsigned char* shared) {
  using A = Accumulator<T>;
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  const Place place(t, p);
  const Tile tile = locate_tile(t, p, prim::opaque(index));
  const T* const y = reinterpret_cast<const T*>(shared + t.y_at);
#pragma unroll 1
  for (int k = int(threadIdx.x); k < tile.images * place.valid; k += kThreads) {
    const int image = k / place.valid, c = k - image * place.valid;
    A sum = A(0);
#pragma unroll 1
    for (int h = 0; h < tile.rows; ++h) {
      const T* from = y + y_position(t, tile, image, h, 0) * t.y_stride + c;
#pragma unroll 4
      for (int w = 0; w < tile.cols; ++w) sum += prim::to_float(from[w * t.y_stride]);
    }
    params.output.out[(tile.n0 + image) * p.m + place.c0 + c] =
        prim::from_float<T>(sum / A(p.h * p.w));
  }
}

template <class P, Layout kLayout, int kChannels, Scope kScope>
__global__ void __launch_bounds__(kThreads, min_blocks<P>(kLayout, kChannels))
    ghost_apply_kernel(const ApplyParams<typename P::T> params) {
  prim::wait_for_previous_kernel();
  constexpr int kTiles = kChannels == 64 ? 16 : 8;
  GHOST_DYN_SHARED(unsigned char, shared);
  const CudaTile& t = params.tile;
  const Maps& p = params.maps;
  load_apply_parameters<kScope>(params, shared);
#pragma unroll 1
  for (int index = Place(t, p).worker; index < int(t.tiles); index += t.workers) {
    make_y_tile<P, kLayout, kScope, kChannels, kTiles, true>(t, p, params.intrinsic, index,
                                                             params.output.channels, shared);
    const bool gated = kScope != Scope::kLean && params.output.gate != nullptr;
    if (gated)
      build_gate_table<kLayout>(reinterpret_cast<int32_t*>(shared + t.gate_at),
                                locate_tile(t, p, prim::opaque(index)), params.output);
    if (t.ghosts > 0) make_z_tile<kScope>(params, index, shared);
    if (t.ghosts > 0 || gated) prim::sync_threads();
    if (kScope != Scope::kLean && params.pooled)
      pool_tile(params, index, shared);
    else
      store_apply_tile<kLayout, kScope>(params, index, shared);
  }
}

}  // namespace ghost::cuda
