// The maps of a tile from shared memory to the output:
//
//   out = maps * nearest(gate) + residual
//
// Tile map: in NHWC neighbouring lanes store neighbouring vectors of a pixel; in NCHW a warp stores
// 32 pixels of several channel pairs.
// Binding resource: DRAM bandwidth.
#pragma once

#include "cuda/tile.cuh"

namespace ghost::cuda {

// The tensors of the output: out [n, channels, h, w], dense in the kernel's layout; residual (or
// null) of the same shape and layout; gate (or null) [n, channels, gate_h, gate_w] in the same
// layout.
template <class T>
struct Output {
  T* out = nullptr;
  const T* residual = nullptr;
  const T* gate = nullptr;
  int32_t channels = 0;
  int32_t bytes = 0;  // widest aligned store
  int32_t gate_h = 0, gate_w = 0;
  float gate_rows = 0, gate_cols = 0;  // gate_h / h and gate_w / w

  // The output from channel c on, in NHWC.
  __device__ __forceinline__ Output from_channel(int c) const {
    Output r = *this;
    r.out += c;
    if (residual != nullptr) r.residual += c;
    if (gate != nullptr) r.gate += c;
    return r;
  }
};

// Offset of the gate's pixel for each inner pixel, in pixels for NHWC and in elements of channel 0
// for NCHW, as the offsets of build_table. The pixel is that of F.interpolate(mode="nearest").
template <Layout kLayout, class T>
__device__ __forceinline__ void build_gate_table(int32_t* table, const Tile& tile,
                                                 const Output<T>& o) {
  const int plane = o.gate_h * o.gate_w;
  const int image = (kLayout == Layout::kNHWC ? 1 : o.channels) * plane;
  const int warps = int(blockDim.x >> 5);
#pragma unroll 1
  for (int r = int(prim::warp()); r < tile.images * tile.rows; r += warps) {
    const int n = r / tile.rows, h = tile.h0 + r - n * tile.rows;
    const int row = n * image + min_of(int(float(h) * o.gate_rows), o.gate_h - 1) * o.gate_w;
#pragma unroll 1
    for (int c = int(prim::lane()); c < tile.cols; c += 32)
      table[r * tile.cols + c] = row + min_of(int(float(tile.w0 + c) * o.gate_cols), o.gate_w - 1);
  }
}

// v = f(v, a, b) for each pair of numbers of a vector of a 16-bit type, as 32-bit words; a vector
// of one number is the lower half of a word.
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

// v = v * gate + residual with one rounding. gated: there is a gate; added: there is a residual.
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

// Stores one vector to the output, `at` bytes from its first element. load_gate(gate) loads its
// gates.
template <class T, int kVec, class LoadGate>
__device__ __forceinline__ void store_out(const Output<T>& o, int64_t at, Vec<T, kVec> v,
                                          const LoadGate& load_gate) {
  if (o.residual != nullptr || o.gate != nullptr) {
    Vec<T, kVec> gate{}, residual{};
    if (o.gate != nullptr) load_gate(gate);
    if (o.residual != nullptr) residual = load_vec<T, kVec>(byte_offset(o.residual, at));
    scale_and_add(v, o.gate != nullptr, gate, o.residual != nullptr, residual);
  }
  store_vec<T, kVec>(byte_offset(o.out, at), v);
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
// b if second, else a. Field by field: a choice of references would put both into local memory.
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
// In NCHW the pixels of a vector must be inner pixels that are neighbours in memory. gates: the
// table of build_gate_table, if there is a gate. kAny = false: there is no gate, and a store has 8
// or 16 bytes.
template <Layout kLayout, bool kAny = true, class T>
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
  if constexpr (!kAny) at.gate = nullptr;
  with_bytes<T, kAny ? int(sizeof(T)) : 8>(o.bytes, [&](auto width) {
    constexpr int kVec = decltype(width)::value / int(sizeof(T));
    if constexpr (kLayout == Layout::kNHWC) {
      // A thread keeps its channels and takes every slots-th pixel; more vectors than threads take
      // several rounds.
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
        // Offsets in bytes from the thread's first channel: an address costs one multiplication.
        const Output<T> mine = at.from_channel(from.channel(k));
        const T* const data = from.data + k;
        const auto offset = [&](int32_t pixel) {
          return uint64_t(uint32_t(pixel)) * (uint32_t(o.channels) * uint32_t(sizeof(T)));
        };
#pragma unroll 2
        for (int i = slot; i < inners; i += slots) {
          const PixelEntry entry = inner[i];
          const int pixel = from.by_position ? entry.position : i;
          store_out(mine, offset(entry.offset),
                    load_vec<T, kVec>(byte_offset(data, pixel * (from.stride * int(sizeof(T))))),
                    [&](Vec<T, kVec>& v) {
                      v = load_vec<T, kVec>(byte_offset(mine.gate, offset(gates[i])));
                    });
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
            store_out(at, (inner[i].offset + channel * plane) * int64_t(sizeof(T)), v,
                      [&](Vec<T, kVec>& gate) {
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
