// A tile of the forward passes and of the first backward launch: its pixels, their addresses, and
// its intrinsic maps y in shared memory.
//
// Source pixels are those whose y the tile needs: its own and the halo, as far as they lie in the
// image. They are numbered q = 0, 1, ... row by row; a table has for each its offset in x and its
// position in the y tile, so that a tile divides once per pixel. Inner pixels, numbered in the same
// way, are those that the tile stores.
//
// The y tile is [position][channel] in both layouts: a position is a pixel of the tile or of the
// zero padding around it. Rows are `pitch` positions apart:
//
//   position = (image * image_rows + h - h0 + halo) * pitch + w - w0 + halo
//
// If a tile spans the full width, the zero columns right of a row are those left of the next one;
// whole images share their zero rows in the same way.
//
// Tile map: to build the tables and clear the padding, warps take rows and lanes take columns.
// Binding resource: that of the kernel that includes this file.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/cuda_plan.h"
#include "core/problem.h"
#include "cuda/epilogue.cuh"
#include "cuda/fast_div.cuh"
#include "cuda/gemm.cuh"
#include "cuda/prim.cuh"

namespace ghost::cuda {

// The shapes of a kernel's maps: x [n, c, in_h, in_w], m intrinsic maps [h, w] and their ghosts,
// cut to out_channels. by_image, by_row: tiles of an image and of a row of tiles.
struct Maps {
  int64_t n = 0;
  int32_t c = 0, in_h = 0, in_w = 0, stride = 1;
  int32_t m = 0, out_channels = 0, ratio = 2, d = 3;
  int32_t h = 0, w = 0;
  FastDiv by_image, by_row;

  __host__ __device__ __forceinline__ int ghosts_per_map() const { return ratio - 1; }
};

// One tile: n0 its first image, [h0, h0 + rows) x [w0, w0 + cols) its own pixels, [src_h, src_h +
// src_rows) x ... its source pixels.
struct Tile {
  int64_t n0;
  int images, h0, w0, rows, cols;
  int src_h, src_w, src_rows, src_cols;

  __device__ __forceinline__ int sources() const { return images * src_rows * src_cols; }
  __device__ __forceinline__ int inners() const { return images * rows * cols; }
};

__device__ __forceinline__ int min_of(int a, int b) {
  return a < b ? a : b;
}
__device__ __forceinline__ int max_of(int a, int b) {
  return a > b ? a : b;
}
__device__ __forceinline__ int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

template <int kPowerOfTwo>
inline constexpr int kLog2 = 1 + kLog2<kPowerOfTwo / 2>;
template <>
inline constexpr int kLog2<1> = 0;

__device__ __forceinline__ Tile locate_tile(const CudaTile& t, const Maps& p, int index) {
  Tile tile;
  const int group = p.by_image.split(index), row = p.by_row.split(index);
  tile.n0 = int64_t(group) * t.images;
  const int64_t left = p.n - tile.n0;
  tile.images = left < t.images ? int(left) : t.images;
  tile.h0 = row * t.rows;
  tile.w0 = index * t.cols;
  tile.rows = min_of(t.rows, p.h - tile.h0);
  tile.cols = min_of(t.cols, p.w - tile.w0);
  tile.src_h = max_of(tile.h0 - t.halo, 0);
  tile.src_w = max_of(tile.w0 - t.halo, 0);
  tile.src_rows = min_of(tile.h0 + tile.rows + t.halo, p.h) - tile.src_h;
  tile.src_cols = min_of(tile.w0 + tile.cols + t.halo, p.w) - tile.src_w;
  return tile;
}

// Position in the y tile of pixel (h, w) of the map, of the tile's image i. Valid within the halo.
__device__ __forceinline__ int y_position(const CudaTile& t, const Tile& tile, int i, int h,
                                          int w) {
  return (i * t.image_rows + h - tile.h0 + t.halo) * t.pitch + w - tile.w0 + t.halo;
}

// offset: of a source pixel in x, or of an inner pixel in the output, relative to the tile's first
// image; in pixels for NHWC, in elements of channel 0 for NCHW. position: in the y tile.
struct alignas(8) PixelEntry {
  int32_t offset;
  int32_t position;
};

// The entries of a box of pixels of each image; warps take rows, lanes take columns. The tensor is
// [n, channels, height, width]; neighbouring pixels of the box are `stride` apart in it: the stride
// of the primary convolution for x, 1 for the output.
template <Layout kLayout>
__device__ __forceinline__ void build_table(PixelEntry* table, const CudaTile& t, const Tile& tile,
                                            int first_h, int rows, int first_w, int cols,
                                            int stride, int channels, int height, int width) {
  const int warps = int(blockDim.x >> 5), lane = int(prim::lane());
  const int image = (kLayout == Layout::kNHWC ? 1 : channels) * height * width;
#pragma unroll 1
  for (int r = int(prim::warp()); r < tile.images * rows; r += warps) {
    const int i = r / rows, h = first_h + r % rows;
    const int offset = i * image + h * stride * width;
    const int position = y_position(t, tile, i, h, first_w);
#pragma unroll 1
    for (int c = lane; c < cols; c += 32)
      table[r * cols + c] = PixelEntry{offset + (first_w + c) * stride, position + c};
  }
}
// Rows of a product past the last pixel read the first pixel; their results go to the last position
// of the y tile, which nothing reads.
template <Layout kLayout>
__device__ __forceinline__ void build_source_table(PixelEntry* table, const CudaTile& t,
                                                   const Tile& tile, const Maps& p) {
  build_table<kLayout>(table, t, tile, tile.src_h, tile.src_rows, tile.src_w, tile.src_cols,
                       p.stride, p.c, p.in_h, p.in_w);
  if (int(threadIdx.x) < kCudaSpareRows)
    table[tile.sources() + int(threadIdx.x)] = PixelEntry{0, t.positions - 1};
}
template <Layout kLayout>
__device__ __forceinline__ void build_inner_table(PixelEntry* table, const CudaTile& t,
                                                  const Tile& tile, const Maps& p, int channels) {
  build_table<kLayout>(table, t, tile, tile.h0, tile.rows, tile.w0, tile.cols, 1, channels, p.h,
                       p.w);
}

// Zeros at the positions outside the image, where the depthwise convolution pads y with 0 (and not
// with act1(shift1)). Warps take rows of positions.
template <class T>
__device__ __forceinline__ void clear_padding(T* y, const CudaTile& t, const Tile& tile) {
  const int warps = int(blockDim.x >> 5), lane = int(prim::lane());
  const int rows = t.positions / t.pitch;
  const auto clear = [&](int from, int to) {  // positions
#pragma unroll 1
    for (int e = from * t.y_stride + 2 * lane; e < to * t.y_stride; e += 64)
      store_pair(y + e, Accumulator<T>(0), Accumulator<T>(0));
  };
#pragma unroll 1
  for (int r = int(prim::warp()); r <= rows; r += warps) {
    const int first = r * t.pitch, last = min_of(first + t.pitch, t.positions);
    const int i = r / t.image_rows, h = tile.h0 - t.halo + r % t.image_rows;
    if (i < tile.images && h >= tile.src_h && h < tile.src_h + tile.src_rows) {
      const int w = y_position(t, tile, i, h, tile.src_w);
      clear(first, w);
      clear(w + tile.src_cols, last);
    } else {
      clear(first, last);
    }
  }
}

// ------------------------------------------------------------------------------------ vectors

// Calls f with the run-time number of bytes (16, 8, 4 or 2; at least kLeast) as a constant.
template <class T, int kLeast = int(sizeof(T)), class F>
__device__ __forceinline__ void with_bytes(int bytes, F&& f) {
  if (bytes == 16)
    f(std::integral_constant<int, 16>{});
  else if (bytes == 8)
    f(std::integral_constant<int, 8>{});
  else if constexpr (kLeast <= 4) {
    if (bytes == 4)
      f(std::integral_constant<int, 4>{});
    else if constexpr (kLeast <= 2)
      f(std::integral_constant<int, 2>{});
  }
}

template <int Bytes>
struct VectorOf;
template <>
struct VectorOf<16> {
  using type = uint4;
};
template <>
struct VectorOf<8> {
  using type = uint2;
};
template <>
struct VectorOf<4> {
  using type = uint32_t;
};
template <>
struct VectorOf<2> {
  using type = uint16_t;
};

template <class T>
__device__ __forceinline__ const T* byte_offset(const T* p, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(p) + bytes);
}
template <class T>
__device__ __forceinline__ T* byte_offset(T* p, int64_t bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(p) + bytes);
}

// kCount neighbouring elements, at an address aligned to all of them.
template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Vec {
  T v[kCount];
};
template <class T, int kCount>
__device__ __forceinline__ Vec<T, kCount> load_vec(const T* p) {
  using Raw = typename VectorOf<kCount* int(sizeof(T))>::type;
  const Raw raw = prim::load<Raw>(p);
  Vec<T, kCount> r;
  memcpy(&r, &raw, sizeof(raw));
  return r;
}
template <class T, int kCount>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, kCount>& v) {
  using Raw = typename VectorOf<kCount* int(sizeof(T))>::type;
  Raw raw;
  memcpy(&raw, &v, sizeof(raw));
  prim::store<Raw>(p, raw);
}

// --------------------------------------------------------------------------------- maps given

// For a given u: copies u of all source pixels and of the channels [c0, c0 + valid) into the y
// tile. f(v, n, step) changes the values on the way: v[i], in the compute type, belongs to channel
// c0 + n + i * step; elements past the vector that was loaded are undefined.
template <Layout kLayout, class T, class F>
__device__ __forceinline__ void read_maps(T* y, const CudaTile& t, const Maps& p, const T* u,
                                          int bytes, const Tile& tile, int c0, int valid,
                                          const PixelEntry* source, F&& f) {
  using A = Accumulator<T>;
  constexpr bool kNhwc = kLayout == Layout::kNHWC;
  constexpr int kMost = 16 / int(sizeof(T));
  const T* base = u + tile.n0 * (int64_t(p.c) * p.in_h * p.in_w);
  const int vec = bytes / int(sizeof(T)), sources = tile.sources();
  const int per_row = (kNhwc ? valid : sources) / vec;  // vectors
  const int rows = kNhwc ? sources : valid;
  const int64_t plane = int64_t(p.in_h) * p.in_w;
  int row = int(threadIdx.x) / per_row, next = int(threadIdx.x) - row * per_row;
  const int row_step = kThreads / per_row, next_step = kThreads - row_step * per_row;
#pragma unroll 1
  while (row < rows) {
    const int k = next * vec;
    const int q = kNhwc ? row : k, n = kNhwc ? k : row;
    const T* from = base + (kNhwc ? int64_t(source[q].offset) * p.c + c0 + n
                                  : source[q].offset + (c0 + n) * plane);
    Vec<T, kMost> raw{};
    with_bytes<T>(bytes, [&](auto width) {
      constexpr int kVec = decltype(width)::value / int(sizeof(T));
      const Vec<T, kVec> part = load_vec<T, kVec>(from);
#pragma unroll
      for (int e = 0; e < kVec; ++e) raw.v[e] = part.v[e];
    });
    A v[kMost];
#pragma unroll
    for (int e = 0; e < kMost; ++e) v[e] = prim::to_float(raw.v[e]);
    f(v, n, kNhwc ? 1 : 0);
#pragma unroll
    for (int e = 0; e < kMost; ++e)
      if (e < vec)
        y[source[kNhwc ? q : q + e].position * t.y_stride + n + (kNhwc ? e : 0)] =
            prim::from_float<T>(v[e]);
    row += row_step;
    next += next_step;
    if (next >= per_row) {
      next -= per_row;
      ++row;
    }
  }
}

}  // namespace ghost::cuda
