// Second launch of the backward pass: from grad_out and u to da1, dw2 and the sums that the first
// batch norm's gradient needs.
//
//   da2 = dz act2'(bn2(v)),  v = w2 (*) y,  y = act1(bn1(u))
//   dv  = scale2 (da2 - mean(da2) - vhat mean(da2 vhat))       (frozen statistics: scale2 da2)
//   dw2[a][b] = sum of dv[h][w] y[h + a - pad][w + b - pad],  pad = d / 2
//   dy  = grad of y + sum over taps of w2[a][b] dv[h - a + pad][w - b + pad]
//   da1 = dy act1'(bn1(u)), and of a PReLU the sums of dy min(bn1(u), 0)
//
// Outputs whose pointer in CheapParams is null are skipped: dw2, or dy and everything after it.
// Tile map: that of backward_cheap.cuh. Shared memory: y with a halo of 2 pad (pad along an axis
// that the tile spans), dv with a halo of pad, dy.
// Binding resource: memory traffic, u and grad_out in, da1 out, with shared-memory reads of the
// three stencils close behind: a tile as large as fits keeps the halo small.
#pragma once

#include "cuda/backward_cheap.cuh"

namespace ghost::cuda {

// Adds the tile's part of dw2 of one ghost to this thread's own slots, in shared memory
// [d][d * tap_splits][channels]. The thread owns a pair of channels, a row of taps and every
// tap_splits-th row of pixels, along which a window of y slides in registers.
template <class T, int D>
__device__ __forceinline__ void add_weight_gradient(const CheapParams& p, const Owner& me,
                                                    const T* y, const T* dv,
                                                    Accumulator<T>* slots) {
  using A = Accumulator<T>;
  const int q = me.group / D, tap_row = me.group % D, every = p.tile.tap_splits;
  if (q >= every) return;
  A acc[D][2] = {};
  for (int line = q; line < p.inner.count / p.inner.cols; line += every) {
    int row = line;
    const int image = p.inner.by_rows.split(row);
    const T* const y_row =
        y + p.y_map.offset(image, row + p.tile.halo_rows + tap_row, p.tile.halo_cols) + me.pair;
    const T* const dv_row = dv + p.grad_map.offset(image, row + D / 2, D / 2) + me.pair;
    A window[D][2];
#pragma unroll
    for (int b = 0; b < D - 1; ++b) load_pair(y_row + b * p.y_map.stride, window[b]);
    for (int col = 0; col < p.inner.cols; ++col) {
      A g[2];
      load_pair(y_row + (col + D - 1) * p.y_map.stride, window[D - 1]);
      load_pair(dv_row + col * p.grad_map.stride, g);
#pragma unroll
      for (int b = 0; b < D; ++b) {
        acc[b][0] = prim::fma(g[0], window[b][0], acc[b][0]);
        acc[b][1] = prim::fma(g[1], window[b][1], acc[b][1]);
      }
#pragma unroll
      for (int b = 0; b < D - 1; ++b) {
        window[b][0] = window[b + 1][0];
        window[b][1] = window[b + 1][1];
      }
    }
  }
#pragma unroll
  for (int b = 0; b < D; ++b) {
    A* const slot = slots + (b * D * every + me.group) * me.channels + me.pair;
    slot[0] += acc[b][0];
    slot[1] += acc[b][1];
  }
}

template <class T>
__device__ __forceinline__ void add_weight_gradient(int d, const CheapParams& p, const Owner& me,
                                                    const T* y, const T* dv,
                                                    Accumulator<T>* slots) {
  switch (d) {
    case 1:
      return add_weight_gradient<T, 1>(p, me, y, dv, slots);
    case 3:
      return add_weight_gradient<T, 3>(p, me, y, dv, slots);
    case 5:
      return add_weight_gradient<T, 5>(p, me, y, dv, slots);
    default:
      return add_weight_gradient<T, 7>(p, me, y, dv, slots);
  }
}

// Batch norm 2 and taps of ghosts j0 .. j0 + count to shared memory; clears their sums of dw2. Ends
// with a barrier.
template <class T>
__device__ __forceinline__ void begin_ghosts(const CheapParams& p, const Owner& me, int j0,
                                             int count, unsigned char* shared) {
  using A = Accumulator<T>;
  const int taps = p.d * p.d;
  A* const norm2 = reinterpret_cast<A*>(shared + p.tile.norm2_at);
  A* const slots = reinterpret_cast<A*>(shared + p.tile.slots_at);
  load_ghosts<T>(p, me, j0, count, taps, norm2, reinterpret_cast<A*>(shared + p.tile.taps_at));
  for (int i = me.tid; i < count * taps * p.tile.tap_splits * me.channels; i += kThreads)
    slots[i] = 0;
  prim::sync_threads();
  if (p.batch_stats) {
    const A pixels = static_cast<A>(p.values2);
    const int64_t ghosts = int64_t{p.intrinsic} * p.ghosts_per_map;
    const int owned = min_of(p.intrinsic - me.first, me.channels);
    for (int kind = 0; kind < 2; ++kind)
      sum_rows(
          static_cast<const A*>(p.sums2) + kind * ghosts + int64_t{me.first} * p.ghosts_per_map +
              j0,
          p.sums2_rows, 2 * ghosts, owned * count, reinterpret_cast<A*>(shared + p.tile.combine_at),
          [&](int i, A sum) {
            const int c = i / count, j = i - c * count;
            norm2[(j * kNorm2Rows + kDvConst + kind) * me.channels + c] = sum / pixels;
          },
          [&](int i) { return i / count * p.ghosts_per_map + i % count; });
    for (int i = me.tid; i < count * me.channels; i += kThreads) {
      const int j = i / me.channels;
      A* const norm = norm2 + j * kNorm2Rows * me.channels + i - j * me.channels;
      const A hat = norm[kInvStd * me.channels] * norm[kDvV * me.channels];
      const A scale = norm[kScale * me.channels];
      norm[kDvConst * me.channels] =
          scale * (norm[kMean * me.channels] * hat - norm[kDvConst * me.channels]);
      norm[kDvV * me.channels] = -scale * hat;
    }
  }
  load_ghost_slopes(p, me, j0, count, kMean, norm2);  // the mean has been used
  prim::sync_threads();
}

// dw2 of ghosts j0 .. j0 + count to dw2_sums: the slots of the threads that share a tap are added
// in order. more: the sum is added to dw2_sums, else it is stored there.
template <class T>
__device__ __forceinline__ void end_ghosts(const CheapParams& p, const Owner& me, int j0, int count,
                                           int worker, bool more, const Accumulator<T>* slots) {
  using A = Accumulator<T>;
  const int taps = p.d * p.d, tap_slots = taps * p.tile.tap_splits * me.channels;
  const int64_t all_taps = int64_t{p.intrinsic} * p.ghosts_per_map * taps;
  for (int i = me.tid; i < count * taps * me.channels; i += kThreads) {
    const int jt = i / me.channels, c = i - jt * me.channels;
    const int j = jt / taps, tap = jt - j * taps, a = tap / p.d, b = tap - a * p.d;
    if (c >= p.intrinsic - me.first) continue;
    const A* const slot = slots + j * tap_slots + b * p.d * p.tile.tap_splits * me.channels + c;
    A total = 0;
    for (int q = 0; q < p.tile.tap_splits; ++q) total += slot[(q * p.d + a) * me.channels];
    A& out = static_cast<A*>(
        p.dw2_sums)[worker * all_taps + (int64_t{me.first + c} * p.ghosts_per_map + j0 + j) * taps +
                    tap];
    out = more ? out + total : total;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T>)
    ghost_backward_grads_kernel(CheapParams p) {
  using A = Accumulator<T>;
  const int pad = p.d / 2, taps = p.d * p.d;
  GHOST_DYN_SHARED(unsigned char, shared);
  T* const y = reinterpret_cast<T*>(shared + p.tile.y_at);
  T* const grads = reinterpret_cast<T*>(shared + p.tile.grad_at);  // dz, then dv in its place
  T* const dy = reinterpret_cast<T*>(shared + p.tile.dy_at);  // grad of y, then sums over ghosts
  A* const norm1 = reinterpret_cast<A*>(shared + p.tile.norm1_at);
  A* const norm2 = reinterpret_cast<A*>(shared + p.tile.norm2_at);
  A* const w2 = reinterpret_cast<A*>(shared + p.tile.taps_at);
  A* const slots = reinterpret_cast<A*>(shared + p.tile.slots_at);
  // The worker index runs fastest. The grid has one dimension: y has room for 65,535 blocks only,
  // and the channel blocks may be more.
  const int block = static_cast<int>(blockIdx.x);
  const int worker = block % p.tile.workers;
  const Owner me(p, block / p.tile.workers * p.tile.channels);

  for (int c = me.tid; c < me.channels; c += kThreads) {
    Affine<A> f;
    if (me.first + c < p.intrinsic) f = load_affine<A>(p.norm1, me.first + c);
    norm1[kScale * me.channels + c] = f.scale;
    norm1[kShift * me.channels + c] = f.shift;
    norm1[kMean * me.channels + c] = f.mean;
  }
  if (p.act1 == Act::kPReLU) {
#pragma unroll 1
    for (int c = me.tid; c < me.channels; c += kThreads)
      norm1[kSlope1 * me.channels + c] =
          me.first + c < p.intrinsic ? load_param<A>(p.slopes1, me.first + c) : A(0);
  }
  const bool needs_dy = p.sums1 != nullptr;
  // This thread's sums of the gradients of the slopes of act1.
  A* const slope_sums =
      reinterpret_cast<A*>(shared + p.tile.slopes_at) + me.group * me.channels + me.pair;
  if (p.act1 == Act::kPReLU && me.active()) store_pair(slope_sums, A(0), A(0));
  const int tap_slots = taps * p.tile.tap_splits * me.channels;  // of a ghost
  // The border of dv outside the box of v stays zero: it lies outside the image.
  for (int i = me.tid * 2; p.ghosts_per_map > 0 && i < p.tile.images * p.grad_map.image_rows *
                                                           p.grad_map.pitch * p.grad_map.stride;
       i += 2 * kThreads)
    store_pair(grads + i, A(0), A(0));
  const bool all_kept = p.tile.ghosts >= p.ghosts_per_map;
  if (p.ghosts_per_map > 0 && all_kept) begin_ghosts<T>(p, me, 0, p.ghosts_per_map, shared);
  prim::sync_threads();

  A scale1[2], shift1[2], mean1[2];
  load_pair(norm1 + kScale * me.channels + me.pair, scale1);
  load_pair(norm1 + kShift * me.channels + me.pair, shift1);
  load_pair(norm1 + kMean * me.channels + me.pair, mean1);
  A sum[2] = {}, sum_hat[2] = {};
  const int stored =
      static_cast<int>(p.da1_pitch) - me.first;  // channels of da1's rows, padding too
  const int valid = p.intrinsic - me.first;

  for (int64_t index = worker; index < p.tile.tiles; index += p.tile.workers) {
    const TileOrigin o = tile_origin(p.tile, index);
    const TileOrigin v_origin{o.n0, o.h0 - p.tile.halo_rows, o.w0 - p.tile.halo_cols};
    const int grads_row = pad - p.tile.halo_rows, grads_col = pad - p.tile.halo_cols;
    SharedMap v_map = p.grad_map;  // of the box of v inside dv
    T* const grads_v = grads + v_map.offset(0, grads_row, grads_col);
    if (needs_dy)
      copy_grad<T>(p, me, me.first, 1, valid < me.channels ? valid : me.channels, p.y_grad_bytes,
                   p.inner, o, p.dy_map, dy);
    if (p.ghosts_per_map > 0) copy_ghost_grad<T>(p, me, 0, p.v, v_origin, v_map, grads_v);
    prim::cp_async_commit();
    load_y<T>(p, me, TileOrigin{v_origin.n0, v_origin.h0 - pad, v_origin.w0 - pad}, norm1, y);
    prim::cp_async_wait<0>();
    prim::sync_threads();

    int j = 0;
    do {  // once without ghosts, too: da1 is computed all the same
      if (p.ghosts_per_map > 0) {
        if (j > 0) {
          copy_ghost_grad<T>(p, me, j, p.v, v_origin, v_map, grads_v);
          prim::cp_async_commit();
          prim::cp_async_wait<0>();
          prim::sync_threads();
        }
        if (!all_kept) begin_ghosts<T>(p, me, j, 1, shared);
        const int kept = all_kept ? j : 0;  // the ghost's place in shared memory
        const A* const norm = norm2 + kept * kNorm2Rows * me.channels;
        cheap_gradient<kMean>(
            p, me, j, v_origin, y, grads, grads_row, grads_col, norm,
            w2 + kept * taps * me.channels,
            [&](int offset, int pixels, const A(&v)[kStripValues], const A(&da2)[kStripValues],
                unsigned exists) {
              A scale[2], of_v[2], rest[2];
              load_pair(norm + kScale * me.channels + me.pair, scale);
              load_pair(norm + kDvV * me.channels + me.pair, of_v);
              load_pair(norm + kDvConst * me.channels + me.pair, rest);
#pragma unroll
              for (int i = 0; i < kStrip; ++i) {
                if (i >= pixels) break;
                A dv[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  const int k = 2 * i + e;
                  // With frozen statistics dv does not depend on v, even if v is Inf.
                  const A other = p.batch_stats ? prim::fma(of_v[e], v[k], rest[e]) : A(0);
                  dv[e] = (exists >> k & 1u) ? prim::fma(scale[e], da2[k], other) : A(0);
                }
                store_pair(grads + offset + i * p.grad_map.stride, dv[0], dv[1]);
              }
            },
            [](const A(&)[kStripValues]) {});
        prim::sync_threads();
        if (p.dw2_sums != nullptr)
          add_weight_gradient<T>(p.d, p, me, y, grads, slots + kept * tap_slots);
      }

      const bool last = j + 1 >= p.ghosts_per_map;
      for (int item = me.group; needs_dy && me.active() && item < p.inner_strips.count;
           item += me.groups) {
        BoxPixel at = locate(p.inner_strips, item);
        at.col *= kStrip;
        const int n = o.n0 + at.image, h = o.h0 + at.row, w = o.w0 + at.col;
        const int64_t first_pixel = (int64_t{n} * p.height + h) * p.width + w;
        T* const own = dy + p.dy_map.offset(at.image, at.row, at.col) + me.pair;
        const unsigned exists =  // bit i: pixel i of the strip is in the tile and in the image
            pixels_inside(p, n, h, w, min_of(p.inner.cols - at.col, kStrip));
        A u[kStripValues], g[kStripValues];
        if (p.ghosts_per_map > 0) {
          Strip<A> back = {};
          depthwise_window<true>(
              p.d, grads + p.grad_map.offset(at.image, at.row, at.col) + me.pair, p.grad_map.stride,
              p.grad_map.pitch * p.grad_map.stride,
              w2 + (all_kept ? j : 0) * taps * me.channels + tap_at(me.pair, 0, taps), back);
#pragma unroll
          for (int i = 0; i < kStripValues; ++i) g[i] = back[i / 2][i & 1];
        } else {
#pragma unroll
          for (int i = 0; i < kStripValues; ++i) g[i] = A(0);
        }
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
          A pair[2] = {0, 0};
          if (exists >> i & 1u) load_pair(own + i * p.dy_map.stride, pair);
          g[2 * i] += pair[0];
          g[2 * i + 1] += pair[1];
        }
        if (!last) {
#pragma unroll
          for (int i = 0; i < kStrip; ++i)
            if (exists >> i & 1u) store_pair(own + i * p.dy_map.stride, g[2 * i], g[2 * i + 1]);
          continue;
        }
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
          A pair[2] = {mean1[0], mean1[1]};
          if ((exists >> i & 1u) && me.pair < valid)
            load_pair(
                static_cast<const T*>(p.u) + (first_pixel + i) * p.u_pitch + me.first + me.pair,
                pair);
#pragma unroll
          for (int e = 0; e < 2; ++e) u[2 * i + e] = pair[e];
        }
        activate_grad(
            p.act1,
            [&](int e) {
              return p.act1 == Act::kPReLU ? norm1[kSlope1 * me.channels + me.pair + e]
                                           : static_cast<A>(p.slope1);
            },
            scale1, shift1, u, g,
            [&](const A(&products)[kStripValues]) {
              A slopes[2];
              load_pair(slope_sums, slopes);
#pragma unroll
              for (int i = 0; i < kStripValues; ++i)
                if (exists >> (i / 2) & 1u) slopes[i & 1] += products[i];
              store_pair(slope_sums, slopes[0], slopes[1]);
            });
#pragma unroll
        for (int i = 0; i < kStrip; ++i) {
          if (!(exists >> i & 1u)) continue;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            // The sums must be those of the da1 that the next launch reads.
            g[2 * i + e] = prim::to_float(prim::from_float<T>(g[2 * i + e]));
            sum[e] += g[2 * i + e];
            sum_hat[e] = prim::fma(g[2 * i + e], u[2 * i + e] - mean1[e], sum_hat[e]);
          }
          if (me.pair < stored)
            store_pair(
                static_cast<T*>(p.da1) + (first_pixel + i) * p.da1_pitch + me.first + me.pair,
                g[2 * i], g[2 * i + 1]);
        }
      }
      prim::sync_threads();
      if (!all_kept) {
        if (p.dw2_sums != nullptr) end_ghosts<T>(p, me, j, 1, worker, index > worker, slots);
        prim::sync_threads();
      }
    } while (++j < p.ghosts_per_map);
  }

  if (all_kept && p.dw2_sums != nullptr)
    end_ghosts<T>(p, me, 0, p.ghosts_per_map, worker, false, slots);
  if (!needs_dy) return;
  // da1's sums, over the threads that share a pair of channels.
  prim::sync_threads();
  A* const own = slots + me.group * me.channels + me.pair;
  A* const own_hat = own + me.groups * me.channels;
  if (me.active()) {
    store_pair(own, sum[0], sum[1]);
    store_pair(own_hat, sum_hat[0], sum_hat[1]);
  }
  prim::sync_threads();
#pragma unroll 1
  for (int i = me.tid; i < 2 * me.channels; i += kThreads) {
    const int kind = i / me.channels, c = i - kind * me.channels;
    if (c >= valid) continue;
    A total = 0;
    for (int k = 0; k < me.groups; ++k) total += slots[(kind * me.groups + k) * me.channels + c];
    if (kind == 1)
      total *= prim::rsqrt(load_param<A>(p.norm1.var, me.first + c) + static_cast<A>(p.norm1.eps));
    static_cast<A*>(p.sums1)[(int64_t{worker} * 2 + kind) * p.intrinsic + me.first + c] = total;
  }
  if (p.slope_sums1 == nullptr) return;
#pragma unroll 1
  for (int c = me.tid; c < me.channels && c < valid; c += kThreads) {
    const A* const first = reinterpret_cast<const A*>(shared + p.tile.slopes_at) + c;
    A total = 0;
#pragma unroll 1
    for (int k = 0; k < me.groups; ++k) total += first[k * me.channels];
    static_cast<A*>(p.slope_sums1)[int64_t{worker} * p.intrinsic + me.first + c] = total;
  }
}

}  // namespace ghost::cuda
