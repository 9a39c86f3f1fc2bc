// Third launch of the backward pass if dw1 fits into a block's registers: both products from one
// tile of du. 16-bit types, NHWC, stride 1.
//
//   du  = scale1 (da1 - mean(da1) - uhat mean(da1 uhat))      (frozen statistics: scale1 da1)
//       = a da1 + b u + c, with coefficients a, b, c per channel
//   dx  = du w1      rows: pixels, columns: channels of x, summed over the intrinsic channels
//   dw1 = du^T x     rows: intrinsic channels, columns: channels of x, summed over pixels
//   u   = x w1^T     if a block has all channels of x, rounded as in the first launch;
//                    else u is read
//
// Tile map: a persistent block owns a slice of the channels of x and all intrinsic channels, and
// takes every workers-th tile of pixels. Blocks that differ in the slice alone are neighbours: they
// read the same da1 and u at the same time, once from memory and then from L2. w1 stays in shared
// memory. A stage holds a tile's da1 (later du in its place), u and x, [pixel][channel]; there are
// two stages, so that the next tile is copied while this one is computed. A warp takes units (Unit)
// of 16 or 32 pixels x 32 columns of u and dx, and owns its part of dw1 (Grid) over all tiles.
// Binding resource: memory traffic: da1, x and dx pass once.
#pragma once

#include "cuda/backward_primary.cuh"

namespace ghost::cuda {

// Rows of the coefficients [3][channels] in shared memory.
enum : int { kDuGrad = 0, kDuU = 1, kDuConst = 2 };

// Sums the coefficients of all channels. Ends with a barrier.
template <class A>
__device__ __forceinline__ void load_du_coefficients(const PrimaryParams& p, int padded,
                                                     A* coefficients, A* combine) {
  load_coefficients(p, 0, p.intrinsic, padded, coefficients, combine);
  for (int i = static_cast<int>(threadIdx.x); i < padded; i += kThreads) {
    const A scale = coefficients[kDuScale * padded + i], mean = coefficients[kDuMean * padded + i];
    const A hat = p.batch_stats ? coefficients[kDuHat * padded + i] : A(0);
    const A mean_grad = coefficients[kDuMeanGrad * padded + i];
    coefficients[kDuU * padded + i] = hat * scale;
    coefficients[kDuConst * padded + i] = p.batch_stats ? -(mean_grad + mean * hat) * scale : A(0);
  }
  prim::sync_threads();
}

// Rows [first, first + rows) of a pixel-major map to shared memory [row][ld], in the background;
// zeros past the last pixel. Elements past the `valid` channels are left unchanged. The vectors of
// a row belong to 1 << shift neighbouring threads.
template <class T>
__device__ __forceinline__ void copy_rows(const T* map, int64_t pitch, int pixels, int first,
                                          int rows, int valid, int shift, T* shared, int ld) {
  const int tid = static_cast<int>(threadIdx.x);
  const int c = (tid & ((1 << shift) - 1)) * kVector<T>, step = kThreads >> shift;
  if (c >= valid) return;
  const int there = min_of(rows, pixels - first);
  int r = tid >> shift;
  const T* from = map + (first + r) * pitch + c;
  T* to = shared + r * ld + c;
#pragma unroll 4
  for (; r < there; r += step, from += step * pitch, to += step * ld)
    prim::cp_async<16>(to, from, true);
#pragma unroll 1
  for (; r < rows; r += step, to += step * ld) prim::store<uint4>(to, uint4{0, 0, 0, 0});
}

// The maps of a tile in one stage of shared memory: du [pixel][du_ld], x [pixel][x_ld] and
// u [pixel][du_ld].
template <class T>
struct DuStage {
  T *du, *x, *u;
  int du_ld, x_ld;

  __device__ __forceinline__ DuStage(const PrimaryParams& p, unsigned char* shared, int stage)
      : du_ld(p.plan.du.padded_m + 8), x_ld(p.plan.du.padded_c + 8) {
    du = reinterpret_cast<T*>(shared + p.plan.du.stages_at + stage * p.plan.du.stage_bytes);
    x = du + p.plan.du.pixels * du_ld;
    u = x + p.plan.du.pixels * x_ld;
  }
};

template <class T>
__device__ __forceinline__ void copy_du_tile(const PrimaryParams& p, int first, int c0, int cols,
                                             const DuStage<T>& to) {
  const DuTile& t = p.plan.du;
  copy_rows(static_cast<const T*>(p.da1), p.da1_pitch, p.pixels, first, t.pixels,
            static_cast<int>(p.da1_pitch), t.m_shift, to.du, to.du_ld);
  if (t.makes_u || p.plan.dw1_splits > 0)
    copy_rows(static_cast<const T*>(p.x) + c0, p.channels, p.pixels, first, t.pixels, cols,
              t.c_shift, to.x, to.x_ld);
  if (p.batch_stats && !t.makes_u)
    copy_rows(static_cast<const T*>(p.u), p.u_pitch, p.pixels, first, t.pixels,
              static_cast<int>(p.u_pitch), t.m_shift, to.u, to.du_ld);
  prim::cp_async_commit();
}

__device__ __forceinline__ void load_four(const float* p, float (&v)[4]) {
  const float4 raw = prim::load<float4>(p);
  v[0] = raw.x;
  v[1] = raw.y;
  v[2] = raw.z;
  v[3] = raw.w;
}

// Overwrites da1 by du, a vector of channels a thread, with u from shared memory. Past the last
// pixel du is not zero, but x is.
template <class T>
__device__ __forceinline__ void du_from_u(const PrimaryParams& p, const DuStage<T>& s,
                                          const float* coefficients) {
  const int padded = p.plan.du.padded_m, shift = p.plan.du.m_shift;
  const int tid = static_cast<int>(threadIdx.x);
  const int k = (tid & ((1 << shift) - 1)) * kVector<T>;
  if (k >= padded) return;
#pragma unroll 1
  for (int r = tid >> shift; r < p.plan.du.pixels; r += kThreads >> shift) {
    T* const at = s.du + r * s.du_ld + k;
    float g[kVector<T>], u[kVector<T>] = {};
    unpack<T>(prim::load<uint4>(at), g);
    if (p.batch_stats) unpack<T>(prim::load<uint4>(s.u + r * s.du_ld + k), u);
#pragma unroll
    for (int e = 0; e < kVector<T>; e += 4) {
      float a[4], b[4], c[4];
      load_four(coefficients + kDuGrad * padded + k + e, a);
      load_four(coefficients + kDuU * padded + k + e, b);
      load_four(coefficients + kDuConst * padded + k + e, c);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        g[e + i] = prim::fma(g[e + i], a[i], prim::fma(u[e + i], b[i], c[i]));
    }
    prim::store<uint4>(at, pack<T>(g));
  }
}

// The warp's number by a shuffle, so that the compiler treats it as uniform in the warp.
__device__ __forceinline__ int uniform_warp() {
  return prim::shuffle(static_cast<int>(prim::warp()), 0);
}

// Calls f(row, col) for each of this warp's units, which begins at pixel Unit::kRows * row and at
// column Unit::kCols * col.
template <class Unit, class F>
__device__ __forceinline__ void for_units(int pixels, int cols, const F& f) {
  const int rows = pixels / Unit::kRows, all = (cols + Unit::kCols - 1) / Unit::kCols;
  int row = uniform_warp(), col = 0;
  while (true) {
    for (; row >= rows; row -= rows) ++col;
    if (col >= all) return;
    f(row, col);
    row += kWarps;
  }
}

// acc = one unit of a product: a and b point at its first row and column; the sums have `depth`
// terms, a multiple of 16.
template <class P, class Unit, bool kBTrans, int kPairs>
__device__ __forceinline__ void sum_unit(const typename P::T* a, int lda, const typename P::T* b,
                                         int ldb, int depth,
                                         float (&acc)[Unit::kTilesM][Unit::kTilesN][4]) {
  MmaStep<P, Unit, false, kBTrans> step(a, lda, b, ldb);
#pragma unroll 1
  for (int k = 0; k < depth; k += P::kStep, step.advance(P::kStep, P::kStep * (kBTrans ? ldb : 1)))
    step.run(acc, Unit::kTilesM, kPairs);
}
template <class P, class Unit, bool kBTrans>
__device__ __forceinline__ void unit_product(const typename P::T* a, int lda,
                                             const typename P::T* b, int ldb, int depth, int pairs,
                                             float (&acc)[Unit::kTilesM][Unit::kTilesN][4]) {
  if (pairs == 2)
    sum_unit<P, Unit, kBTrans, 2>(a, lda, b, ldb, depth, acc);
  else
    sum_unit<P, Unit, kBTrans, 1>(a, lda, b, ldb, depth, acc);
}

// Overwrites da1 by du, with u = x w1^T.
template <class P, class Unit>
__device__ __forceinline__ void du_from_x(const PrimaryParams& p, const DuStage<typename P::T>& s,
                                          const typename P::T* w1, const float* coefficients) {
  using T = typename P::T;
  const int padded = p.plan.du.padded_m;
  for_units<Unit>(p.plan.du.pixels, padded, [&](int row, int col) {
    const int pairs = min_of((padded - col * Unit::kCols) / 16, 2);
    float acc[Unit::kTilesM][Unit::kTilesN][4] = {};
    unit_product<P, Unit, false>(s.x + row * Unit::kRows * s.x_ld, s.x_ld,
                                 w1 + col * Unit::kCols * s.x_ld, s.x_ld, p.plan.du.padded_c, pairs,
                                 acc);
#pragma unroll
    for (int nt = 0; nt < Unit::kTilesN; ++nt) {
      const int first = col * Unit::kCols + nt * 8;
      if (first >= p.da1_pitch) break;  // the padding stays zero
      const int k = first + static_cast<int>(prim::lane() & 3) * 2;
      float a[2], b[2], c[2];
      load_pair(coefficients + kDuGrad * padded + k, a);
      load_pair(coefficients + kDuU * padded + k, b);
      load_pair(coefficients + kDuConst * padded + k, c);
#pragma unroll
      for (int i = 0; i < 2 * Unit::kTilesM; ++i) {
        const int r = row * Unit::kRows + Unit::lane_row() + i * 8;
        const float (&v)[4] = acc[i / 2][nt];
        T* const at = s.du + r * s.du_ld + k;
        float g[2];
        load_pair(at, g);
        const float2 u = prim::unpack_pair<T>(prim::pack_pair<T>(v[i % 2 * 2], v[i % 2 * 2 + 1]));
        store_pair(at, prim::fma(g[0], a[0], prim::fma(u.x, b[0], c[0])),
                   prim::fma(g[1], a[1], prim::fma(u.y, b[1], c[1])));
      }
    }
  });
}

// Transposes a 4 x 4 matrix of words over four neighbouring lanes: v[i] of lane q becomes v[q] of
// lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
  const int t = static_cast<int>(prim::lane() & 3);
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      uint32_t& low = v[i];
      uint32_t& high = v[i + bit];
      const uint32_t other = prim::shuffle_xor((t & bit) ? low : high, bit);
      if (t & bit)
        low = other;
      else
        high = other;
    }
}

// dx of a tile, straight from the accumulators: four lanes exchange words, so that each of them
// stores whole vectors of a row.
template <class P, class Unit>
__device__ __forceinline__ void make_dx(const PrimaryParams& p, int first, int c0, int cols,
                                        const DuStage<typename P::T>& s, const typename P::T* w1) {
  using T = typename P::T;
  for_units<Unit>(p.plan.du.pixels, cols, [&](int row, int col) {
    const int pairs = min_of((cols - col * Unit::kCols + 15) / 16, 2);
    float acc[Unit::kTilesM][Unit::kTilesN][4] = {};
    unit_product<P, Unit, true>(s.du + row * Unit::kRows * s.du_ld, s.du_ld, w1 + col * Unit::kCols,
                                s.x_ld, p.plan.du.padded_m, pairs, acc);
#pragma unroll
    for (int i = 0; i < Unit::kTilesM * Unit::kTilesN / 2; ++i) {
      const int mt = i % Unit::kTilesM, pair = i / Unit::kTilesM;
      if (pair >= pairs) break;
      uint32_t v[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float (&result)[4] = acc[mt][2 * pair + (q & 1)];
        v[q] = prim::pack_pair<T>(result[q & 2], result[(q & 2) + 1]);
      }
      transpose_quad(v);
      const int q = static_cast<int>(prim::lane() & 3);
      const int pixel = first + row * Unit::kRows + mt * 16 + Unit::lane_row() + (q >> 1) * 8;
      const int c = col * Unit::kCols + pair * 16 + (q & 1) * 8;
      if (pixel < p.pixels && c < cols)
        prim::store<uint4>(static_cast<T*>(p.dx) + int64_t{pixel} * p.channels + c0 + c,
                           uint4{v[0], v[1], v[2], v[3]});
    }
  });
}

// The block's sum of dw1. The sums of the kWarpsK groups of warps are added in order of the group,
// through the shared memory of the stages, which is free after the last tile.
template <class Grid>
__device__ __forceinline__ void store_dw1(const PrimaryParams& p, int worker, int c0, int cols,
                                          float* shared,
                                          float (&acc)[Grid::kTilesM][Grid::kTilesN][4]) {
  constexpr int kCount = Grid::kTilesM * Grid::kTilesN * 4, kGroup = kThreads / Grid::kWarpsK;
  const int tid = static_cast<int>(threadIdx.x);
  if constexpr (Grid::kWarpsK > 1) {
    prim::sync_threads();
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      shared[i * kThreads + tid] = acc[i / 4 / Grid::kTilesN][i / 4 % Grid::kTilesN][i % 4];
    prim::sync_threads();
    if (tid >= kGroup) return;
  }
  float* const out = static_cast<float*>(p.dw1_sums) + int64_t{worker} * p.intrinsic * p.channels;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int mt = i / 4 / Grid::kTilesN, nt = i / 4 % Grid::kTilesN;
    const int r = Grid::row(mt, i % 4 / 2), c = Grid::col(nt) + (i & 1);
    if (r >= p.intrinsic || c >= cols) continue;
    float sum = acc[mt][nt][i % 4];
#pragma unroll
    for (int k = 1; k < Grid::kWarpsK; ++k) sum += shared[i * kThreads + k * kGroup + tid];
    out[int64_t{r} * p.channels + c0 + c] = sum;
  }
}

template <class P, class Grid, class Unit>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<typename P::T>)
    ghost_backward_du_kernel(PrimaryParams p) {
  using T = typename P::T;
  GHOST_DYN_SHARED(unsigned char, shared);
  const DuTile& t = p.plan.du;
  const int block = static_cast<int>(blockIdx.x);
  const int worker = block / t.slices, c0 = (block - worker * t.slices) * t.channels;
  const int cols = min_of(p.channels - c0, t.channels);
  T* const w1 = reinterpret_cast<T*>(shared);  // [padded_m][padded_c + 8]
  float* const coefficients = reinterpret_cast<float*>(shared + t.coefficients_at);

  // Clears the padding of all rows, which no copy writes.
  for (int i = static_cast<int>(threadIdx.x) * 16; i < p.plan.smem_bytes; i += kThreads * 16)
    prim::store<uint4>(shared + i, uint4{0, 0, 0, 0});
  prim::sync_threads();
  copy_rows(static_cast<const T*>(p.w1) + c0, p.channels, p.intrinsic, 0, t.padded_m, cols,
            t.c_shift, w1, t.padded_c + 8);
  copy_du_tile<T>(p, worker * t.pixels, c0, cols, DuStage<T>(p, shared, 0));
  load_du_coefficients<float>(p, t.padded_m, coefficients,
                              reinterpret_cast<float*>(shared + t.combine_at));

  const int active_m = prim::shuffle(Grid::active_m(p.intrinsic), 0);
  const int active_n = prim::shuffle(Grid::active_n(cols), 0);
  float acc[Grid::kTilesM][Grid::kTilesN][4] = {};
  int stage = 0;
  for (int tile = worker; tile < t.tiles; tile += t.workers, stage ^= 1) {
    const DuStage<T> s(p, shared, stage);
    prim::cp_async_wait<0>();
    prim::sync_threads();  // the tile has landed, and the stage of the one before is free
    if (tile + t.workers < t.tiles)
      copy_du_tile<T>(p, (tile + t.workers) * t.pixels, c0, cols, DuStage<T>(p, shared, stage ^ 1));
    if (p.batch_stats && t.makes_u)
      du_from_x<P, Unit>(p, s, w1, coefficients);
    else
      du_from_u<T>(p, s, coefficients);
    prim::sync_threads();
    if (p.dx != nullptr) make_dx<P, Unit>(p, tile * t.pixels, c0, cols, s, w1);
    if (p.plan.dw1_splits == 0) continue;
    constexpr int kStep = Grid::kWarpsK * P::kStep;
    const int k0 = prim::shuffle(Grid::warp_k(), 0) * P::kStep;
    MmaStep<P, Grid, true, true> step(s.du + k0 * s.du_ld, s.du_ld, s.x + k0 * s.x_ld, s.x_ld);
#pragma unroll 1
    for (int k = k0; k < t.pixels; k += kStep, step.advance(kStep * s.du_ld, kStep * s.x_ld))
      step.run(acc, active_m, active_n);
  }
  if (p.plan.dw1_splits > 0)
    store_dw1<Grid>(p, worker, c0, cols, reinterpret_cast<float*>(shared + t.stages_at), acc);
}

}  // namespace ghost::cuda
