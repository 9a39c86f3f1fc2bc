// First launch of the backward pass: the sums over all pixels that the gradient of batch norm 2
// needs, of
//
//   da2 = dz act2'(bn2(v))  and  da2 * vhat,   v = w2 (*) y,  y = act1(bn1(w1 * x))
//
// and, for a PReLU, of dz min(bn2(v), 0). The launch also writes u = w1 * x for the launches after
// it, pixel-major, unless the caller has u in that form.
//
// Tile map: tile and product as in the forward passes (forward.cuh), the stencil as in
// backward_cheap.cuh; a thread keeps the sums of its pair of channels in shared memory between
// tiles.
// Binding resource: memory traffic, x and dz in, u out.
#pragma once

#include "cuda/backward_cheap.cuh"
#include "cuda/forward.cuh"

namespace ghost::cuda {

template <class T>
struct SumsParams {
  CheapParams cheap;  // only channels, images, rows and cols of its tile are set
  CudaTile tile;
  Maps maps;
  Intrinsic<T> intrinsic;
  T* u_rows = nullptr;  // [pixel][u_pitch], or null: not needed
  int64_t u_pitch = 0;
  FastDiv by_pitch, by_image_rows;  // positions of the y tile to columns and rows
};

// Copies the given u to pixel-major rows, for the block's channels and the tile's own pixels.
template <Layout kLayout, class T>
__device__ __forceinline__ void copy_given_u(const SumsParams<T>& params, const Owner& me,
                                             const TileOrigin& o, const Tile& tile) {
  const CheapParams& p = params.cheap;
  const T* const u = params.intrinsic.in.x;
  const int64_t plane = int64_t{p.height} * p.width;
  for (int i = me.tid; i < p.inner.count * p.by_pairs.divisor; i += kThreads) {
    int pair = i;
    const BoxPixel at = locate(p.inner, p.by_pairs.split(pair));
    const int c = me.first + 2 * pair;
    if (c >= params.u_pitch || at.image >= tile.images || at.row >= tile.rows ||
        at.col >= tile.cols)
      continue;
    const int64_t n = o.n0 + at.image, hw = int64_t{o.h0 + at.row} * p.width + o.w0 + at.col;
    const bool nhwc = kLayout == Layout::kNHWC;
    const T* const in =
        nhwc ? u + (n * plane + hw) * p.intrinsic + c : u + (n * p.intrinsic + c) * plane + hw;
    const bool first = c < p.intrinsic, second = c + 1 < p.intrinsic;
    store_pair(params.u_rows + (n * plane + hw) * params.u_pitch + c,
               first ? prim::to_float(in[0]) : Accumulator<T>(0),
               second ? prim::to_float(in[nhwc ? 1 : plane]) : Accumulator<T>(0));
  }
}

// Writes u to its row where the pixel is the tile's own, and replaces u by its rounded value: the
// sums must be of the u that the next launch reads.
template <class T>
struct KeepRows {
  const SumsParams<T>& params;
  int extent;       // of the tile: rows << 16 | columns, because the product needs registers
  int first_pixel;  // negative: u is not kept
  int first;        // channel of the block

  __device__ __forceinline__ KeepRows(const SumsParams<T>& params_, const Tile& tile,
                                      const Place& place)
      : params(params_), extent(tile.rows << 16 | tile.cols), first_pixel(-1), first(place.c0) {
    const CheapParams& p = params.cheap;
    if (params.u_rows != nullptr && place.writes_y)
      first_pixel = (static_cast<int>(tile.n0) * p.height + tile.h0) * p.width + tile.w0;
  }

  template <class A>
  __device__ __forceinline__ void operator()(int position, int n, A& u0, A& u1) const {
    u0 = prim::to_float(prim::from_float<T>(u0));
    u1 = prim::to_float(prim::from_float<T>(u1));
    if (first_pixel < 0 || first + n >= params.u_pitch) return;
    const int halo = params.tile.halo;
    // Opaque: the compiler must not hoist row and col out of the loop over channels, which has no
    // registers for them.
    int col = prim::opaque(position), row = params.by_pitch.split(col);
    const int image = params.by_image_rows.split(row);
    col -= halo;
    row -= halo;
    if (row < 0 || row >= extent >> 16 || col < 0 || col >= (extent & 0xffff)) return;
    const CheapParams& p = params.cheap;
    const int pixel = first_pixel + (image * p.height + row) * p.width + col;
    store_pair(params.u_rows + pixel * params.u_pitch + first + n, u0, u1);
  }
};

// Sums of the slopes' gradients, in shared memory behind the slots of the other sums:
// [ghosts][groups][channels].
template <class T>
__device__ __forceinline__ Accumulator<T>* slope_slots(const SumsParams<T>& params,
                                                       unsigned char* shared) {
  const CudaTile& t = params.tile;
  return reinterpret_cast<Accumulator<T>*>(shared + t.moments_at) + t.ghosts * 4 * kThreads;
}

// Adds the sums of one tile to the thread's own slots [ghosts][2][groups][channels].
template <class T>
__device__ __forceinline__ void add_sums(const SumsParams<T>& params, int index,
                                         unsigned char* shared) {
  using A = Accumulator<T>;
  const CudaTile& t = params.tile;
  const CheapParams& p = params.cheap;
  const Place place(t, params.maps);
  const Owner me(p, place.c0);
  const Tile tile = locate_tile(t, params.maps, prim::opaque(index));
  const TileOrigin o{static_cast<int>(tile.n0), tile.h0, tile.w0};
  const A* const taps = reinterpret_cast<const A*>(shared + t.taps_at);
  const A* const norm2 = reinterpret_cast<const A*>(shared + params.tile.norm2_at);
  const T* const y = reinterpret_cast<const T*>(shared + t.y_at);
  T* const grads = reinterpret_cast<T*>(shared + params.tile.grad_at);
  const int slot_count = me.groups * me.channels;
  A* own = reinterpret_cast<A*>(shared + t.moments_at) + me.group * me.channels + me.pair;
#pragma unroll 1
  for (int k = 0; k < place.ghosts; ++k) {
    const int j = prim::opaque(place.ghost0 + k);
    if (k > 0) {
      prim::sync_threads();
      copy_ghost_grad<T>(p, me, j, p.v, o, p.grad_map, grads);
      prim::cp_async_commit();
    }
    prim::cp_async_wait<0>();
    prim::sync_threads();
    const A* const norm = norm2 + k * kNorm2Rows * me.channels;
    A sum[2] = {}, sum_hat[2] = {};
    cheap_gradient<kDvConst>(
        p, me, j, o, y, grads, 0, 0, norm, taps + k * p.d * p.d * me.channels,
        [&](int, int, const A(&v)[kStripValues], const A(&da2)[kStripValues], unsigned exists) {
          A mean[2];
          load_pair(norm + kMean * me.channels + me.pair, mean);
#pragma unroll
          for (int i = 0; i < kStripValues; ++i) {
            if (!(exists >> i & 1u)) continue;
            sum[i & 1] += da2[i];
            sum_hat[i & 1] = prim::fma(da2[i], v[i] - mean[i & 1], sum_hat[i & 1]);
          }
        },
        [&](const A(&products)[kStripValues]) {
          A* const slot = slope_slots(params, shared) + (k * me.groups + me.group) * me.channels;
          A slopes[2];
          load_pair(slot + me.pair, slopes);
#pragma unroll
          for (int i = 0; i < kStripValues; ++i) slopes[i & 1] += products[i];
          store_pair(slot + me.pair, slopes[0], slopes[1]);
        });
    if (me.active()) {
      A inv_std[2];
      load_pair(norm + kInvStd * me.channels + me.pair, inv_std);
      own[0] += sum[0];
      own[1] += sum[1];
      own[slot_count] = prim::fma(sum_hat[0], inv_std[0], own[slot_count]);
      own[slot_count + 1] = prim::fma(sum_hat[1], inv_std[1], own[slot_count + 1]);
      own += 2 * slot_count;
    }
  }
}

template <class P, Layout kLayout, int kChannels, Scope kScope>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<typename P::T>)
    ghost_backward_sums_kernel(const SumsParams<typename P::T> params) {
  using T = typename P::T;
  using A = typename P::A;
  GHOST_DYN_SHARED(unsigned char, shared);
  const CudaTile& t = params.tile;
  const CheapParams& p = params.cheap;
  A* const slots = reinterpret_cast<A*>(shared + t.moments_at);
  {
    const Place place(t, params.maps);
    const Owner me(p, place.c0);
    load_intrinsic(t, place, params.intrinsic, false, shared);
    load_ghosts<T>(p, me, place.ghost0, place.ghosts, p.d * p.d,
                   reinterpret_cast<A*>(shared + params.tile.norm2_at),
                   reinterpret_cast<A*>(shared + t.taps_at));
    load_ghost_slopes(p, me, place.ghost0, place.ghosts, kDvConst,
                      reinterpret_cast<A*>(shared + params.tile.norm2_at));
    const int slot_count = place.ghosts * me.groups * me.channels;
    for (int i = me.tid; i < 2 * slot_count; i += kThreads) slots[i] = 0;
    if (p.act2 == Act::kPReLU)
#pragma unroll 1
      for (int i = me.tid; i < slot_count; i += kThreads) slope_slots(params, shared)[i] = 0;
  }

#pragma unroll 1
  for (int index = Place(t, params.maps).worker; index < int(t.tiles); index += t.workers) {
    const Place place(t, params.maps);
    const Tile tile = locate_tile(t, params.maps, prim::opaque(index));
    prim::sync_threads();  // the gradients of the tile before are free
    {
      const Owner me(p, place.c0);
      const TileOrigin o{static_cast<int>(tile.n0), tile.h0, tile.w0};
      if (place.ghosts > 0)
        copy_ghost_grad<T>(p, me, place.ghost0, p.v, o, p.grad_map,
                           reinterpret_cast<T*>(shared + params.tile.grad_at));
      prim::cp_async_commit();
      if (params.intrinsic.in.w1 == nullptr && params.u_rows != nullptr && place.writes_y)
        copy_given_u<kLayout, T>(params, me, o, tile);
    }
    make_y_tile<P, kLayout, kScope, kChannels, 4>(t, params.maps, params.intrinsic, tile, place,
                                                  index < t.workers, 0, shared,
                                                  KeepRows<T>(params, tile, place));
    add_sums(params, index, shared);
  }

  prim::sync_threads();
  const Place place(t, params.maps);
  const Owner me(p, place.c0);
  const int slot_count = me.groups * me.channels;
  const int64_t ghosts = int64_t{p.intrinsic} * p.ghosts_per_map;
  for (int i = me.tid; i < place.ghosts * 2 * me.channels; i += kThreads) {
    const int row = i / me.channels, c = i - row * me.channels;  // row: ghost, then kind of sum
    if (c >= place.valid) continue;
    A total = 0;
    for (int g = 0; g < me.groups; ++g) total += slots[row * slot_count + g * me.channels + c];
    static_cast<A*>(p.sums2)[(int64_t{place.worker} * 2 + (row & 1)) * ghosts +
                             int64_t{me.first + c} * p.ghosts_per_map + place.ghost0 + row / 2] =
        total;
  }
  if (p.slope_sums2 == nullptr) return;
#pragma unroll 1
  for (int i = me.tid; i < place.ghosts * me.channels; i += kThreads) {
    const int k = i / me.channels, c = i - k * me.channels;
    if (c >= place.valid) continue;
    A total = 0;
#pragma unroll 1
    for (int g = 0; g < me.groups; ++g)
      total += slope_slots(params, shared)[k * slot_count + g * me.channels + c];
    static_cast<A*>(p.slope_sums2)[place.worker * ghosts +
                                   int64_t{me.first + c} * p.ghosts_per_map + place.ghost0 + k] =
        total;
  }
}

}  // namespace ghost::cuda
