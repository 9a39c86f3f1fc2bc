// ghost_apply in one pass over x with bulk copies, for sm_90 and later; apply.cuh otherwise:
//
//   y   = act1(bn1(w1 * x))
//   z   = act2(bn2(w2 (*) y))
//   out = concat(y, z)[:, :out_channels]
//
// Tile map: a block of 256 threads owns all intrinsic channels with their ghosts and takes tile
// after tile of pixels. A tile is a band of rows across the full width, or whole images: its pixels
// with the halo rows are one run of x, its output is one run of out. One thread copies them in bulk
// between global and shared memory, x `stages` tiles ahead, out one tile behind. A table that
// serves all tiles maps the number q of a pixel in the run to its position in the y tile.
//   product   a warp takes 32 pixels x 32 channels at a time: mma of 16 channels x 8 pixels, both
//             operands as 16 bytes of a lane from shared memory. Results go to the y tile, and
//             those of the tile's own pixels to the output stage.
//   depthwise as in depthwise.cuh; results go to the output stage.
// Two barriers a tile: before the depthwise part (the y tile is complete, the stage of x is free)
// and after it (the output stage is complete, the y tile is free). A block takes neighbouring
// tiles: the first rows of y of a band are the last ones of the band above, and are moved, not
// recomputed; this takes a third barrier.
//
// Binding resource: DRAM bandwidth, or the issue slots, half of which go to the multiply-adds of
// the depthwise part.
#pragma once

#include "core/cuda_plan_pipelined.h"
#include "cuda/apply.cuh"
#include "cuda/typed.cuh"

namespace ghost::cuda {

template <class T>
struct PipelinedParams {
  ApplyParams<T> apply;  // output: only the pointer is used
  PipelinedPlan plan;
  FastDiv by_group;  // channel groups of the product
};

// v with bit 0 and bit `with` exchanged.
__device__ __forceinline__ int swap_bits(int v, int with) {
  const int different = (v ^ (v >> with)) & 1;
  return v ^ different ^ (different << with);
}

// The tiles of a block in order. They are neighbours, so that a band may follow the band above.
struct TileCursor {
  int index, h0;
  int64_t n0;
  bool carried = false;  // the tile before was the band above

  __device__ __forceinline__ TileCursor(const CudaTile& t, int first) : index(first) {
    const int group = first / t.tiles_h;
    h0 = (first - group * t.tiles_h) * t.rows;
    n0 = int64_t(group) * t.images;
  }
  __device__ __forceinline__ void advance(const CudaTile& t, const Maps& p) {
    ++index;
    h0 += t.rows;
    carried = h0 < p.h;
    if (carried) return;
    h0 = 0;
    n0 += t.images;
  }
  // The source rows of a carried tile begin below the rows of y that the band above computed.
  __device__ __forceinline__ Tile tile(const CudaTile& t, const Maps& p) const {
    const int64_t left = p.n - n0;
    Tile r;
    r.n0 = n0;
    r.images = left < t.images ? int(left) : t.images;
    r.h0 = h0;
    r.w0 = r.src_w = 0;
    r.rows = min_of(t.rows, p.h - h0);
    r.cols = r.src_cols = p.w;
    r.src_h = carried ? min_of(h0 + t.halo, p.h) : max_of(h0 - t.halo, 0);
    r.src_rows = min_of(h0 + r.rows + t.halo, p.h) - r.src_h;
    return r;
  }
};

// The y tile is [channel pair][position][2]: the strips of depthwise.cuh read neighbouring words.
// Writes zeros to its rows above and below the image. The positions left and right of the image are
// cleared once, when the block starts, and never written again.
template <class T>
__device__ __forceinline__ void clear_outer_rows(T* y, const CudaTile& t, const Maps& p,
                                                 int pair_stride, const Tile& tile) {
  const int lane = int(prim::lane());
#pragma unroll 1
  for (int r = 0; r < t.image_rows; ++r) {
    const int h = tile.h0 - t.halo + r;
    if (h >= 0 && h < p.h) continue;
#pragma unroll 1
    for (int pair = int(prim::warp()); pair < p.m / 2; pair += kWarps)
#pragma unroll 1
      for (int e = lane; e < t.pitch; e += 32)
        prim::store<uint32_t>(y + (pair * pair_stride + r * t.pitch + e) * 2, 0);
  }
}

// Moves the last 2 * halo rows of y of the band above to the first rows of the tile, and copies the
// tile's own rows among them to the output stage. A band has at least 2 * halo rows.
template <class T>
__device__ __forceinline__ void carry_rows(T* y, const CudaTile& t, const Maps& p, int pair_stride,
                                           const Tile& tile, const StripOwner& own, T* out) {
  if (own.slot >= own.slots) return;
  // The columns beside the image are zeros in every row.
  T* to = y + 2 * (own.pair * pair_stride + t.halo + own.slot);
  T* out_row = out + own.slot * p.out_channels + 2 * own.pair;
  const int distance = 2 * t.rows * t.pitch, step = own.slots * p.out_channels;
#pragma unroll 1
  for (int r = -t.halo; r < t.halo; ++r) {
    if (r < 0 || r >= tile.rows) {
#pragma unroll 4
      for (int i = 0; i < p.w - own.slot; i += own.slots)
        prim::store<uint32_t>(to + 2 * i, prim::load<uint32_t>(to + 2 * i + distance));
    } else {
      T* out_to = out_row;
#pragma unroll 4
      for (int i = 0; i < p.w - own.slot; i += own.slots) {
        const uint32_t pair = prim::load<uint32_t>(to + 2 * i + distance);
        prim::store<uint32_t>(to + 2 * i, pair);
        prim::store<uint32_t>(out_to, pair);
        out_to += step;
      }
      out_row += p.w * p.out_channels;
    }
    to += 2 * t.pitch;
  }
}

// y of a tile's source pixels from the stage of x [pixel][C], into the y tile and, where the pixel
// is the tile's own, into the output stage [pixel][out_channels].
template <class T, bool kFast>
__device__ __forceinline__ void make_pipelined_y(const PipelinedParams<T>& params, const Tile& tile,
                                                 const unsigned char* x, T* out,
                                                 unsigned char* shared) {
  constexpr int kM = kPipelinedPixels / 8, kN = kPipelinedChannels / 16;
  const CudaTile& t = params.apply.tile;
  const Maps& p = params.apply.maps;
  T* const y = reinterpret_cast<T*>(shared + t.y_at);
  const uint16_t* const positions =
      reinterpret_cast<const uint16_t*>(shared + params.plan.positions_at);
  const float* const scale = reinterpret_cast<const float*>(shared + t.affine_at);
  const float* const shift = scale + t.channels;
  const float* const slope = shift + t.channels;
  const int lane = int(prim::lane()), swap = params.plan.pixel_swap, first_k = (lane & 3) * 8;
  const int read_pixel = prim::opaque(swap_bits(lane >> 2, swap));
  const int own_pixel = prim::opaque(swap_bits((lane & 3) * 2, swap));
  const int next_pixel = prim::opaque(1 << swap);  // distance of the lane's two pixels
  const int row_blocks = ceil_div(t.channels, 16), groups = ceil_div(t.channels, 16 * kN);
  const int sources = tile.sources();
  const uint32_t inners = uint32_t(tile.inners());
  const int tasks = ceil_div(sources, 8 * kM) * groups;
  const int first_inner = (tile.h0 - tile.src_h) * p.w;
  const int first_position = (tile.src_h - tile.h0 + t.halo) * t.pitch + t.halo;
  const uint32_t pitch = uint32_t(p.c) * 2;  // bytes of a pixel
  const int out_pitch = p.out_channels * 2;
#pragma unroll 1
  for (int task = int(prim::warp()); task < tasks; task += kWarps) {
    const int chunk = params.by_group(task), block = (task - chunk * groups) * kN;
    const int q0 = chunk * 8 * kM, active = min_of(row_blocks - block, kN);
    const unsigned char* from = x + uint32_t(q0 + read_pixel) * pitch + first_k * 2;
    const unsigned char* weights = shared + t.b_at + block * kBlockBytes + lane * 16;
    float acc[kM][kN][4];
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) acc[i / (kN * 4)][i / 4 % kN][i % 4] = 0;
#pragma unroll 1
    for (int k = first_k; k < first_k + p.c; k += kBlockColumns) {
      const bool exists = k < p.c;  // else the lane multiplies zeros
      const unsigned char* at = exists ? from : shared + kPipelinedZerosAt;
      const uint32_t step = exists ? 8 * pitch : 0;
      uint4 b[kM];
#pragma unroll
      for (int mt = 0; mt < kM; ++mt) b[mt] = prim::load<uint4>(at + mt * step);
#pragma unroll
      for (int nt = 0; nt < kN; ++nt) {
        if (nt >= active) break;
        const uint4 w0 = prim::load<uint4>(weights + nt * kBlockBytes);
        const uint4 w1 = prim::load<uint4>(weights + nt * kBlockBytes + kBlockBytes / 2);
#pragma unroll
        for (int mt = 0; mt < kM; ++mt) {
          prim::mma_m16n8k16<T>(acc[mt][nt], {w0.x, w0.y, w0.z, w0.w}, {b[mt].x, b[mt].y});
          prim::mma_m16n8k16<T>(acc[mt][nt], {w1.x, w1.y, w1.z, w1.w}, {b[mt].z, b[mt].w});
        }
      }
      from += kBlockColumns * 2;
      weights += row_blocks * kBlockBytes;
    }

    // Values of a lane: [mt][nt][pixel of two][channel of two]. Values of channels past the last
    // are undefined and never stored.
    const int c0 = block * 16 + (lane >> 2) * 2;
    float v[kM * kN * 4];
#pragma unroll
    for (int nt = 0; nt < kN; ++nt) {
      float a[2], b[2];
      load_pair(scale + c0 + nt * 16, a);
      load_pair(shift + c0 + nt * 16, b);
#pragma unroll
      for (int i = 0; i < kM * 4; ++i)
        v[(i / 4 * kN + nt) * 4 + i % 4] =
            prim::fma(acc[i / 4][nt][(i & 1) * 2 + (i >> 1 & 1)], a[i & 1], b[i & 1]);
    }
    PairOf<T> pairs[kM * kN * 2];
    activate_pairs<T, !kFast>(
        params.apply.intrinsic.act.act,
        [&](int i) { return slope[c0 + i / 4 % kN * 16 + (i & 1)]; }, v, pairs);
    // Pixels past the last one are stored to the last position of y, and pixels of the halo to one
    // extra pixel of the output stage: nothing reads either place.
    int y_to[kM * 2], out_to[kM * 2];  // bytes
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int q = q0 + own_pixel + half * next_pixel, left = sources - q;
      const uint16_t* const position = positions + q;
#pragma unroll
      for (int mt = 0; mt < kM; ++mt) {
        const int at = int(prim::load<uint16_t>(position + mt * 8)) + first_position;
        const uint32_t inner = uint32_t(q - first_inner + mt * 8);
        y_to[mt * 2 + half] = prim::opaque(4 * (mt * 8 < left ? at : t.positions - 1));
        out_to[mt * 2 + half] = prim::opaque(int(inner < inners ? inner : inners) * out_pitch);
      }
    }
#pragma unroll
    for (int nt = 0; nt < kN; ++nt) {
      const int c = c0 + nt * 16;
      if (c >= p.m) break;
      T* const y_pair = y + c * params.plan.pair_stride;
      T* const out_pair = out + c;
#pragma unroll
      for (int i = 0; i < kM * 2; ++i) {
        const PairOf<T> pair = pairs[(i / 2 * kN + nt) * 2 + (i & 1)];
        store_pair(byte_offset(y_pair, y_to[i]), pair);
        store_pair(byte_offset(out_pair, out_to[i]), pair);
      }
    }
  }
}

// z of a tile from its y, into the output stage.
template <class T, int kD, bool kFast>
__device__ __forceinline__ void make_pipelined_z(const PipelinedParams<T>& params, const Tile& tile,
                                                 const StripOwner& own, T* out,
                                                 unsigned char* shared) {
  const CudaTile& t = params.apply.tile;
  const Maps& p = params.apply.maps;
  const WindowGrid& windows = params.apply.windows;
  if (own.slot >= own.slots) return;
  const T* const y =
      reinterpret_cast<const T*>(shared + t.y_at) + 2 * own.pair * params.plan.pair_stride;
  const int total = tile.images * windows.by_group.divisor * windows.by_row.divisor;
  const int ghosts_per_map = p.ghosts_per_map();
#pragma unroll 1
  for (int j = 0; j < ghosts_per_map; ++j) {
    const float* const affine =
        reinterpret_cast<const float*>(shared + t.affine_at) + (j + 1) * 3 * t.channels;
    const float* const taps = reinterpret_cast<const float*>(shared + t.taps_at) +
                              j * kD * kD * t.channels + tap_at(2 * own.pair, 0, kD * kD);
    const int channel = p.m + 2 * own.pair * ghosts_per_map + j;  // of out
#pragma unroll 1
    for (int s = own.slot; s < total; s += own.slots) {
      int w = s, h = windows.by_row.split(w);
      const int image = windows.by_group.split(h);
      w *= kStrip;
      h *= 2;
      const int count = min_of(tile.cols - w, kStrip), rows = tile.rows - h;
      if (rows <= 0) continue;
      const int at = (image * t.image_rows + h) * t.pitch + w;  // as t.halo is kD / 2
      float start[2];
      load_pair(affine + t.channels + 2 * own.pair, start);
      Strip<float> v[2];
#pragma unroll
      for (int i = 0; i < 2 * kStripValues; ++i)
        v[i / kStripValues][i / 2 % kStrip][i & 1] = start[i & 1];
      depthwise_two<kD>(y + 2 * at, 2, 2 * t.pitch, taps, rows > 1, v);
      PairOf<T> pairs[2 * kStrip];
      activate_pairs<T, !kFast>(
          params.apply.act2.act,
          [&](int i) { return affine[2 * (t.channels + own.pair) + (i & 1)]; },
          reinterpret_cast<float (&)[2 * kStripValues]>(v), pairs);
      T* to = out + ((image * tile.rows + h) * tile.cols + w) * p.out_channels + channel;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (r >= rows) break;
        if (ghosts_per_map == 1) {
#pragma unroll
          for (int i = 0; i < kStrip; ++i)
            if (i < count) store_pair(to + i * p.out_channels, pairs[r * kStrip + i]);
        } else {  // ghosts past out_channels are dropped
#pragma unroll
          for (int i = 0; i < kStrip; ++i) {
            if (i >= count) break;
            T* const pixel = to + i * p.out_channels;
            if (channel < p.out_channels) store_one(pixel, pairs[r * kStrip + i], 0);
            if (channel + ghosts_per_map < p.out_channels)
              store_one(pixel + ghosts_per_map, pairs[r * kStrip + i], 1);
          }
        }
        to += tile.cols * p.out_channels;
      }
    }
  }
}

template <class T, int kD, bool kFast>
__device__ __forceinline__ void apply_pipelined(const PipelinedParams<T>& params) {
  GHOST_DYN_SHARED(unsigned char, shared);
  const CudaTile& t = params.apply.tile;
  const Maps& p = params.apply.maps;
  const PipelinedPlan& plan = params.plan;
  auto* const full = reinterpret_cast<prim::Mbarrier*>(shared);  // of the stages of x
  const bool leader = threadIdx.x == 0;
  const int64_t image = int64_t(p.h) * p.w;
  const int turns = ceil_div(int(t.tiles), t.workers), first = int(blockIdx.z) * turns;
  const int end = min_of(first + turns, int(t.tiles));
  TileCursor now(t, first), ahead = now;
  const auto load_next = [&](int stage) {
    if (ahead.index >= end) return;
    const Tile tile = ahead.tile(t, p);
    const uint32_t bytes = uint32_t(tile.sources()) * uint32_t(p.c) * 2;
    prim::mbarrier_arrive_expect(full + stage, bytes);
    if (bytes > 0)
      prim::bulk_load(shared + plan.x_at + stage * plan.x_stage,
                      params.apply.intrinsic.in.x + (tile.n0 * image + tile.src_h * p.w) * p.c,
                      bytes, full + stage);
    ahead.advance(t, p);
  };

  if (leader) {
    prim::store<uint4>(shared + kPipelinedZerosAt, uint4{0, 0, 0, 0});
    for (int s = 0; s < plan.stages; ++s) prim::mbarrier_init(full + s, 1);
    prim::fence_async();
    for (int s = 0; s < plan.stages; ++s) load_next(s);
  }
  copy_weight_blocks(shared + t.b_at, t, p, params.apply.intrinsic.in, 0, 0, p.c);
  prim::cp_async_commit();
  load_apply_parameters<Scope::kAny>(params.apply, shared);
#pragma unroll 1
  for (int e = int(threadIdx.x); e < p.m / 2 * plan.pair_stride; e += kThreads)
    prim::store<uint32_t>(shared + t.y_at + e * 4, 0);
#pragma unroll 1
  for (int q = int(threadIdx.x); q < t.max_source; q += kThreads) {
    const int row = q / p.w;
    prim::store<uint16_t>(shared + plan.positions_at + q * 2,
                          uint16_t(q + (row + row / p.h * t.pitch) * t.halo));
  }
  prim::cp_async_wait<0>();
  prim::sync_threads();

  T* const y = reinterpret_cast<T*>(shared + t.y_at);
  const StripOwner own(p.m);
  int stage = 0, parity = 0, half = 0;
#pragma unroll 1
  for (; now.index < end; now.advance(t, p)) {
    const Tile tile = now.tile(t, p);
    T* const out = reinterpret_cast<T*>(shared + plan.out_at + half * plan.out_stage);
    if (t.tiles_h > 1) {
      if (now.carried) {
        carry_rows(y, t, p, plan.pair_stride, tile, own, out);
        prim::sync_threads();
      }
      if (tile.h0 == 0 || tile.h0 + tile.rows + t.halo > p.h)
        clear_outer_rows(y, t, p, plan.pair_stride, tile);
    }
    prim::mbarrier_wait(full + stage, uint32_t(parity));
    make_pipelined_y<T, kFast>(params, tile, shared + plan.x_at + stage * plan.x_stage, out,
                               shared);
    prim::sync_threads();
    if (leader) load_next(stage);
    make_pipelined_z<T, kD, kFast>(params, tile, own, out, shared);
    prim::fence_async();
    if (leader) prim::bulk_wait_read<0>();  // the other output stage is free after the barrier
    prim::sync_threads();
    if (leader) {
      prim::bulk_store(params.apply.output.out + (tile.n0 * image + tile.h0 * p.w) * p.out_channels,
                       out, uint32_t(tile.inners()) * uint32_t(p.out_channels) * 2);
      prim::bulk_commit();
    }
    half ^= 1;
    if (++stage == plan.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
  if (leader) prim::bulk_wait_read<0>();
}

template <class T, int kD, bool kFast>
__global__ void __launch_bounds__(kThreads, 2)
    ghost_apply_pipelined_kernel(const PipelinedParams<T> params) {
  if constexpr (prim::kBulkCopies)
    apply_pipelined<T, kD, kFast>(params);
  else
    prim::trap();
}

// Launches the kernel. Returns cudaErrorNotSupported if x or out is not aligned to 16 bytes, or if
// the library has only code of an architecture before sm_90 for this device.
template <class T>
cudaError_t launch_pipelined(const ForwardArgs& args, cudaStream_t stream) {
  const CudaPlan& base = args.pipelined.base;
  const CudaTile& t = base.tile;
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!aligned(args.x) || !aligned(args.out)) return cudaErrorNotSupported;
  PipelinedParams<T> params;
  params.apply.tile = t;
  params.apply.maps = maps_of(args.problem, t);
  params.apply.windows = WindowGrid(t);
  params.apply.intrinsic = intrinsic_of<T>(args);
  params.apply.w2 = args.w2;
  params.apply.norm2 = typed<T>(args.norm2);
  params.apply.act2 = typed<T>(args.problem.act2, args.slopes2);
  params.apply.output.out = static_cast<T*>(args.out);
  params.plan = args.pipelined;
  params.by_group = FastDiv((t.channels + kPipelinedChannels - 1) / kPipelinedChannels);
  const auto run = [&](auto ghost_apply_pipelined) {
    cudaFuncAttributes attributes;
    const cudaError_t status =
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(ghost_apply_pipelined));
    if (status != cudaSuccess) return status;
    if (attributes.ptxVersion < 90) return cudaErrorNotSupported;
    return GHOST_LAUNCH(ghost_apply_pipelined, grid_of(t), dim3(kThreads), size_t(t.smem_bytes),
                        stream, params);
  };
  const auto fast = [](const Activation& a) { return a.act == Act::kNone || a.act == Act::kReLU; };
  const bool all_fast = fast(args.problem.act1) && fast(args.problem.act2);
  if (args.problem.dw_size == 3)
    return all_fast ? run(&ghost_apply_pipelined_kernel<T, 3, true>)
                    : run(&ghost_apply_pipelined_kernel<T, 3, false>);
  return all_fast ? run(&ghost_apply_pipelined_kernel<T, 5, true>)
                  : run(&ghost_apply_pipelined_kernel<T, 5, false>);
}

}  // namespace ghost::cuda
