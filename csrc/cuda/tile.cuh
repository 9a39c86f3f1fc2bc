// A tile: which pixels a block owns, where they lie in memory, and the intrinsic maps of them in
// shared memory.
//
// Source pixels are those whose y the tile needs: its own and the halo, as far as they lie in the
// image. They are numbered q = 0, 1, ... row by row; a table holds for each its offset in x and its
// position in the y tile, so that all divisions happen once a tile. Inner pixels, numbered
// likewise, are those that the tile stores.
//
// The y tile is [position][channel] in both layouts: a position is a pixel of the tile or of the
// zero padding around it. Rows are `pitch` positions apart. Where a tile spans the full width the
// zero columns right of a row are those left of the next, and whole images share their zero rows in
// the same way.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/cuda_plan.h"
#include "core/problem.h"
#include "cuda/epilogue.cuh"
#include "cuda/gemm.cuh"
#include "cuda/prim.cuh"

namespace ghost::cuda {

// The maps that a kernel works on. x [n, c, in_h, in_w], output maps [h, w].
struct Maps {
  int64_t n = 0;
  int32_t c = 0, in_h = 0, in_w = 0, stride = 1;
  int32_t m = 0, out_channels = 0, ratio = 2, d = 3;
  int32_t h = 0, w = 0;
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

// Quotients by a number that is only known at run time: one division, then multiplications. Exact
// for dividends below 2^32 / divisor.
struct FastDiv {
  uint32_t magic = 0;

  FastDiv() = default;
  __host__ __device__ __forceinline__ explicit FastDiv(int divisor)
      : magic(divisor <= 1 ? 0 : 0xffffffffu / uint32_t(divisor) + 1) {}
  __device__ __forceinline__ int operator()(int n) const {
    return magic == 0 ? n : int((uint64_t(uint32_t(n)) * magic) >> 32);
  }
};

__device__ __forceinline__ Tile locate_tile(const CudaTile& t, const Maps& p, int index) {
  Tile tile;
  if (t.images > 1 || (t.tiles_h == 1 && t.tiles_w == 1)) {
    tile.n0 = int64_t(index) * t.images;
    const int64_t left = p.n - tile.n0;
    tile.images = left < t.images ? int(left) : t.images;
    tile.h0 = tile.w0 = 0;
  } else {
    const int per_image = t.tiles_h * t.tiles_w, image = index / per_image;
    const int r = index - image * per_image;
    tile.n0 = image;
    tile.images = 1;
    tile.h0 = r / t.tiles_w * t.rows;
    tile.w0 = r % t.tiles_w * t.cols;
  }
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

// Offset of a source pixel in x, or of an inner pixel in the output, relative to the tile's first
// image: in pixels for NHWC, in elements of channel 0 for NCHW. And its position in the y tile.
struct alignas(8) PixelEntry {
  int32_t offset;
  int32_t position;
};

// Warps over rows, lanes over columns. `stride` is the step between pixels of the map in a tensor
// of [channels, height, width] maps: the primary's stride for x, 1 for the output.
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
template <Layout kLayout>
__device__ __forceinline__ void build_source_table(PixelEntry* table, const CudaTile& t,
                                                   const Tile& tile, const Maps& p) {
  build_table<kLayout>(table, t, tile, tile.src_h, tile.src_rows, tile.src_w, tile.src_cols,
                       p.stride, p.c, p.in_h, p.in_w);
}
template <Layout kLayout>
__device__ __forceinline__ void build_inner_table(PixelEntry* table, const CudaTile& t,
                                                  const Tile& tile, const Maps& p, int channels) {
  build_table<kLayout>(table, t, tile, tile.h0, tile.rows, tile.w0, tile.cols, 1, channels, p.h,
                       p.w);
}

// Zeros at the positions that no source pixel has: outside the image y is 0, whatever the
// activation makes of shift1. Warps over rows of positions.
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

// ------------------------------------------------------------------------------ primary product

// Operands of u = w1 * x.
template <class T>
struct Primary {
  const T* x = nullptr;   // [n, c, in_h, in_w], dense in the kernel's layout
  const T* w1 = nullptr;  // [m, c]
  int32_t x_bytes = 0;    // widest aligned copy of x and of w1: 16, 8, 4 or one element
  int32_t w1_bytes = 0;
};

// One copy of Bytes bytes to shared memory; below 4 bytes an ordinary load and store.
template <int Bytes, class T>
__device__ __forceinline__ void copy_async(T* shared, const T* global, bool wanted) {
  if constexpr (Bytes >= 4)
    prim::cp_async<Bytes>(shared, global, wanted);
  else
    *shared = wanted ? *global : prim::from_float<T>(Accumulator<T>(0));
}

// Calls f with the run-time number of bytes (16, 8, 4, 2; not below one element) as a constant.
template <class T, class F>
__device__ __forceinline__ void with_bytes(int bytes, F&& f) {
  if (bytes == 16)
    f(std::integral_constant<int, 16>{});
  else if (bytes == 8)
    f(std::integral_constant<int, 8>{});
  else if constexpr (sizeof(T) <= 4) {
    if (bytes == 4)
      f(std::integral_constant<int, 4>{});
    else if constexpr (sizeof(T) <= 2)
      f(std::integral_constant<int, 2>{});
  }
}

// Channels [k0, k0 + t.slice) of the source pixels [q0, q0 + kRows) into one stage: [pixel][k] for
// NHWC, [k][pixel] for NCHW. Zeros from channel c up to the next whole step of the product, nothing
// beyond; pixels past the last are left as they are.
template <class P, Layout kLayout, int kRows>
__device__ __forceinline__ void load_pixels(typename P::T* stage, const CudaTile& t, const Maps& p,
                                            const typename P::T* x, int x_bytes,
                                            const PixelEntry* source, int sources, int q0, int k0) {
  using T = typename P::T;
  const int k_end = ceil_div(p.c, P::kStep) * P::kStep;
  with_bytes<T>(x_bytes, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value, kVec = kBytes / int(sizeof(T));
    if constexpr (kLayout == Layout::kNHWC) {
      // A thread stays with its channels: only rows change.
      const int shift = t.slice_log2 - kLog2<kVec>, per_row = 1 << shift;
      const int kk = (int(threadIdx.x) & (per_row - 1)) * kVec, k = k0 + kk;
      if (k >= k_end) return;
      const bool wanted = k < p.c;
      const T* from = wanted ? x + k : x;
      const uint32_t pitch = wanted ? p.c : 0;
      const int last = min_of(kRows, sources - q0), step = kThreads >> shift;
#pragma unroll 1
      for (int row = int(threadIdx.x) >> shift; row < last; row += step)
        copy_async<kBytes>(stage + row * t.a_stride + kk,
                           from + uint64_t(uint32_t(source[q0 + row].offset)) * pitch, wanted);
    } else {
      constexpr int kPerRow = kRows / kVec;
      const int row = int(threadIdx.x) % kPerRow * kVec, last = min_of(t.slice, k_end - k0);
      if (q0 + row >= sources) return;
      const int first = int(threadIdx.x) / kPerRow;
      const int64_t plane = int64_t(p.in_h) * p.in_w;
      const T* from = x + source[q0 + row].offset + (k0 + first) * plane;
#pragma unroll 1
      for (int kk = first; kk < last; kk += kThreads / kPerRow) {
        const bool wanted = k0 + kk < p.c;
        copy_async<kBytes>(stage + kk * t.a_stride + row, wanted ? from : x, wanted);
        from += kThreads / kPerRow * plane;
      }
    }
  });
}

// w1 rows [c0, c0 + rows), columns [k0, k0 + t.slice) to shared[row * t.b_stride + column].
// Zeros past row m and column c. rows: a multiple of 16.
template <class T>
__device__ __forceinline__ void load_weights(T* shared, const CudaTile& t, const Maps& p,
                                             const T* w1, int w1_bytes, int c0, int rows, int k0) {
  with_bytes<T>(w1_bytes, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value, kVec = kBytes / int(sizeof(T));
    const int shift = t.slice_log2 - kLog2<kVec>, per_row = 1 << shift;
    const int kk = (int(threadIdx.x) & (per_row - 1)) * kVec, k = k0 + kk;
#pragma unroll 1
    for (int row = int(threadIdx.x) >> shift; row < rows; row += kThreads >> shift) {
      const bool wanted = c0 + row < p.m && k < p.c;
      const T* from = w1 + int64_t(c0 + row) * p.c + k;
      copy_async<kBytes>(shared + row * t.b_stride + kk, wanted ? from : w1, wanted);
    }
  });
}

// u = w1 * x for all source pixels of a tile and the channels [c0, c0 + t.channels), in chunks of
// Grid::kRows pixels; emit(acc, q0) gets the accumulators of the chunk that begins with source
// pixel q0 (rows and columns: Grid::row, Grid::col; rows past the last pixel hold anything).
//
// The loads run kCudaStages - 1 stages ahead through chunks and slices alike, so that an epilogue
// never waits for memory. One barrier a stage: it tells that the stage's copies have landed and
// that the stage before is free.
//
// Before: the source table is visible to all threads and the stages are free. After: this thread's
// copies have landed; a sync_threads must come before the stages are used otherwise.
template <class P, Layout kLayout, class Grid, class Emit>
__device__ __forceinline__ void primary_product(const CudaTile& t, const Maps& p,
                                                const Primary<typename P::T>& in, const Tile& tile,
                                                int c0, bool first_tile, unsigned char* shared,
                                                Emit&& emit) {
  using T = typename P::T;
  using A = typename P::A;
  using Step = MmaStep<P, Grid, kLayout == Layout::kNCHW, false>;
  const PixelEntry* source = reinterpret_cast<const PixelEntry*>(shared + t.source_at);
  T* resident = reinterpret_cast<T*>(shared + t.b_at);
  unsigned char* stages = shared + t.stage_at;
  const int64_t image = int64_t(p.c) * p.in_h * p.in_w;
  const T* x = in.x + tile.n0 * image;
  const int sources = tile.sources(), slices = ceil_div(p.c, t.slice);
  const int chunks = ceil_div(sources, Grid::kRows), total = chunks * slices;
  const int weight_rows = ceil_div(t.channels, 16) * 16;
  const int n_active = Grid::active_n(t.channels);

  int load_chunk = 0, load_slice = 0, load_stage = 0;
  const auto load_next = [&] {
    if (load_chunk < chunks) {
      T* stage = reinterpret_cast<T*>(stages + load_stage * (t.a_stage + t.b_stage));
      load_pixels<P, kLayout, Grid::kRows>(stage, t, p, x, in.x_bytes, source, sources,
                                           load_chunk * Grid::kRows, load_slice * t.slice);
      if (!t.resident || (first_tile && load_chunk == 0))
        load_weights(
            t.resident ? resident + load_slice * t.slice
                       : reinterpret_cast<T*>(reinterpret_cast<unsigned char*>(stage) + t.a_stage),
            t, p, in.w1, in.w1_bytes, c0, weight_rows, load_slice * t.slice);
      if (++load_slice == slices) {
        load_slice = 0;
        ++load_chunk;
      }
      if (++load_stage == kCudaStages) load_stage = 0;
    }
    prim::cp_async_commit();
  };

  A acc[Grid::kTilesM][Grid::kTilesN][4];
  const auto clear = [&] {
#pragma unroll
    for (int i = 0; i < Grid::kTilesM * Grid::kTilesN * 4; ++i)
      acc[i / (Grid::kTilesN * 4)][i / 4 % Grid::kTilesN][i % 4] = A(0);
  };
  clear();
  int chunk = 0, slice = 0, stage_index = 0;
#pragma unroll 1
  for (int it = 1 - kCudaStages; it < total; ++it) {
    if (it >= 0) {
      prim::cp_async_wait<kCudaStages - 2>();
      prim::sync_threads();
    }
    load_next();
    if (it < 0) continue;
    const unsigned char* stage = stages + stage_index * (t.a_stage + t.b_stage);
    const T* a = reinterpret_cast<const T*>(stage);
    const T* b =
        t.resident ? resident + slice * t.slice : reinterpret_cast<const T*>(stage + t.a_stage);
    const int m_active = Grid::active_m(sources - chunk * Grid::kRows);
    const int steps = ceil_div(min_of(t.slice, p.c - slice * t.slice), P::kStep);
    if (m_active > 0 && n_active > 0) {
      const int a_step = P::kStep * (kLayout == Layout::kNCHW ? t.a_stride : 1);
      Step step(a, t.a_stride, b, t.b_stride);
#pragma unroll 1
      for (int s = 0; s < steps; ++s) {
        step.run(acc, m_active, n_active);
        step.advance(a_step, P::kStep);
      }
    }
    if (++stage_index == kCudaStages) stage_index = 0;
    if (++slice == slices) {
      emit(acc, chunk * Grid::kRows);
      clear();
      slice = 0;
      ++chunk;
    }
  }
  prim::cp_async_wait<0>();
}

// --------------------------------------------------------------------------------- maps given

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

// x is u: u of all source pixels and of the channels [c0, c0 + valid) into the y tile, through
// f(v, n, step): a register array of float (double), v[i] belonging to channel c0 + n + i * step
// (past what was loaded: anything).
template <Layout kLayout, class T, class F>
__device__ __forceinline__ void read_maps(T* y, const CudaTile& t, const Maps& p, const T* u,
                                          int bytes, const Tile& tile, int c0, int valid,
                                          const PixelEntry* source, F&& f) {
  using A = Accumulator<T>;
  constexpr bool kNhwc = kLayout == Layout::kNHWC;
  constexpr int kMost = 16 / int(sizeof(T));
  const T* base = u + tile.n0 * (int64_t(p.c) * p.in_h * p.in_w);
  const int vec = bytes / int(sizeof(T)), sources = tile.sources();
  const int per_row = (kNhwc ? valid : sources) / vec;
  const FastDiv by_row(per_row);
  const int64_t plane = int64_t(p.in_h) * p.in_w;
  const int count = (kNhwc ? sources : valid) * per_row;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count; i += kThreads) {
    const int row = by_row(i), k = (i - row * per_row) * vec;
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
  }
}

// ------------------------------------------------------------------------------------- stores

// Where a block's maps go: out [n, out_channels, h, w], dense in the kernel's layout, at the tile's
// first image. residual (may be null) has the same shape and layout; gate (may be null) is
// [n, out_channels, gate_h, gate_w] in the same layout: out = maps * nearest(gate) + residual.
template <class T>
struct Output {
  T* out = nullptr;
  const T* residual = nullptr;
  const T* gate = nullptr;
  int32_t channels = 0;
  int32_t bytes = 0;  // widest aligned store
  int32_t gate_h = 0, gate_w = 0;
  float gate_rows = 0, gate_cols = 0;  // gate_h / h and gate_w / w
};

// Offset of the gate's pixel over each inner pixel, in pixels for NHWC and in elements of channel 0
// for NCHW, as the offsets of build_table: F.interpolate(mode="nearest").
template <Layout kLayout, class T>
__device__ __forceinline__ void build_gate_table(int32_t* table, const Tile& tile,
                                                 const Output<T>& o) {
  const int plane = o.gate_h * o.gate_w;
  const int image = (kLayout == Layout::kNHWC ? 1 : o.channels) * plane;
  const FastDiv by_cols(tile.cols), by_rows(tile.rows);
#pragma unroll 1
  for (int i = int(threadIdx.x); i < tile.inners(); i += kThreads) {
    const int row = by_cols(i), n = by_rows(row);
    const int h = tile.h0 + row - n * tile.rows, w = tile.w0 + i - row * tile.cols;
    table[i] = n * image + min_of(int(float(h) * o.gate_rows), o.gate_h - 1) * o.gate_w +
               min_of(int(float(w) * o.gate_cols), o.gate_w - 1);
  }
}

// f(word) for each pair of numbers of a vector of a 16-bit type; a lone number is the lower of its
// pair.
template <class T, int kVec, class F>
__device__ __forceinline__ void change_pairs(Vec<T, kVec>& v, const Vec<T, kVec>& a,
                                             const Vec<T, kVec>& b, const F& f) {
  constexpr int kPair = kVec > 1 ? 2 : 1;
#pragma unroll
  for (int e = 0; e < kVec; e += kPair) {
    uint32_t words[3] = {0, 0, 0};
    memcpy(&words[0], v.v + e, kPair * sizeof(T));
    memcpy(&words[1], a.v + e, kPair * sizeof(T));
    memcpy(&words[2], b.v + e, kPair * sizeof(T));
    const uint32_t result = f(words[0], words[1], words[2]);
    memcpy(v.v + e, &result, kPair * sizeof(T));
  }
}

// v * gate + residual in one rounding, without gate or residual where they do not count.
template <class T, int kVec>
__device__ __forceinline__ void scale_and_add(Vec<T, kVec>& v, bool gated, const Vec<T, kVec>& gate,
                                              bool added, const Vec<T, kVec>& residual) {
  if constexpr (sizeof(T) == 2) {
    using Word = uint32_t;
    if (gated && added)
      change_pairs(v, gate, residual,
                   [](Word a, Word g, Word r) { return prim::fma_pair<T>(a, g, r); });
    else if (gated)
      change_pairs(v, gate, gate, [](Word a, Word g, Word) { return prim::mul_pair<T>(a, g); });
    else
      change_pairs(v, residual, residual,
                   [](Word a, Word r, Word) { return prim::add_pair<T>(a, r); });
  } else {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      if (gated && added)
        v.v[e] = prim::fma(v.v[e], gate.v[e], residual.v[e]);
      else
        v.v[e] = gated ? v.v[e] * gate.v[e] : v.v[e] + residual.v[e];
    }
  }
}

// One vector to the output, by way of load_gate(gate): its gates.
template <class T, int kVec, class LoadGate>
__device__ __forceinline__ void store_out(const Output<T>& o, int64_t at, Vec<T, kVec> v,
                                          const LoadGate& load_gate) {
  if (o.residual != nullptr || o.gate != nullptr) {
    Vec<T, kVec> gate{}, residual{};
    if (o.gate != nullptr) load_gate(gate);
    if (o.residual != nullptr) residual = load_vec<T, kVec>(o.residual + at);
    scale_and_add(v, o.gate != nullptr, gate, o.residual != nullptr, residual);
  }
  store_vec<T, kVec>(o.out + at, v);
}

// Channels of a block in shared memory: `count` of them, the first at `data`, `stride` elements
// between pixels; pixel i of the tile is at position inner[i].position (by_position) or i. Channel
// k of the block is channel first + (k / group) * step + k % group of the output.
template <class T>
struct BlockMaps {
  const T* data;
  int stride, count;
  bool by_position;
  int first, group, step;

  __device__ __forceinline__ const T* pixel(const PixelEntry& entry, int i) const {
    return data + (by_position ? entry.position : i) * stride;
  }
  __device__ __forceinline__ int channel(int k) const {
    return group == step ? first + k : first + k / group * step + k % group;
  }
};
// Field by field: a choice between references would put both into local memory.
template <class T>
__device__ __forceinline__ BlockMaps<T> choose(bool second, const BlockMaps<T>& a,
                                               const BlockMaps<T>& b) {
  return {second ? b.data : a.data,   second ? b.stride : a.stride,
          second ? b.count : a.count, second ? b.by_position : a.by_position,
          second ? b.first : a.first, second ? b.group : a.group,
          second ? b.step : a.step};
}

// The inner pixels of a tile from shared memory to the output: y, then z.
// NHWC: neighbouring lanes write neighbouring addresses, through y and z of a pixel and on to the
// next pixel. NCHW: a warp takes 32 pixels of as many channel pairs as a store has elements.
// Every pixel of a vector must be inside the tile and, in NCHW, neighbours in memory. gates: of
// build_gate_table, if there is a gate.
template <Layout kLayout, class T>
__device__ __forceinline__ void store_tile(const Output<T>& o, const Maps& p, const Tile& tile,
                                           const PixelEntry* inner, const int32_t* gates,
                                           const BlockMaps<T>& y, const BlockMaps<T>& z) {
  const int inners = tile.inners();
  Output<T> at = o;
  const int64_t image = int64_t(o.channels) * p.h * p.w;
  at.out += tile.n0 * image;
  if (at.residual) at.residual += tile.n0 * image;
  const int64_t gate_plane = int64_t(o.gate_h) * o.gate_w;
  if (at.gate) at.gate += tile.n0 * o.channels * gate_plane;
  with_bytes<T>(o.bytes, [&](auto width) {
    constexpr int kVec = decltype(width)::value / int(sizeof(T));
    if constexpr (kLayout == Layout::kNHWC) {
      // A thread stays with its channels, pixel by pixel. More vectors than threads take turns.
      const int y_chunks = y.count / kVec, per_pixel = y_chunks + z.count / kVec;
#pragma unroll 1
      for (int first = 0; first < per_pixel; first += kThreads) {
        const int chunks = min_of(per_pixel - first, kThreads), slots = kThreads / chunks;
        const int slot = int(threadIdx.x) / chunks;
        int k = first + int(threadIdx.x) - slot * chunks;
        if (slot >= slots) continue;
        const bool ghost = k >= y_chunks;
        k = (ghost ? k - y_chunks : k) * kVec;
        const BlockMaps<T> from = choose(ghost, y, z);
        const int channel = from.channel(k);
#pragma unroll 2
        for (int i = slot; i < inners; i += slots) {
          const PixelEntry entry = inner[i];
          const auto offset = [&](int32_t pixel) {
            return int64_t(uint64_t(uint32_t(pixel)) * uint32_t(o.channels)) + channel;
          };
          store_out(at, offset(entry.offset), load_vec<T, kVec>(from.pixel(entry, i) + k),
                    [&](Vec<T, kVec>& v) { v = load_vec<T, kVec>(at.gate + offset(gates[i])); });
        }
      }
    } else {
      const int64_t plane = int64_t(p.h) * p.w;
      const int lane = int(prim::lane()), pixel_blocks = ceil_div(inners, 32);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const BlockMaps<T> from = choose(half == 1, y, z);
        const int pairs = (from.count + 1) / 2, blocks = ceil_div(pairs, kVec) * pixel_blocks;
#pragma unroll 1
        for (int b = int(prim::warp()); b < blocks; b += kWarps) {
          const int c = (b / pixel_blocks * kVec + lane % kVec) * 2;
          const int i = b % pixel_blocks * 32 + lane / kVec * kVec;
          if (c >= from.count || i >= inners) continue;
          Vec<T, kVec> low, high;
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const Vec<T, 2> pair = load_vec<T, 2>(from.pixel(inner[i + e], i + e) + c);
            low.v[e] = pair.v[0];
            high.v[e] = pair.v[1];
          }
          const auto put = [&](int channel, const Vec<T, kVec>& v) {
            store_out(at, inner[i].offset + channel * plane, v, [&](Vec<T, kVec>& gate) {
#pragma unroll
              for (int e = 0; e < kVec; ++e)
                gate.v[e] = at.gate[gates[i + e] + channel * gate_plane];
            });
          };
          put(from.channel(c), low);
          if (c + 1 < from.count) put(from.channel(c + 1), high);
        }
      }
    }
  });
}

}  // namespace ghost::cuda
