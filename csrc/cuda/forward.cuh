// Shared by the forward passes: a block's place in the grid, and its y tile,
//
//   y = act1(bn1(w1 * x))
//
// Tile map: blockIdx x, y, z choose intrinsic channels, ghosts, and the first of every workers-th
// tile; the product is that of product.cuh.
// Binding resource: that of the kernel that includes this file.
#pragma once

#include "cuda/depthwise.cuh"
#include "cuda/product.cuh"

namespace ghost::cuda {

// The settings that a kernel instance reads at run time; all others are constants of the instance.
//   kAny: everything. x goes through shared memory, or is u.
//   kDirect: x goes straight to registers (product.cuh).
//   kLean: as kDirect, with the settings of most networks in inference fixed: parameters packed,
//     d = 3, ratio 2, activations ReLU or none, stores of 8 or 16 bytes, no gate on the output, no
//     pooling. A quarter of the code, so that its loops stay in the instruction cache.
enum class Scope { kAny, kDirect, kLean };

// x -> y of a block: primary product (or u given), batch norm 1, activation 1.
template <class T>
struct Intrinsic {
  Primary<T> in;  // w1 null: x is u
  Norm<Accumulator<T>> norm;
  Activated<Accumulator<T>> act;
};

// The block's channels and the first of its tiles: grid_of in typed.cuh.
//
// Every phase of a kernel constructs its own Place from an opaque block index. If one Place were
// kept from phase to phase, its numbers and the numbers computed from them would occupy registers
// that the phases need.
struct Place {
  int c0, valid;       // intrinsic channels [c0, c0 + valid)
  int ghost0, ghosts;  // of each channel's ghosts_per_map() ghost maps
  int worker;          // tiles worker, worker + t.workers, ...
  bool writes_y;       // one block of those that share channels and tiles

  __device__ __forceinline__ Place(const CudaTile& t, const Maps& p) {
    c0 = prim::opaque(int(blockIdx.x)) * t.channels;
    valid = min_of(t.channels, p.m - c0);
    ghost0 = prim::opaque(int(blockIdx.y)) * t.ghosts;
    ghosts = min_of(t.ghosts, p.ghosts_per_map() - ghost0);
    worker = prim::opaque(int(blockIdx.z));
    writes_y = ghost0 == 0;
  }
};

// Scale, shift and slope of the block's intrinsic channels to shared memory, at affine_at, for
// make_y_tile. All threads call it; a sync_threads must follow. leader: see load_norm.
template <Scope kScope = Scope::kAny, class T>
__device__ __forceinline__ void load_intrinsic(const CudaTile& t, const Place& place,
                                               const Intrinsic<T>& in, bool leader,
                                               unsigned char* shared) {
  Accumulator<T>* affine = reinterpret_cast<Accumulator<T>*>(shared + t.affine_at);
  if constexpr (kScope == Scope::kLean) {
    load_ready_norm(in.norm, place.c0, 1, place.valid, t.channels, affine, affine + t.channels);
  } else {
    load_norm(in.norm, place.c0, 1, place.valid, t.channels, leader, affine, affine + t.channels);
    load_slopes(in.act, place.c0, 1, place.valid, t.channels, affine + 2 * t.channels);
  }
}

// The keep_u of make_y_tile for kernels that do not keep u.
struct DropU {
  template <class A>
  __device__ __forceinline__ void operator()(int, int, A, A) const {}
};

// Tables, zero padding and the y tile of one tile. Begins and ends with a sync_threads.
// keep_u(position, n, u0, u1) is called with the products of channels c0 + n and c0 + n + 1, unless
// u is given. out_channels: channels of the tensor of the inner table; 0: no inner table. kGated: x
// may have a gate.
template <class P, Layout kLayout, Scope kScope, int kChannels, int kTiles, bool kGated = false,
          class KeepU = DropU>
__device__ __forceinline__ void make_y_tile(const CudaTile& t, const Maps& p,
                                            const Intrinsic<typename P::T>& in, const Tile& tile,
                                            const Place& place, bool first_tile, int out_channels,
                                            unsigned char* shared, KeepU keep_u = KeepU()) {
  using T = typename P::T;
  using A = typename P::A;
  constexpr bool kDirect = kScope != Scope::kAny;
  using Grid = ProductGrid<kDirect, kChannels, kTiles>;
  PixelEntry* source = reinterpret_cast<PixelEntry*>(shared + t.source_at);
  T* y = reinterpret_cast<T*>(shared + t.y_at);
  const A* scale = reinterpret_cast<const A*>(shared + t.affine_at);
  const A* shift = scale + t.channels;
  const A* slope = shift + t.channels;
  prim::sync_threads();
  build_source_table<kLayout>(source, t, tile, p);
  if (out_channels > 0)
    build_inner_table<kLayout>(reinterpret_cast<PixelEntry*>(shared + t.inner_at), t, tile, p,
                               out_channels);
  if constexpr (kGated) {
    if (in.in.gate != nullptr)
      load_input_gates(reinterpret_cast<T*>(shared + t.in_gate_at), t, p, in.in.gate, tile);
  }
  clear_padding(y, t, tile);
  prim::sync_threads();
  const int sources = tile.sources();
  const auto multiply = [&] {
    primary_product<P, kLayout, kDirect, Grid, kGated>(
        t, p, in.in, tile, place.c0, first_tile, shared,
        [&](A(&acc)[Grid::kTilesM][Grid::kTilesN][4], int q0) {
#pragma unroll
          for (int nt = 0; nt < Grid::kTilesN; ++nt) {
            const int n = Grid::col(nt);
            if (n >= t.channels) continue;
            A a[2], b[2];
            load_pair(scale + n, a);
            load_pair(shift + n, b);
#pragma unroll
            for (int i = 0; i < Grid::kTilesM * 2; ++i) {
              A(&v)[4] = acc[i / 2][nt];
              if constexpr (!std::is_same_v<KeepU, DropU>) {
                const int q = q0 + Grid::row(i / 2, i % 2);
                if (q < sources) keep_u(source[q].position, n, v[i % 2 * 2], v[i % 2 * 2 + 1]);
              }
              v[i % 2 * 2] = prim::fma(v[i % 2 * 2], a[0], b[0]);
              v[i % 2 * 2 + 1] = prim::fma(v[i % 2 * 2 + 1], a[1], b[1]);
            }
          }
          constexpr int kValues = Grid::kTilesM * Grid::kTilesN * 4;
          PairOf<T> pairs[kValues / 2];
          activate_pairs<T, kScope != Scope::kLean>(
              in.act.act, [&](int i) { return slope[Grid::col(i / 4 % Grid::kTilesN) + (i & 1)]; },
              reinterpret_cast<A(&)[kValues]>(acc), pairs);
          int position[Grid::kTilesM * 2];
#pragma unroll
          for (int i = 0; i < Grid::kTilesM * 2; ++i)
            position[i] = source[q0 + Grid::row(i / 2, i % 2)].position;
#pragma unroll
          for (int i = 0; i < Grid::kTilesM * 2; ++i) {
            // The direct product gives all rows past the last pixel the same values: their stores
            // to the last position, which is never read, do not race.
            if (!kDirect && q0 + Grid::row(i / 2, i % 2) >= sources) continue;
            T* to = y + position[i] * t.y_stride;
#pragma unroll
            for (int nt = 0; nt < Grid::kTilesN; ++nt)
              if (Grid::col(nt) < t.channels)
                store_pair(to + Grid::col(nt), pairs[(i / 2 * Grid::kTilesN + nt) * 2 + i % 2]);
          }
        });
  };
  if constexpr (!kDirect) {
    if (in.in.w1 == nullptr) {
      read_maps<kLayout>(y, t, p, in.in.x, in.in.x_bytes, tile, place.c0, place.valid, source,
                         [&](auto& v, int n, int step) {
                           constexpr int kVec = int(sizeof(v) / sizeof(v[0]));
#pragma unroll
                           for (int e = 0; e < kVec; ++e)
                             v[e] = prim::fma(v[e], scale[n + e * step], shift[n + e * step]);
                           activate(in.act.act, [&](int e) { return slope[n + e * step]; }, v);
                         });
    } else {
      multiply();
    }
  } else {
    multiply();
  }
  prim::sync_threads();
}

template <class P, Layout kLayout, Scope kScope, int kChannels, int kTiles, bool kGated = false>
__device__ __forceinline__ void make_y_tile(const CudaTile& t, const Maps& p,
                                            const Intrinsic<typename P::T>& in, int index,
                                            int out_channels, unsigned char* shared) {
  const Place place(t, p);
  make_y_tile<P, kLayout, kScope, kChannels, kTiles, kGated>(
      t, p, in, locate_tile(t, p, prim::opaque(index)), place, index < t.workers, out_channels,
      shared);
}

}  // namespace ghost::cuda
