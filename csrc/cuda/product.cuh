// The primary product of a tile's source pixels, in the registers of the warps:
//
//   u[pixel][m] = sum over c of w1[m][c] * x[pixel][c]        (x times its gate, if given)
//
// Tile map: a block computes chunks of Grid::kRows pixels x Grid::kCols channels; WarpGrid
// (gemm.cuh) or DirectGrid says which lane owns which results. Staged: x passes through shared
// memory, slice by slice of its channels, with a barrier a slice. Direct, for 16-bit types in NHWC
// whose pixels are whole 16-byte vectors: a warp loads its own pixels from global memory into
// registers, as operands of the product, without any barrier.
// Binding resource: reads of x from DRAM or L2; tensor cores for many channels.
#pragma once

#include "cuda/stores.cuh"
#include "cuda/tile.cuh"

namespace ghost::cuda {

// How the eight warps of a block share kRows pixels x kCols channels in the direct product: tiles
// of 8 pixels x 16 channels. With g = lane / 4 and t = lane % 4 a lane holds c[0], c[1] = (pixel
// 2t, channels 2g, 2g + 1) and c[2], c[3] the same of pixel 2t + 1. Members as those of WarpGrid.
// kTiles: tiles of a warp, as many as it has registers for: 4, 8 or 16 (DirectTiles in
// cuda_plan.cpp).
template <int kCols_, int kTiles>
struct DirectGrid {
  static constexpr int kCols = kCols_;  // 16, 32, 64 or 128
  static constexpr int kWarpsN = kCols >= 128 ? 2 : 1, kWarpsM = kWarps / kWarpsN;
  static constexpr int kTilesN = kCols / 16 / kWarpsN;  // of 16 channels, a warp
  static constexpr int kTilesM = kTiles / kTilesN;      // of 8 pixels, a warp
  static constexpr int kRows = 8 * kTilesM * kWarpsM;
  static constexpr int kLaneRows = 4;  // lanes that share a channel

  static __device__ __forceinline__ int warp_m() { return int(prim::warp()) / kWarpsN; }
  static __device__ __forceinline__ int warp_n() { return int(prim::warp()) % kWarpsN; }
  static __device__ __forceinline__ int lane_row() { return int(prim::lane() & 3); }
  static __device__ __forceinline__ int first_row() { return warp_m() * kTilesM * 8; }
  static __device__ __forceinline__ int row(int mt, int half) {
    return first_row() + mt * 8 + lane_row() * 2 + half;
  }
  static __device__ __forceinline__ int first_col(int nt) { return (nt * kWarpsN + warp_n()) * 16; }
  static __device__ __forceinline__ int col(int nt) {
    return first_col(nt) + int(prim::lane() >> 2) * 2;
  }
};
template <bool kDirect, int kChannels, int kTiles>
using ProductGrid = std::conditional_t<kDirect, DirectGrid<kChannels, kTiles>, WarpGrid<kChannels>>;

// Operands of u = w1 * x.
template <class T>
struct Primary {
  const T* x = nullptr;     // [n, c, in_h, in_w], dense in the kernel's layout
  const T* w1 = nullptr;    // [m, c]
  const T* gate = nullptr;  // [n, c], multiplied to x, or null
  FastDiv by_image;         // image of a pixel of x, in NHWC
  int32_t x_bytes = 0;      // widest aligned copy of x and of w1: 16, 8, 4 or one element
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

// Channels [k0, k0 + t.slice) of the source pixels [q0, q0 + kRows) into one stage: [pixel][k] for
// NHWC, [k][pixel] for NCHW. Zeros from channel c up to the next whole step of the product;
// channels beyond and pixels past the last one are left unchanged.
template <class P, Layout kLayout, int kRows>
__device__ __forceinline__ void load_pixels(typename P::T* stage, const CudaTile& t, const Maps& p,
                                            const typename P::T* x, int x_bytes,
                                            const PixelEntry* source, int sources, int q0, int k0) {
  using T = typename P::T;
  const int k_end = ceil_div(p.c, P::kStep) * P::kStep;
  with_bytes<T>(x_bytes, [&](auto bytes) {
    constexpr int kBytes = decltype(bytes)::value, kVec = kBytes / int(sizeof(T));
    if constexpr (kLayout == Layout::kNHWC) {
      // A thread keeps its channels and takes every step-th row.
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

// The gates of a tile's images to shared memory [images][t.in_gate_stride], zeros past channel c.
template <class T>
__device__ __forceinline__ void load_input_gates(T* gates, const CudaTile& t, const Maps& p,
                                                 const T* gate, const Tile& tile) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < tile.images * t.in_gate_stride; i += kThreads) {
    const int image = i / t.in_gate_stride, c = i - image * t.in_gate_stride;
    gates[i] = c < p.c ? gate[(tile.n0 + image) * p.c + c] : prim::from_float<T>(Accumulator<T>(0));
  }
}

// Multiplies the elements that this thread copied by load_pixels, with the same arguments, by their
// gates.
template <class P, Layout kLayout, int kRows>
__device__ __forceinline__ void gate_pixels(typename P::T* stage, const CudaTile& t, const Maps& p,
                                            const typename P::T* gates, int x_bytes,
                                            const PixelEntry* source, int sources, int q0, int k0) {
  using T = typename P::T;
  const int plane = p.in_h * p.in_w;
  with_bytes<T>(x_bytes, [&](auto bytes) {
    constexpr int kVec = decltype(bytes)::value / int(sizeof(T));
    if constexpr (kLayout == Layout::kNHWC) {
      const int shift = t.slice_log2 - kLog2<kVec>, per_row = 1 << shift;
      const int kk = (int(threadIdx.x) & (per_row - 1)) * kVec, k = k0 + kk;
      if (k >= p.c) return;
      const int last = min_of(kRows, sources - q0), step = kThreads >> shift;
#pragma unroll 1
      for (int row = int(threadIdx.x) >> shift; row < last; row += step) {
        const int image = source[q0 + row].offset / plane;
        T* const at = stage + row * t.a_stride + kk;
        Vec<T, kVec> v = load_vec<T, kVec>(at);
        const Vec<T, kVec> g = load_vec<T, kVec>(gates + image * t.in_gate_stride + k);
        scale_and_add(v, true, g, false, g);
        store_vec<T, kVec>(at, v);
      }
    } else {
      constexpr int kPerRow = kRows / kVec;
      const int row = int(threadIdx.x) % kPerRow * kVec, last = min_of(t.slice, p.c - k0);
      if (q0 + row >= sources) return;
      Vec<T, kVec> g;
#pragma unroll 1
      for (int kk = int(threadIdx.x) / kPerRow; kk < last; kk += kThreads / kPerRow) {
        T* const at = stage + kk * t.a_stride + row;
        Vec<T, kVec> v = load_vec<T, kVec>(at);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const int image = source[q0 + row + e].offset / (p.c * plane);
          g.v[e] = gates[image * t.in_gate_stride + k0 + kk];
        }
        scale_and_add(v, true, g, false, g);
        store_vec<T, kVec>(at, v);
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

// primary_product through shared memory. The loads run kCudaStages - 1 stages ahead, across the
// borders of slices and chunks, so that an epilogue never waits for memory. After the one barrier
// of a stage its copies have landed and the stage before is free.
template <class P, Layout kLayout, class Grid, bool kGated, class Emit>
__device__ __forceinline__ void staged_product(const CudaTile& t, const Maps& p,
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
      if constexpr (kGated) {
        if (in.gate != nullptr)
          gate_pixels<P, kLayout, Grid::kRows>(
              reinterpret_cast<T*>(stages + stage_index * (t.a_stage + t.b_stage)), t, p,
              reinterpret_cast<const T*>(shared + t.in_gate_at), in.x_bytes, source, sources,
              chunk * Grid::kRows, slice * t.slice);
      }
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
}

// Eight columns of rows that are `pitch` apart, those of the first row at `first`, aligned to 16
// bytes. If the columns do not exist, every row reads the same 16 bytes of zeros: cheaper than a
// branch per row.
template <class T>
struct RowColumns {
  const T* first;
  uint32_t pitch;  // bytes

  __device__ __forceinline__ RowColumns(const T* first_, int pitch_, bool exist)
      : first(exist ? first_ : static_cast<const T*>(prim::zeros())),
        pitch(exist ? uint32_t(pitch_) * uint32_t(sizeof(T)) : 0) {}

  __device__ __forceinline__ uint4 load(uint32_t row) const {
    return prim::load_readonly<uint4>(byte_offset(first, row * uint64_t(pitch)));
  }
};

// w1 as operand of the direct product, whose rows are whole vectors. The sum over channels may run
// in any order: mma gives lane t of four the channels 2t, 2t + 1, 2t + 8, ... of two steps; here
// the lane takes 8t ... 8t + 7 instead, 16 bytes of a pixel, and 16 of each of two rows of w1. Rows
// g and g + 8 of mma are channels 2g and 2g + 1.
constexpr int kBlockColumns = 32, kBlockBytes = 1024;  // a block: 16 rows x 32 columns

// Copies columns [k0, k1) of w1 rows [c0, c0 + t.channels) to shared memory, block by block of
// columns, in each the blocks of rows; of a block the first steps of all lanes come before the
// second ones. Zeros past row m and column c. A warp takes 8 rows x 32 columns at a time. The
// caller commits the copies. k0: a multiple of kBlockColumns.
template <class T>
__device__ __forceinline__ void copy_weight_blocks(unsigned char* shared, const CudaTile& t,
                                                   const Maps& p, const Primary<T>& in, int c0,
                                                   int k0, int k1) {
  const int row_blocks = ceil_div(t.channels, 16), lane = int(prim::lane());
  const int tasks = ceil_div(k1 - k0, kBlockColumns) * row_blocks * 2, odd = lane & 1;
#pragma unroll 1
  for (int task = int(prim::warp()); task < tasks; task += kWarps) {
    const int block = task >> 1, kk = (lane >> 1 & 3) * 8;
    const int pair = (task & 1) * 4 + (lane >> 3), k = k0 + block / row_blocks * kBlockColumns + kk;
    const int c = c0 + block % row_blocks * 16 + pair * 2 + odd;
    const bool exist = c < p.m && k < p.c;
    const T* const from = exist ? in.w1 + (int64_t(c) * p.c + k) : in.w1;
    unsigned char* to = shared + block * kBlockBytes + (pair * 4 + kk / 8) * 16 + odd * 4;
    constexpr int kPlace[] = {0, 8, 512, 520};
#pragma unroll
    for (int e = 0; e < 4; ++e)
      copy_async<4>(reinterpret_cast<T*>(to + kPlace[e]), from + 2 * e, exist);
  }
}

// primary_product through registers. The next blocks of x are loaded while the current ones are
// multiplied. w1 stays in shared memory, or passes through a ring of two stages of kCudaRing
// columns there: the copies of a stage run while the stage before is multiplied.
template <class P, class Grid, bool kGated, class Emit>
__device__ __forceinline__ void direct_product(const CudaTile& t, const Maps& p,
                                               const Primary<typename P::T>& in, const Tile& tile,
                                               int c0, bool first_tile, unsigned char* shared,
                                               Emit&& emit) {
  using T = typename P::T;
  constexpr int kM = Grid::kTilesM, kN = Grid::kTilesN;
  constexpr int kBlocks = kM * kN > 8 ? 1 : kM >= 2 ? 8 / kM : 4;  // of x, under way
  constexpr int kStep = kBlocks * kBlockColumns;
  static_assert(kCudaRing % kStep == 0, "a step of the product lies in one stage of the ring");
  const int lane = int(prim::lane()), first_k = (lane & 3) * 8;
  const int row_blocks = ceil_div(t.channels, 16), sources = tile.sources() - Grid::first_row();
  // The whole block fills a ring, so that all warps take part in all chunks.
  const bool ring = Grid::kCols > 32 && !t.resident;
  const int end = ring ? tile.sources() : sources;

  // Of this lane: its channels of x, how many there are, its row of a warp's first pixels, and its
  // operands of w1.
  const T* const x = in.x + tile.n0 * (int64_t(p.c) * p.in_h * p.in_w) + first_k;
  const int channels = prim::opaque(p.c - first_k);
  const PixelEntry* const own = reinterpret_cast<const PixelEntry*>(shared + t.source_at) +
                                prim::opaque(Grid::first_row() + (lane >> 2));
  const int last_own = sources - (lane >> 2);  // the spare entry behind the last source pixel
  unsigned char* const weights = shared + t.b_at;
  const int weights_at = prim::opaque(Grid::first_col(0) / 16 * kBlockBytes + lane * 16);
  const int stage_blocks = kCudaRing / kBlockColumns * row_blocks;
  int filling = 0;  // stage of the ring that the next copies go to

  uint32_t pixel[kM];
  uint4 b[kBlocks][kM];
  const auto begin_chunk = [&](int q0) {
#pragma unroll
    for (int mt = 0; mt < kM; ++mt) pixel[mt] = uint32_t(own[min_of(q0 + mt * 8, last_own)].offset);
  };
  const auto fetch = [&](uint4(&to)[kM], int k) {
    const RowColumns<T> from(x + k, p.c, k < channels);
#pragma unroll
    for (int mt = 0; mt < kM; ++mt) to[mt] = from.load(pixel[mt]);
  };
  // Channels k ... k + 7 of this lane's pixels of the chunk that begins with q0, times their gates.
  const auto scale = [&](uint4(&v)[kM], int k, int q0) {
    const T* const gates = reinterpret_cast<const T*>(shared + t.in_gate_at) + first_k + k;
#pragma unroll
    for (int mt = 0; mt < kM; ++mt) {
      int image = 0;
      if (t.images > 1) image = in.by_image(own[min_of(q0 + mt * 8, last_own)].offset);
      const uint4 g = prim::load<uint4>(gates + image * t.in_gate_stride);
      v[mt] = {prim::mul_pair<T>(v[mt].x, g.x), prim::mul_pair<T>(v[mt].y, g.y),
               prim::mul_pair<T>(v[mt].z, g.z), prim::mul_pair<T>(v[mt].w, g.w)};
    }
  };
  float acc[kM][kN][4];
  const auto multiply = [&](const uint4(&from)[kM], int block) {
#pragma unroll
    for (int nt = 0; nt < kN; ++nt) {
      if (Grid::first_col(nt) >= t.channels) continue;
      const unsigned char* at =
          weights + weights_at + block * kBlockBytes + nt * (Grid::kWarpsN * kBlockBytes);
      const uint4 w0 = prim::load<uint4>(at), w1 = prim::load<uint4>(at + kBlockBytes / 2);
#pragma unroll
      for (int mt = 0; mt < kM; ++mt) {
        float (&c)[4] = acc[mt][nt];
        float d[4] = {c[0], c[2], c[1], c[3]};
        prim::mma_m16n8k16<T>(d, {w0.x, w0.y, w0.z, w0.w}, {from[mt].x, from[mt].y});
        prim::mma_m16n8k16<T>(d, {w1.x, w1.y, w1.z, w1.w}, {from[mt].z, from[mt].w});
        c[0] = d[0];
        c[1] = d[2];
        c[2] = d[1];
        c[3] = d[3];
      }
    }
  };

  // One pass before the first chunk fetches x and multiplies nothing.
#pragma unroll 1
  for (int q0 = -Grid::kRows; q0 < end; q0 += Grid::kRows) {
    const bool begun = q0 >= 0, more = q0 + Grid::kRows < end, mine = begun && q0 < sources;
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) acc[i / (kN * 4)][i / 4 % kN][i % 4] = 0;
    int block = 0;
#pragma unroll 1
    for (int k = begun ? 0 : p.c - 1; k < p.c; k += kStep) {
      const bool last = k + kStep >= p.c;
      const int next = !last ? k + kStep : more ? 0 : p.c;
      if (begun ? ring && k % kCudaRing == 0 : ring || first_tile) {
        int from = 0, to = p.c;  // columns of w1 to copy
        if (begun) {
          prim::cp_async_wait<0>();
          prim::sync_threads();  // the stage has landed, and the other one is free
          block = (filling ^ 1) * stage_blocks;
          from = k + kCudaRing < p.c ? k + kCudaRing : more ? 0 : p.c;
        }
        if (ring) to = min_of(from + kCudaRing, p.c);
        copy_weight_blocks(weights + filling * stage_blocks * kBlockBytes, t, p, in, c0, from, to);
        prim::cp_async_commit();
        filling ^= 1;
      }
      if (last && more) begin_chunk(q0 + Grid::kRows);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int ahead = i * kBlockColumns;
        if (mine && k + ahead < p.c) {
          if constexpr (kGated) {
            if (in.gate != nullptr) scale(b[i], k + ahead, q0);
          }
          multiply(b[i], block + i * row_blocks);
        }
        if (next + ahead < p.c) fetch(b[i], next + ahead);
      }
      block += kBlocks * row_blocks;
    }
    if (mine) {
      emit(acc, q0);
    } else if (!begun && first_tile && !ring) {
      prim::cp_async_wait<0>();
      prim::sync_threads();
    }
  }
}

// u = w1 * x for all source pixels of a tile and the channels [c0, c0 + t.channels), in chunks of
// Grid::kRows pixels. emit(acc, q0) is called with the accumulators of the chunk that begins with
// source pixel q0 (rows and columns: Grid::row, Grid::col; rows past the last pixel are undefined).
//
// Before: the source table is visible to all threads and the stages are free. After: this thread's
// copies have landed; a sync_threads must come before the stages are used otherwise.
//
// kGated: x may have a gate, whose rows are in shared memory, visible to all threads.
template <class P, Layout kLayout, bool kDirect, class Grid, bool kGated, class Emit>
__device__ __forceinline__ void primary_product(const CudaTile& t, const Maps& p,
                                                const Primary<typename P::T>& in, const Tile& tile,
                                                int c0, bool first_tile, unsigned char* shared,
                                                Emit&& emit) {
  if constexpr (kDirect)
    direct_product<P, Grid, kGated>(t, p, in, tile, c0, first_tile, shared, emit);
  else
    staged_product<P, kLayout, Grid, kGated>(t, p, in, tile, c0, first_tile, shared, emit);
  prim::cp_async_wait<0>();
}

}  // namespace ghost::cuda
