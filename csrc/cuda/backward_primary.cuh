// Third launch of the backward pass: both products with du, by the block's index.
//
//   du  = scale1 (da1 - mean(da1) - uhat mean(da1 uhat))      (frozen statistics: scale1 da1)
//   dx  = du w1      rows: pixels, columns: channels of x, summed over the intrinsic channels
//   dw1 = du^T x     rows: intrinsic channels, columns: channels of x, summed over pixels; a block
//                    sums one slice of the pixels
//   without a primary convolution dx = du
//
// du is never in main memory: it is computed on the way to shared memory, as
// [pixel][intrinsic channel].
// Tile map: a block makes tiles of kProductRows x kProductCols results of dx, or one of dw1. The
// warps share a product as in gemm.cuh; in the copies neighbouring threads take neighbouring
// 16-byte vectors.
// Binding resource: memory traffic. For dx a tile of du stays in shared memory while all of w1
// passes through; x and dx pass once.
#pragma once

#include "cuda/backward_common.cuh"
#include "cuda/tile.cuh"

namespace ghost::cuda {

struct PrimaryParams {
  int pixels = 0;  // of u, of all images
  int intrinsic = 0, channels = 0;
  int height = 0, width = 0, stride = 1;  // of x
  bool nhwc = false, has_primary = true, batch_stats = true;
  FastDiv by_plane, by_width;  // of u
  const void* da1 = nullptr;   // [pixel][da1_pitch]
  const void* u = nullptr;     // [pixel][u_pitch]
  int64_t da1_pitch = 0, u_pitch = 0;
  NormParams norm1;
  const void* sums1 = nullptr;  // [sums1_rows][2][m]
  int sums1_rows = 0;
  double values1 = 1;        // divisor that makes means of the sums over all rows of sums1
  const void* x = nullptr;   // [N, C, height, width]
  const void* w1 = nullptr;  // [m, C]
  void* dx = nullptr;
  void* dw1_sums = nullptr;                     // [splits][m, C]
  int x_bytes = 0, w1_bytes = 0, dx_bytes = 0;  // width of aligned copies
  PrimaryGradPlan plan;                         // in shared memory the coefficients are at 0
};

// Rows of the coefficients [4][channels] in shared memory.
enum : int { kDuScale = 0, kDuMean = 1, kDuHat = 2, kDuMeanGrad = 3 };

// Coefficients of du for channels [first, first + count), zeros up to `padded`. All threads call
// it; it ends with a barrier.
template <class A>
__device__ __forceinline__ void load_coefficients(const PrimaryParams& p, int first, int count,
                                                  int padded, A* coefficients, A* combine) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < padded; i += kThreads) {
    Affine<A> f;
    if (i < count) f = load_affine<A>(p.norm1, first + i);
    coefficients[kDuScale * padded + i] = f.scale;
    coefficients[kDuMean * padded + i] = f.mean;
    coefficients[kDuHat * padded + i] = f.inv_std;  // times -mean(da1 uhat), below
    coefficients[kDuMeanGrad * padded + i] = 0;
  }
  prim::sync_threads();
  if (!p.batch_stats) return;
  const A pixels = static_cast<A>(p.values1);
  const A* const sums = static_cast<const A*>(p.sums1) + first;
  sum_rows(sums, p.sums1_rows, 2 * int64_t{p.intrinsic}, count, combine,
           [&](int i, A sum) { coefficients[kDuMeanGrad * padded + i] = sum / pixels; });
  sum_rows(sums + p.intrinsic, p.sums1_rows, 2 * int64_t{p.intrinsic}, count, combine,
           [&](int i, A sum) { coefficients[kDuHat * padded + i] *= -(sum / pixels); });
}

// load_coefficients for problems of many channels, for which the plan allows few rows of partial
// sums. One thread adds up the rows of a channel, because the product leaves few registers.
template <class A>
__device__ __forceinline__ void reload_coefficients(const PrimaryParams& p, int first, int count,
                                                    int padded, A* coefficients) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < padded; i += kThreads) {
    Affine<A> f;
    A grad = 0, grad_hat = 0;
    if (i < count) {
      f = load_affine<A>(p.norm1, first + i);
      const A* sums = static_cast<const A*>(p.sums1) + first + i;
#pragma unroll 1
      for (int r = 0; p.batch_stats && r < p.sums1_rows; ++r, sums += 2 * int64_t{p.intrinsic}) {
        grad += sums[0];
        grad_hat += sums[p.intrinsic];
      }
    }
    const A pixels = static_cast<A>(p.values1);
    coefficients[kDuScale * padded + i] = f.scale;
    coefficients[kDuMean * padded + i] = f.mean;
    coefficients[kDuHat * padded + i] = f.inv_std * -(grad_hat / pixels);
    coefficients[kDuMeanGrad * padded + i] = grad / pixels;
  }
  prim::sync_threads();
}

// du of pixels [first, first + rows) and channels [k0, k0 + depth) to shared memory [row][ld],
// zeros past the last pixel and channel. depth: a multiple of 16; coefficients: of channel k0 on.
template <class T>
__device__ __forceinline__ void build_du(const PrimaryParams& p, int first, int rows, int k0,
                                         int depth, const Accumulator<T>* coefficients,
                                         int coefficients_step, T* du, int ld) {
  using A = Accumulator<T>;
  constexpr int kUnroll = 4;
  int lanes = 1;  // vectors of a row, rounded up to a power of two
  while (lanes * kVector<T> < depth) lanes *= 2;
  const int tid = static_cast<int>(threadIdx.x), step = kThreads / lanes;
  const int k = (tid & (lanes - 1)) * kVector<T>;
  if (k >= depth) return;
  for (int r0 = tid / lanes; r0 < rows; r0 += kUnroll * step) {
    uint4 g_raw[kUnroll], u_raw[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t pixel = int64_t{first} + r0 + i * step;
      g_raw[i] = u_raw[i] = uint4{0, 0, 0, 0};
      if (r0 + i * step < rows && pixel < p.pixels) {
        if (k0 + k < p.da1_pitch)
          g_raw[i] = prim::load_readonly<uint4>(static_cast<const T*>(p.da1) + pixel * p.da1_pitch +
                                                k0 + k);
        if (p.batch_stats && k0 + k < p.u_pitch)
          u_raw[i] =
              prim::load_readonly<uint4>(static_cast<const T*>(p.u) + pixel * p.u_pitch + k0 + k);
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (r0 + i * step >= rows) continue;
      const bool exists = first + r0 + i * step < p.pixels;
      A g[kVector<T>];
      unpack<T>(g_raw[i], g);
      const A* const c = coefficients + k;
      if (p.batch_stats) {
        A u[kVector<T>];
        unpack<T>(u_raw[i], u);
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e)
          g[e] = prim::fma(u[e] - c[kDuMean * coefficients_step + e],
                           c[kDuHat * coefficients_step + e],
                           g[e] - c[kDuMeanGrad * coefficients_step + e]);
      }
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e)
        g[e] = exists ? g[e] * c[kDuScale * coefficients_step + e] : A(0);
      prim::store<uint4>(du + (r0 + i * step) * ld + k, pack<T>(g));
    }
  }
}

// kVector<T> elements to shared memory in the background; zeros from element `valid` on. bytes: the
// alignment of the address, 16, 8, 4 or one element.
template <class T>
__device__ __forceinline__ void copy_vector(T* shared, const T* global, int valid, int bytes) {
  const int piece = bytes / static_cast<int>(sizeof(T));
  if (bytes == 16 && valid >= kVector<T>) {
    prim::cp_async<16>(shared, global, true);
  } else if (bytes == 8 && valid >= kVector<T>) {
    prim::cp_async<8>(shared, global, true);
    prim::cp_async<8>(shared + piece, global + piece, true);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) shared[e] = e < valid ? global[e] : prim::from_float<T>(0);
  }
}

// The pixel of x that a pixel of u reads.
struct InputPixel {
  int64_t image;
  int row, col;
};
__device__ __forceinline__ InputPixel input_pixel(const PrimaryParams& p, int pixel) {
  const int image = p.by_plane.split(pixel);
  const int row = p.by_width.split(pixel);
  return {image, row * p.stride, pixel * p.stride};
}

// dx of `rows` pixels from `first` on and `cols` channels from c0 on, from shared memory [row][ld].
// With a stride, a pixel of u owns a square of stride x stride pixels of dx: the value goes to its
// first pixel, zeros to the others.
template <class T>
__device__ __forceinline__ void store_dx(const PrimaryParams& p, int first, int rows, int c0,
                                         int cols, const T* stage, int ld) {
  using A = Accumulator<T>;
  const int tid = static_cast<int>(threadIdx.x);
  T* const dx = static_cast<T*>(p.dx);
  const int64_t plane = int64_t{p.height} * p.width;
  if (p.nhwc) {
    int lanes = 1;
    while (lanes * kVector<T> < cols) lanes *= 2;
    const int c = (tid & (lanes - 1)) * kVector<T>;
    for (int r = tid / lanes; r < rows && c < cols; r += kThreads / lanes) {
      A v[kVector<T>];
      unpack<T>(prim::load<uint4>(stage + r * ld + c), v);
      if (p.stride == 1) {
        store_vector<T>(dx + int64_t{first + r} * p.channels + c0 + c, 1, cols - c,
                        p.dx_bytes == 16, v);
        continue;
      }
      const InputPixel at = input_pixel(p, first + r);
      for (int h = at.row; h < at.row + p.stride && h < p.height; ++h)
        for (int w = at.col; w < at.col + p.stride && w < p.width; ++w) {
          store_vector<T>(dx + ((at.image * p.height + h) * p.width + w) * p.channels + c0 + c, 1,
                          cols - c, p.dx_bytes == 16, v);
#pragma unroll
          for (int e = 0; e < kVector<T>; ++e) v[e] = A(0);  // all but the first
        }
    }
  } else if (p.stride == 1 && p.dx_bytes == 16) {
    // Four vectors of pixels by eight channels a warp: free of bank conflicts, 64-byte runs.
    constexpr int kVectors = kProductRows / kVector<T>;
    for (int i = tid; i < kVectors * ((cols + 7) & ~7); i += kThreads) {
      const int low = i >> 5;
      const int r = (low % (kVectors / 4) * 4 + (i & 3)) * kVector<T>;
      const int c = low / (kVectors / 4) * 8 + ((i >> 2) & 7);
      if (r >= rows || c >= cols) continue;
      A v[kVector<T>];
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) v[e] = prim::to_float(stage[(r + e) * ld + c]);
      const InputPixel at = input_pixel(p, first + r);
      store_vector<T>(dx + (at.image * p.channels + c0 + c) * plane + at.row * p.width + at.col, 1,
                      rows - r, true, v);
    }
  } else {
    const int r = tid & (kProductRows - 1);
    if (r < rows) {
      const InputPixel at = input_pixel(p, first + r);
      for (int c = tid / kProductRows; c < cols; c += kThreads / kProductRows) {
        T* const out = dx + (at.image * p.channels + c0 + c) * plane;
        const T value = stage[r * ld + c];
        for (int h = at.row; h < at.row + p.stride && h < p.height; ++h)
          for (int w = at.col; w < at.col + p.stride && w < p.width; ++w)
            out[int64_t{h} * p.width + w] =
                h == at.row && w == at.col ? value : prim::from_float<T>(0);
      }
    }
  }
}

// Rows k0 .. k0 + depth of w1, columns c0 .. c0 + padded, to shared memory [row][ld]; zeros outside
// w1.
template <class T>
__device__ __forceinline__ void copy_w1(const PrimaryParams& p, int k0, int depth, int c0,
                                        int padded, T* shared, int ld) {
  int lanes = 1;
  while (lanes * kVector<T> < padded) lanes *= 2;
  const int tid = static_cast<int>(threadIdx.x);
  const int c = (tid & (lanes - 1)) * kVector<T>;
  if (c >= padded) return;
  const T* const w1 = static_cast<const T*>(p.w1);
  for (int k = tid / lanes; k < depth; k += kThreads / lanes) {
    const int valid = k0 + k < p.intrinsic ? p.channels - c0 - c : 0;
    copy_vector(shared + k * ld + c, w1 + int64_t{k0 + k} * p.channels + c0 + c, valid, p.w1_bytes);
  }
}

template <class P>
__device__ __forceinline__ void dx_role(const PrimaryParams& p, unsigned char* shared) {
  using T = typename P::T;
  using A = typename P::A;
  constexpr int kCols = kProductCols<sizeof(T)>, kW1Ld = kCols + 8;
  using Grid = WarpGrid<kCols>;
  static_assert(Grid::kRows == kProductRows);
  A* const coefficients = reinterpret_cast<A*>(shared);
  T* const du = reinterpret_cast<T*>(shared + p.plan.left_at);
  T* const right = reinterpret_cast<T*>(shared + p.plan.right_at);  // w1, then the results
  // The coefficients of all channels stay in shared memory, or those of a tile of du are loaded
  // with it.
  const int kept = p.plan.dx_coefficients;
  const bool all_kept = kept >= p.intrinsic;
  if (all_kept)
    load_coefficients(p, 0, p.intrinsic, kept, coefficients,
                      reinterpret_cast<A*>(shared + p.plan.combine_at));

  const int most_depth = p.plan.dx_depth, du_ld = most_depth + kVector<T>;
  const int stage_ld = p.nhwc ? kCols + kVector<T> : kCols + 2;
  const int width = p.has_primary ? kCols : most_depth;  // channels of x at a time
  const int tiles_n = ((p.has_primary ? p.channels : p.intrinsic) + width - 1) / width;
  for (int64_t item = blockIdx.x; item < p.plan.dx_items; item += p.plan.dx_blocks) {
    const int64_t tile = item / p.plan.dx_groups;
    const int group = static_cast<int>(item - tile * p.plan.dx_groups);
    const int first = static_cast<int>(tile * kProductRows);
    const int rows = p.pixels - first < kProductRows ? p.pixels - first : kProductRows;
    const int begin = tiles_n * group / p.plan.dx_groups,
              end = tiles_n * (group + 1) / p.plan.dx_groups;
    for (int ct = begin; ct < end; ++ct) {
      const int c0 = ct * width;
      if (!p.has_primary) {
        const int left = p.intrinsic - c0;
        prim::sync_threads();
        if (!all_kept) reload_coefficients(p, c0, min_of(left, most_depth), kept, coefficients);
        build_du<T>(p, first, rows, c0, left < most_depth ? (left + 15) & ~15 : most_depth,
                    coefficients + (all_kept ? c0 : 0), kept, du, du_ld);
        prim::sync_threads();
        store_dx<T>(p, first, rows, c0, left < most_depth ? left : most_depth, du, du_ld);
        continue;
      }
      const int cols = p.channels - c0 < kCols ? p.channels - c0 : kCols;
      const int active_m = Grid::active_m(rows), active_n = Grid::active_n(cols);
      A acc[Grid::kTilesM][Grid::kTilesN][4] = {};
      for (int k0 = 0; k0 < p.intrinsic; k0 += most_depth) {
        const int left = p.intrinsic - k0;
        const int depth = left < most_depth ? (left + 15) & ~15 : most_depth;
        prim::sync_threads();
        copy_w1<T>(p, k0, depth, c0, (cols + 15) & ~15, right, kW1Ld);
        prim::cp_async_commit();
        if (!all_kept) reload_coefficients(p, k0, min_of(left, most_depth), kept, coefficients);
        if (p.intrinsic > most_depth || ct == begin)  // else the tile's du is still there
          build_du<T>(p, first, kProductRows, k0, depth, coefficients + (all_kept ? k0 : 0), kept,
                      du, du_ld);
        prim::cp_async_wait<0>();
        prim::sync_threads();
        for (int k = 0; k < depth; k += P::kStep)
          MmaStep<P, Grid, false, true>(du + k, du_ld, right + k * kW1Ld, kW1Ld)
              .run(acc, active_m, active_n);
      }
      prim::sync_threads();
#pragma unroll
      for (int mt = 0; mt < Grid::kTilesM; ++mt)
        if (mt < active_m)
#pragma unroll
          for (int nt = 0; nt < Grid::kTilesN; ++nt)
            if (nt / 2 < active_n)
#pragma unroll
              for (int half = 0; half < 2; ++half)
                store_pair(right + Grid::row(mt, half) * stage_ld + Grid::col(nt),
                           acc[mt][nt][2 * half], acc[mt][nt][2 * half + 1]);
      prim::sync_threads();
      store_dx<T>(p, first, rows, c0, cols, right, stage_ld);
    }
  }
}

// x at pixels [first, first + rows) of u, channels [c0, c0 + padded), zeros outside, to shared
// memory: [pixel][channel] for NHWC, [channel][pixel] for NCHW, ld elements a row. rows: a multiple
// of 16, no more than dw1_pixels.
template <class T>
__device__ __forceinline__ void copy_x(const PrimaryParams& p, int first, int rows, int c0,
                                       int padded, T* shared, int ld) {
  const int tid = static_cast<int>(threadIdx.x);
  const T* const x = static_cast<const T*>(p.x);
  const int64_t plane = int64_t{p.height} * p.width;
  if (p.nhwc) {
    int lanes = 1;
    while (lanes * kVector<T> < padded) lanes *= 2;
    const int c = (tid & (lanes - 1)) * kVector<T>;
    if (c >= padded) return;
    for (int r = tid / lanes; r < rows; r += kThreads / lanes) {
      const bool exists = first + r < p.pixels;
      int64_t pixel = exists ? first + r : 0;
      if (p.stride != 1) {
        const InputPixel at = input_pixel(p, static_cast<int>(pixel));
        pixel = (at.image * p.height + at.row) * p.width + at.col;
      }
      copy_vector(shared + r * ld + c, x + pixel * p.channels + c0 + c,
                  exists ? p.channels - c0 - c : 0, p.x_bytes);
    }
  } else if (p.stride == 1 && p.x_bytes >= 8) {
    // An aligned plane holds whole vectors (halves of vectors, for 8 bytes).
    const int piece = p.x_bytes / static_cast<int>(sizeof(T)), pieces = rows / piece;
    for (int i = tid; i < pieces * padded; i += kThreads) {
      const int c = i / pieces, r = (i - c * pieces) * piece;
      const bool exists = first + r < p.pixels && c0 + c < p.channels;
      const InputPixel at = input_pixel(p, exists ? first + r : 0);
      const T* const in =
          x + (at.image * p.channels + (exists ? c0 + c : 0)) * plane + at.row * p.width + at.col;
      if (p.x_bytes == 16)
        prim::cp_async<16>(shared + c * ld + r, in, exists);
      else
        prim::cp_async<8>(shared + c * ld + r, in, exists);
    }
  } else {
    const int r = tid & (p.plan.dw1_pixels - 1), step = kThreads / p.plan.dw1_pixels;
    if (r >= rows) return;
    const bool pixel = first + r < p.pixels;
    const InputPixel at = input_pixel(p, pixel ? first + r : 0);
    const T* const in = x + at.image * p.channels * plane + int64_t{at.row} * p.width + at.col;
#pragma unroll 4
    for (int c = tid / p.plan.dw1_pixels; c < padded; c += step)
      shared[c * ld + r] =
          pixel && c0 + c < p.channels ? in[(c0 + c) * plane] : prim::from_float<T>(0);
  }
}

template <class P>
__device__ __forceinline__ void dw1_role(const PrimaryParams& p, int block, unsigned char* shared) {
  using T = typename P::T;
  using A = typename P::A;
  constexpr int kCols = kProductCols<sizeof(T)>;
  using Grid = WarpGrid<kCols>;
  A* const coefficients = reinterpret_cast<A*>(shared);
  T* const du = reinterpret_cast<T*>(shared + p.plan.left_at);
  T* const x = reinterpret_cast<T*>(shared + p.plan.right_at);
  const int tiles = p.plan.dw1_tiles_m * p.plan.dw1_tiles_n;
  const int split = block / tiles, tile = block - split * tiles;
  const int m0 = tile / p.plan.dw1_tiles_n * kProductRows, c0 = tile % p.plan.dw1_tiles_n * kCols;
  const int rows = p.intrinsic - m0 < kProductRows ? p.intrinsic - m0 : kProductRows;
  const int cols = p.channels - c0 < kCols ? p.channels - c0 : kCols;
  const int padded_m = (rows + 15) & ~15, padded_c = (cols + 15) & ~15;
  load_coefficients(p, m0, rows, padded_m, coefficients,
                    reinterpret_cast<A*>(shared + p.plan.combine_at));

  const int slices = (p.pixels + p.plan.dw1_pixels - 1) / p.plan.dw1_pixels;
  const int du_ld = padded_m + 8, x_ld = p.nhwc ? padded_c + 8 : p.plan.dw1_pixels + kVector<T>;
  const int active_m = Grid::active_m(rows), active_n = Grid::active_n(cols);
  A acc[Grid::kTilesM][Grid::kTilesN][4] = {};
  for (int slice = split; slice < slices; slice += p.plan.dw1_splits) {
    const int first = slice * p.plan.dw1_pixels, left = p.pixels - first;
    const int pixels = left < p.plan.dw1_pixels ? (left + 15) & ~15 : p.plan.dw1_pixels;
    prim::sync_threads();
    copy_x<T>(p, first, pixels, c0, padded_c, x, x_ld);
    prim::cp_async_commit();
    build_du<T>(p, first, pixels, m0, padded_m, coefficients, padded_m, du, du_ld);
    prim::cp_async_wait<0>();
    prim::sync_threads();
    if (p.nhwc) {
      for (int k = 0; k < pixels; k += P::kStep)
        MmaStep<P, Grid, true, true>(du + k * du_ld, du_ld, x + k * x_ld, x_ld)
            .run(acc, active_m, active_n);
    } else {
      for (int k = 0; k < pixels; k += P::kStep)
        MmaStep<P, Grid, true, false>(du + k * du_ld, du_ld, x + k, x_ld)
            .run(acc, active_m, active_n);
    }
  }
  A* const out = static_cast<A*>(p.dw1_sums) + int64_t{split} * p.intrinsic * p.channels;
#pragma unroll
  for (int mt = 0; mt < Grid::kTilesM; ++mt)
#pragma unroll
    for (int nt = 0; nt < Grid::kTilesN; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = Grid::row(mt, i / 2), c = Grid::col(nt) + (i & 1);
        if (r < rows && c < cols) out[int64_t{m0 + r} * p.channels + c0 + c] = acc[mt][nt][i];
      }
}

template <class P>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<typename P::T>)
    ghost_backward_primary_kernel(PrimaryParams p) {
  GHOST_DYN_SHARED(unsigned char, shared);
  const int block = static_cast<int>(blockIdx.x);
  if (block < p.plan.dx_blocks)
    dx_role<P>(p, shared);
  else
    dw1_role<P>(p, block - p.plan.dx_blocks, shared);
}

}  // namespace ghost::cuda
