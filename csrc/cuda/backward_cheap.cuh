// The depthwise stages of the backward pass, on a tile of pixels in shared memory: for each ghost
//
//   v   = w2 (*) y,  y = act1(bn1(u))
//   da2 = dz act2'(bn2(v))
//
// Tile map: a block owns p.tile.channels intrinsic channels with their ghosts and takes tile after
// tile of pixels; all maps lie in shared memory as [pixel][channel]. Thread t owns the channel pair
// t % pairs throughout, and every groups-th of the tile's strips of kStrip pixels of a row
// (depthwise.cuh). Neighbouring threads have neighbouring channels, then neighbouring strips.
// Binding resource: memory traffic, as in the two kernels that include this file, backward_sums.cuh
// and backward_grads.cuh.
#pragma once

#include "cuda/backward_common.cuh"
#include "cuda/depthwise.cuh"

namespace ghost::cuda {

// A box of pixels of a tile, numbered image by image and row by row.
struct PixelBox {
  int rows = 0, cols = 0, count = 0;  // count: of all images
  FastDiv by_cols, by_rows, by_count;

  PixelBox() = default;
  PixelBox(int images, int rows_, int cols_)
      : rows(rows_),
        cols(cols_),
        count(images * rows_ * cols_),
        by_cols(cols_),
        by_rows(rows_),
        by_count(count) {}
};
struct BoxPixel {
  int image, row, col;
};
__device__ __forceinline__ BoxPixel locate(const PixelBox& box, int index) {
  BoxPixel at;
  at.col = index;
  at.row = box.by_cols.split(at.col);
  at.image = box.by_rows.split(at.row);
  return at;
}

// Every step-th pixel of a box, from the first one on. Only the constructor divides.
struct BoxWalk {
  int index, step;
  BoxPixel at, ahead;

  __device__ __forceinline__ BoxWalk(const PixelBox& box, int first, int step_)
      : index(first), step(step_), at(locate(box, first)), ahead(locate(box, step_)) {}
  __device__ __forceinline__ void advance(const PixelBox& box) {
    index += step;
    at.col += ahead.col;
    at.row += ahead.row;
    at.image += ahead.image;
    if (at.col >= box.cols) {
      at.col -= box.cols;
      ++at.row;
    }
    if (at.row >= box.rows) {
      at.row -= box.rows;
      ++at.image;
    }
  }
};

// Layout of a map of the tile in shared memory.
struct SharedMap {
  int image_rows = 0, pitch = 0;  // rows from image to image, pixels from row to row
  int stride = 0;                 // elements from pixel to pixel

  __device__ __forceinline__ int offset(int image, int row, int col) const {
    return ((image * image_rows + row) * pitch + col) * stride;
  }
};

// A map [N, channels, H, W] with any strides.
struct StridedMap {
  const void* data = nullptr;
  int64_t image = 0, channel = 0, row = 0, col = 0;  // strides in elements
  bool pixels_first = false;  // neighbouring threads read neighbouring pixels, not channels
};

struct CheapParams {
  GradsTile tile;
  int batch = 0, height = 0, width = 0;  // of u
  int intrinsic = 0, ghosts_per_map = 0, out_channels = 0, d = 1;
  FastDiv by_vectors, by_pairs;  // 16-byte vectors and pairs of channels of a block
  Act act1 = Act::kNone, act2 = Act::kNone;
  double slope1 = 0, slope2 = 0;
  ParamRef slopes1, slopes2;  // of a PReLU, [m] and [g]
  PixelBox y, v, inner, v_strips, inner_strips;
  SharedMap y_map, grad_map, dy_map;
  StridedMap grad;
  int y_grad_bytes = 0, z_grad_bytes = 0;  // width of aligned copies of grad's two halves, or 0
  const void* u = nullptr;                 // [pixel][u_pitch]
  int64_t u_pitch = 0;
  NormParams norm1, norm2;
  ParamRef w2;              // [g, d, d]
  bool batch_stats = true;  // of batch norm 2
  double values2 = 1;       // divisor that makes means of the sums over all rows of sums2
  int sums2_rows = 0;
  void* sums2 = nullptr;        // [rows][2][g]: sums of da2 and of da2 * vhat
  void* slope_sums2 = nullptr;  // [rows][g]: sums of dz min(bn2(v), 0), or null: not needed
  void* da1 = nullptr;          // [pixel][da1_pitch]
  int64_t da1_pitch = 0;        // 0: da1 is not needed
  // [workers][2][m]: sums of da1 and of da1 * uhat, or null: dy is not needed
  void* sums1 = nullptr;
  void* slope_sums1 = nullptr;  // [workers][m]: sums of dy min(bn1(u), 0), or null: not needed
  void* dw2_sums = nullptr;     // [workers][g, d, d], or null: not needed
};

// A tile's first pixel.
struct TileOrigin {
  int n0, h0, w0;
};
__device__ __forceinline__ TileOrigin tile_origin(const GradsTile& t, int64_t index) {
  const int64_t per_image = int64_t{t.tiles_h} * t.tiles_w;
  const int64_t group = index / per_image;
  const int rest = static_cast<int>(index - group * per_image);
  return {static_cast<int>(group) * t.images, rest / t.tiles_w * t.rows, rest % t.tiles_w * t.cols};
}
__device__ __forceinline__ bool inside(const CheapParams& p, int n, int h, int w) {
  return n < p.batch && static_cast<unsigned>(h) < static_cast<unsigned>(p.height) &&
         static_cast<unsigned>(w) < static_cast<unsigned>(p.width);
}

// Bit i: pixel i of a strip of `pixels` pixels from (h, w) of image n on lies in the image.
__device__ __forceinline__ unsigned pixels_inside(const CheapParams& p, int n, int h, int w,
                                                  int pixels) {
  const int begin = max_of(-w, 0), end = min_of(p.width - w, pixels);
  const bool row = n < p.batch && static_cast<unsigned>(h) < static_cast<unsigned>(p.height);
  return row && begin < end ? (1u << end) - (1u << begin) : 0;
}

// A thread's share: a pair of the block's channels, and every groups-th strip.
struct Owner {
  int tid, channels;  // channels of the block, masked ones included
  int first;          // first channel of the block
  int pair;           // first of the thread's two channels, within the block
  int group, groups;  // threads past the last group own nothing

  __device__ __forceinline__ Owner(const CheapParams& p, int first_)
      : tid(static_cast<int>(threadIdx.x)),
        channels(p.tile.channels),
        first(first_),
        pair(tid),
        group(p.by_pairs.split(pair)),
        groups(kThreads / (channels / 2)) {
    pair *= 2;
  }
  __device__ __forceinline__ bool active() const { return group < groups; }
};

// The vector of a block's channels that a thread copies, and every groups-th pixel. Threads past
// the last group copy nothing.
struct Copier {
  int channel;  // the vector's first
  int group, groups;

  template <class T>
  static __device__ __forceinline__ Copier of(const CheapParams& p) {
    Copier me;
    int rest = kThreads;
    me.channel = static_cast<int>(threadIdx.x);
    me.group = p.by_vectors.split(me.channel);
    me.groups = p.by_vectors.split(rest);
    me.channel *= kVector<T>;
    return me;
  }
  __device__ __forceinline__ bool active() const { return group < groups; }
};

// ------------------------------------------------------------------------------------- copies

// One part of grad_out, `valid` channels from `channel` on and `step` apart, to `window` pixels of
// shared memory; zeros outside the image and for the other channels of the block. Aligned
// neighbours are copied in the background: the caller commits and waits.
template <class T>
__device__ __forceinline__ void copy_grad(const CheapParams& p, const Owner& me, int64_t channel,
                                          int step, int valid, int bytes, const PixelBox& box,
                                          const TileOrigin& o, const SharedMap& to, T* shared) {
  const T* const base = static_cast<const T*>(p.grad.data) + channel * p.grad.channel;
  const auto source = [&](const BoxPixel& at) {
    return base + (o.n0 + at.image) * p.grad.image + (o.h0 + at.row) * p.grad.row +
           (o.w0 + at.col) * p.grad.col;
  };
  if (bytes > 0) {
    const Copier mine = Copier::of<T>(p);
    if (!mine.active()) return;
    const int c = mine.channel;
    for (BoxWalk walk(box, mine.group, mine.groups); walk.index < box.count; walk.advance(box)) {
      const BoxPixel& at = walk.at;
      T* const out = shared + to.offset(at.image, at.row, at.col) + c;
      const bool wanted = inside(p, o.n0 + at.image, o.h0 + at.row, o.w0 + at.col);
      const T* const in = wanted ? source(at) + c : base;
      if (wanted && c < valid && c + kVector<T> > valid) {
        for (int e = 0; e < kVector<T>; ++e)
          out[e] = c + e < valid ? in[e] : prim::from_float<T>(0);
      } else if (bytes == 16) {
        prim::cp_async<16>(out, c < valid ? in : base, wanted && c < valid);
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          prim::cp_async<8>(out + e * (kVector<T> / 2),
                            c < valid ? in + e * (kVector<T> / 2) : base, wanted && c < valid);
      }
    }
    return;
  }
  // Pairs of channels, four of them in flight.
  const int64_t apart = step * p.grad.channel;
  const int items = box.count * p.by_pairs.divisor;
  constexpr int kUnroll = 4;
  for (int first = me.tid; first < items; first += kUnroll * kThreads) {
    T x[kUnroll], y[kUnroll];
    int out[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int i = first + k * kThreads;
      x[k] = y[k] = prim::from_float<T>(0);
      out[k] = -1;
      if (i < items) {
        int pixel = i, pair;
        if (p.grad.pixels_first) {
          pair = box.by_count.split(pixel) * 2;
        } else {
          pair = i;
          pixel = p.by_pairs.split(pair);
          pair *= 2;
        }
        const BoxPixel at = locate(box, pixel);
        out[k] = to.offset(at.image, at.row, at.col) + pair;
        if (inside(p, o.n0 + at.image, o.h0 + at.row, o.w0 + at.col)) {
          const T* const in = source(at) + pair * apart;
          if (pair < valid) x[k] = in[0];
          if (pair + 1 < valid) y[k] = in[apart];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k)
      if (out[k] >= 0) store_pair(shared + out[k], prim::to_float(x[k]), prim::to_float(y[k]));
  }
}

// How many of the block's channels have a ghost j below out_channels: ghost j of channel c is
// output channel m + c * ghosts_per_map + j.
__device__ __forceinline__ int ghosts_kept(const CheapParams& p, const Owner& me, int j) {
  const int left = p.out_channels - p.intrinsic - j;  // c * ghosts_per_map < left
  const int kept = left <= 0 ? 0 : (left + p.ghosts_per_map - 1) / p.ghosts_per_map;
  const int end = kept < p.intrinsic ? kept : p.intrinsic;
  const int here = end - me.first;
  return here < 0 ? 0 : here < me.channels ? here : me.channels;
}

template <class T>
__device__ __forceinline__ void copy_ghost_grad(const CheapParams& p, const Owner& me, int j,
                                                const PixelBox& box, const TileOrigin& o,
                                                const SharedMap& to, T* shared) {
  copy_grad<T>(p, me, int64_t{p.intrinsic} + int64_t{me.first} * p.ghosts_per_map + j,
               p.ghosts_per_map, ghosts_kept(p, me, j), p.z_grad_bytes, box, o, to, shared);
}

// Rows of norm2 [ghosts_per_map][kNorm2Rows][channels] in shared memory, the parameters of batch
// norm 2. With batch statistics dv = scale da2 + kDvV v + kDvConst; until these two are computed,
// their rows hold the means of da2 vhat and of da2. A kernel keeps the slopes of a PReLU in a row
// that it does not need otherwise.
enum : int { kScale = 0, kShift = 1, kMean = 2, kInvStd = 3, kDvConst = 4, kDvV = 5 };
inline constexpr int kNorm2Rows = 6;
// Rows of norm1 [4][channels]: kScale, kShift, kMean, and the slopes.
inline constexpr int kSlope1 = 3;

// y = act1(bn1(u)) of the window's pixels from pixel-major u, zeros outside the image.
template <class T>
__device__ __forceinline__ void load_y(const CheapParams& p, const Owner& me, const TileOrigin& o,
                                       const Accumulator<T>* norm1, T* y) {
  using A = Accumulator<T>;
  constexpr int kUnroll = 2;
  const Copier mine = Copier::of<T>(p);
  if (!mine.active()) return;
  const int c = mine.channel;
  const bool exists = me.first + c < p.u_pitch;
  const T* const u = static_cast<const T*>(p.u) + me.first + c;
  A scale[kVector<T>], shift[kVector<T>];
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    scale[e] = norm1[kScale * me.channels + c + e];
    shift[e] = norm1[kShift * me.channels + c + e];
  }
  for (BoxWalk walk(p.y, mine.group, mine.groups); walk.index < p.y.count;) {
    uint4 raw[kUnroll];
    int out[kUnroll];
    bool pixel[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k, walk.advance(p.y)) {
      const int n = o.n0 + walk.at.image, h = o.h0 + walk.at.row, w = o.w0 + walk.at.col;
      out[k] =
          walk.index < p.y.count ? p.y_map.offset(walk.at.image, walk.at.row, walk.at.col) + c : -1;
      pixel[k] = out[k] >= 0 && exists && inside(p, n, h, w);
      raw[k] = uint4{0, 0, 0, 0};
      if (pixel[k])
        raw[k] =
            prim::load_readonly<uint4>(u + ((int64_t{n} * p.height + h) * p.width + w) * p.u_pitch);
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (out[k] < 0) continue;
      A v[kVector<T>];
      unpack<T>(raw[k], v);
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) v[e] = prim::fma(v[e], scale[e], shift[e]);
      activate(
          p.act1,
          [&](int e) {
            return p.act1 == Act::kPReLU ? norm1[kSlope1 * me.channels + c + e]
                                         : static_cast<A>(p.slope1);
          },
          v);
      prim::store<uint4>(y + out[k], pixel[k] ? pack<T>(v) : uint4{0, 0, 0, 0});
    }
  }
}

// -------------------------------------------------------------------------------- parameters

// Batch norm 2 and taps of the block's ghosts j0 .. j0 + count to shared memory: [count][rows of
// norm2][channels] and [count][taps of all channels] (tap_at). Zeros for masked channels.
template <class T>
__device__ __forceinline__ void load_ghosts(const CheapParams& p, const Owner& me, int j0,
                                            int count, int taps, Accumulator<T>* norm2,
                                            Accumulator<T>* w2) {
  using A = Accumulator<T>;
  for (int i = me.tid; i < count * me.channels; i += kThreads) {
    const int j = i / me.channels, c = i - j * me.channels;
    A* const out = norm2 + j * kNorm2Rows * me.channels + c;
    Affine<A> f;
    if (me.first + c < p.intrinsic)
      f = load_affine<A>(p.norm2, int64_t{me.first + c} * p.ghosts_per_map + j0 + j);
    out[kScale * me.channels] = f.scale;
    out[kShift * me.channels] = f.shift;
    out[kMean * me.channels] = f.mean;
    out[kInvStd * me.channels] = f.inv_std;
    out[kDvConst * me.channels] = 0;
    out[kDvV * me.channels] = 0;
  }
  const int owned = min_of(p.intrinsic - me.first, me.channels);
  for (int j = 0; j < count; ++j)
    load_taps(w2 + j * taps * me.channels, p.w2, int64_t{me.first} * p.ghosts_per_map + j0 + j,
              p.ghosts_per_map, owned, me.channels, taps, static_cast<const A*>(nullptr));
}

// The slopes of a PReLU of ghosts j0 .. j0 + count to a row of norm2. The thread that writes a
// slope also wrote this element in load_ghosts: no barrier is needed in between.
template <class A>
__device__ __forceinline__ void load_ghost_slopes(const CheapParams& p, const Owner& me, int j0,
                                                  int count, int row, A* norm2) {
  if (p.act2 != Act::kPReLU) return;
#pragma unroll 1
  for (int i = me.tid; i < count * me.channels; i += kThreads) {
    const int j = i / me.channels, c = i - j * me.channels;
    norm2[(j * kNorm2Rows + row) * me.channels + c] =
        me.first + c < p.intrinsic
            ? load_param<A>(p.slopes2, int64_t{me.first + c} * p.ghosts_per_map + j0 + j)
            : A(0);
  }
}

// A strip of this thread's two channels is a flat array: values 2 * i and 2 * i + 1 of pixel i.

// For every strip of the box of v of ghost j, whose parameters are at norm2 and w2: v by the
// stencil, then da2 = dz * act2'(bn2(v)), then use(offset in `grads` of the first pixel, pixels of
// the strip, v, da2, exists). Bit k of exists: value k has a pixel in the image and a ghost below
// out_channels. For a value without these da2 is undefined and v is finite. use_slopes: see
// activate_grad; the products of such values are zero. kSlopes: the row of norm2 with the slopes of
// a PReLU.
template <int kSlopes, class T, class Use, class UseSlopes>
__device__ __forceinline__ void cheap_gradient(const CheapParams& p, const Owner& me, int j,
                                               const TileOrigin& o, const T* y, const T* grads,
                                               int grads_row, int grads_col,
                                               const Accumulator<T>* norm2,
                                               const Accumulator<T>* w2, const Use& use,
                                               const UseSlopes& use_slopes) {
  using A = Accumulator<T>;
  if (!me.active()) return;
  const int kept = ghosts_kept(p, me, j) - me.pair;
  const unsigned channels = kept >= 2 ? 3u : kept == 1 ? 1u : 0u;
  const A* const norm = norm2 + me.pair;
#pragma unroll 1
  for (int item = me.group; item < p.v_strips.count; item += me.groups) {
    BoxPixel at = locate(p.v_strips, item);
    at.col *= kStrip;
    const int offset =
        p.grad_map.offset(at.image, at.row + grads_row, at.col + grads_col) + me.pair;
    const int pixels = min_of(p.v.cols - at.col, kStrip);
    const unsigned in_image =
        pixels_inside(p, o.n0 + at.image, o.h0 + at.row, o.w0 + at.col, pixels);
    Strip<A> rows = {};
    depthwise_window(p.d, y + p.y_map.offset(at.image, at.row, at.col) + me.pair, p.y_map.stride,
                     p.y_map.pitch * p.y_map.stride, w2 + tap_at(me.pair, 0, p.d * p.d), rows);
    A scale[2], shift[2], v[kStripValues], da2[kStripValues];
    load_pair(norm + kScale * me.channels, scale);
    load_pair(norm + kShift * me.channels, shift);
    unsigned exists = 0;
#pragma unroll
    for (int i = 0; i < kStrip; ++i) {
      const bool pixel = in_image >> i & 1u;
      if (pixel) exists |= channels << (2 * i);
      A g[2] = {0, 0};
      if (pixel) load_pair(grads + offset + i * p.grad_map.stride, g);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        v[2 * i + e] = pixel ? rows[i][e] : A(0);
        da2[2 * i + e] = g[e];
      }
    }
    activate_grad(
        p.act2,
        [&](int e) {
          return p.act2 == Act::kPReLU ? norm[kSlopes * me.channels + e] : static_cast<A>(p.slope2);
        },
        scale, shift, v, da2, use_slopes);
    use(offset, pixels, v, da2, exists);
  }
}

}  // namespace ghost::cuda
