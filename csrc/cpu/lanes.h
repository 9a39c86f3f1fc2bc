// Products with channels along the lanes, and the depthwise rows that follow them: NHWC.
//
//   Y[p][c] = act(shift[c] + sum_k X[p][k] W[k][c])
//   v[w][c] = act(shift[c] + sum_{i,j} tap[i][j][c] * y_i[w + j - d/2][c])     y_i: d rows of y
//
// Tile map, product: a block keeps kPixels x kVecs accumulators in registers. Weights are loaded as
// vectors of channels from the panels, values of x are broadcast. K goes in slices, so that a
// slice of the block's weights stays in L1 while all pixels pass. No lane idles at 49 or 196
// pixels; where channels do not fill the last vector, its idle lanes are never stored.
// Tile map, depthwise: one vector of channels slides along the d rows; every pixel is loaded once
// per row and feeds d outputs. Columns outside of the image are never visited.
// Binding resource: the FMA ports.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "core/problem.h"
#include "cpu/activation.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

template <class A>
inline constexpr int kPanelVecs = int(kPanel) / kLanes<A>;
// Vectors of channels in a block: blocks start at even vectors where a panel has several.
template <class A>
inline constexpr int kMostBlockVecs = kPanelVecs<A> == 1 ? 4 : 2;
constexpr int most_pixels(int vecs) {
#if defined(__AVX512F__) || defined(__aarch64__)
  return vecs <= 2 ? 12 : vecs == 3 ? 8 : 6;
#else
  return vecs == 1 ? 12 : 6;
#endif
}

// The first n lanes, n > 0. Masked stores are slow on some AVX2 processors.
template <class A>
GHOST_INLINE void store_first(A* p, Vec<A> v, int64_t n) {
  constexpr int L = kLanes<A>;
  if (n >= L) return store(p, v);
#if defined(__AVX2__) && !defined(__AVX512F__)
  constexpr int kHalf = L / 2;
  typedef A Half __attribute__((vector_size(kVectorBytes / 2)));
  Half low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  if (n >= kHalf) {
    std::memcpy(p, &low, sizeof low);
    p += kHalf;
    n -= kHalf;
    low = high;
  }
  for (int l = 0; l < n; ++l) p[l] = low[l];
#else
  store_n(p, v, n);
#endif
}

// Addresses that a product prefetches, advancing by a step of bytes for each k: of values that it
// reads later, and of results that it writes later.
struct Ahead {
  const char *read, *write;
  int64_t read_step = 0, write_step = 0;
};
inline constexpr int64_t kDistance = 4096;  // bytes ahead of x and y

// Where a product's x is: any order of pixels and channels. K is a row of channels, or several:
// what lies under the rows of taps of a convolution.
template <class A>
struct LaneSource {
  const A* x;                   // image 0, pixel 0, channel 0
  int64_t image, pixel, depth;  // elements to the next image, pixel and channel
  int64_t images, pixels;       // pixels of a row
  int64_t rows = 1, row = 0;    // of an image; elements from row to row
  int64_t taps = 1, tap = 0;    // rows of taps; elements from one to the next
};

// What a product does with its sums.
template <class A>
struct LaneOut {
  A* y;  // [pixels][ld], channel 0 of the product
  int64_t ld;
  Activation act;
  bool fetch = false;       // prefetch x, which is contiguous and larger than L2
  bool fetch_y = false;     // prefetch y too
  bool accumulate = false;  // add to y instead of to the shift: not the first slice of K
};

template <class A>
void activate_pixels(const Activation& a, A* y, int64_t ld, int64_t pixels, int64_t channels) {
  constexpr int L = kLanes<A>;
  with_activation(a.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    if constexpr (kAct == Act::kNone) return;
    for (int64_t p = 0; p < pixels; ++p, y += ld) {
      int64_t c = 0;
      for (; c + L <= channels; c += L) store(y + c, activate<kAct, A>(load(y + c), A(a.slope)));
      if (c < channels)
        store_first(y + c, activate<kAct, A>(load_n(y + c, channels - c), A(a.slope)),
                    channels - c);
    }
  });
}

// One register block. w: the block's first vector in its panel, further panels ldpanel apart; K: of
// one row of taps.
template <class A, int kVecs, int kPixels>
__attribute__((noinline)) void lane_block(const A* x, const LaneSource<A>& in, const A* w,
                                          int64_t ldpanel, int64_t K, const A* shift,
                                          const LaneOut<A>& out, A* y, int64_t channels,
                                          Ahead ahead) {
  constexpr int L = kLanes<A>, kGroups = (kPixels + 2) / 3;
  using V = Vec<A>;
  const int64_t last = channels - (kVecs - 1) * L;  // channels of the last vector
  V acc[kPixels][kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    const V s = out.accumulate ? V{} : load(shift + v * L);
#pragma GCC unroll 12
    for (int q = 0; q < kPixels; ++q) acc[q][v] = s;
  }
  const int64_t step = in.pixel * int64_t(sizeof(A)), deeper = in.depth * int64_t(sizeof(A));
  const char *read = ahead.read, *write = ahead.write;
  for (int64_t tap = 0; tap < in.taps; ++tap, x += in.tap) {
    // Three pixels a pointer: base, base + step and base + 2 * step are addresses of one
    // instruction.
    const char* p[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) p[g] = reinterpret_cast<const char*>(x + 3 * g * in.pixel);
    for (int64_t k = 0; k < K; ++k) {
      __builtin_prefetch(read, 0, 2);
      __builtin_prefetch(write, 1, 2);
      read += ahead.read_step;
      write += ahead.write_step;
      V wv[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        wv[v] = load(w + v / kPanelVecs<A> * ldpanel + v % kPanelVecs<A> * L);
#pragma GCC unroll 12
      for (int q = 0; q < kPixels; ++q) {
        const V xv = set1(*reinterpret_cast<const A*>(p[q / 3] + q % 3 * step));
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[q][v] += xv * wv[v];
      }
      w += kPanel;
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) p[g] += deeper;
    }
  }
  const bool with_relu = out.act.act == Act::kReLU;
#pragma GCC unroll 12
  for (int q = 0; q < kPixels; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      A* const to = y + q * out.ld + v * L;
      const bool partial = v == kVecs - 1 && last < L;
      V r = acc[q][v];
      if (out.accumulate) r += partial ? load_n(to, last) : load(to);
      if (with_relu) r = relu(r);
      if (partial)
        store_first(to, r, last);
      else
        store(to, r);
    }
  if (!with_relu && out.act.act != Act::kNone)
    activate_pixels(out.act, y, out.ld, kPixels, channels);
}

template <class A>
using LaneBlock = void (*)(const A*, const LaneSource<A>&, const A*, int64_t, int64_t, const A*,
                           const LaneOut<A>&, A*, int64_t, Ahead);

template <class A, int kVecs, size_t... kIndex>
constexpr std::array<LaneBlock<A>, sizeof...(kIndex)> lane_blocks(std::index_sequence<kIndex...>) {
  return {lane_block<A, kVecs, int(kIndex) + 1>...};
}

// All pixels of one block of channels, in tiles of nearly equal size.
template <class A, int kVecs>
void lane_pixels(const LaneSource<A>& in, const A* w, int64_t ldpanel, int64_t K, const A* shift,
                 const LaneOut<A>& out, A* y, int64_t channels, const char* ahead,
                 int64_t ahead_bytes) {
  constexpr int kMost = most_pixels(kVecs);
  static constexpr auto kBlocks = lane_blocks<A, kVecs>(std::make_index_sequence<kMost>{});
  const int64_t tiles = (in.pixels + kMost - 1) / kMost, small = in.pixels / tiles,
                large = in.pixels % tiles;  // tiles of one pixel more
  const int64_t rounds = in.images * in.rows * tiles * in.taps * K,
                bytes = in.rows * in.pixels * int64_t(sizeof(A));
  // Without anything to fetch the addresses stay where there is memory for certain.
  Ahead fetch{reinterpret_cast<const char*>(in.x), reinterpret_cast<const char*>(y)};
  if (out.fetch) {
    fetch.read += kDistance;
    fetch.read_step = bytes * in.pixel / rounds;
    if (out.fetch_y) {
      fetch.write += kDistance;
      fetch.write_step = bytes * out.ld / rounds;
    }
  } else if (ahead) {
    fetch.read = ahead;
    fetch.read_step = (ahead_bytes + rounds - 1) / rounds;
  }
  for (int64_t r = 0; r < in.images * in.rows; ++r) {
    const A* x = in.x + r / in.rows * in.image + r % in.rows * in.row;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t count = small + (t < large ? 1 : 0);
      kBlocks[size_t(count - 1)](x, in, w, ldpanel, K, shift, out, y, channels, fetch);
      x += count * in.pixel;
      y += count * out.ld;
      fetch.read += fetch.read_step * in.taps * K;
      fetch.write += fetch.write_step * in.taps * K;
    }
  }
}

// Y[0..pixels)[0..M) from X[0..pixels)[0..K), the images' pixels one after the other in Y.
//   panels: [ceil(M/kPanel)][K][kPanel], zero padded; shift: padded to kPanel; depth: of a slice
template <class A>
void lane_product(const LaneSource<A>& source, const A* panels, int64_t K, const A* shift,
                  int64_t M, int64_t depth, const LaneOut<A>& out) {
  constexpr int L = kLanes<A>, kMost = kMostBlockVecs<A>;
  const int64_t ldpanel = K * kPanel, total = (M + L - 1) / L, blocks = (total + kMost - 1) / kMost;
  // Slices are several rows of taps, or parts of one.
  const int64_t per_tap = K / source.taps,
                some = std::max<int64_t>(depth / std::max<int64_t>(per_tap, 1), 1),
                parts = std::max<int64_t>((per_tap + depth - 1) / depth, 1),
                slices = parts > 1 ? source.taps * parts : (source.taps + some - 1) / some;
  for (int64_t s = 0; s < slices; ++s) {
    const int64_t tap = parts > 1 ? s / parts : s * some, part = s % parts,
                  from = parts > 1 ? per_tap * part / parts : 0,
                  len = (parts > 1 ? per_tap * (part + 1) / parts : per_tap) - from;
    LaneSource<A> in = source;
    in.x += tap * in.tap + from * in.depth;
    in.taps = parts > 1 ? 1 : std::min(some, source.taps - tap);
    const int64_t k0 = tap * per_tap + from, deep = in.taps * len;
    LaneOut<A> o = out;
    o.accumulate = s > 0;
    if (s + 1 < slices) o.act = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const bool even = kPanelVecs<A> > 1;
      const int64_t v0 = even ? kMost * b : total * b / blocks,
                    v1 = even ? std::min(v0 + kMost, total) : total * (b + 1) / blocks;
      const int64_t c = v0 * L, channels = std::min(M, v1 * L) - c;
      o.fetch = out.fetch && s == 0 && b == 0;
      const A* const w = panels + c / kPanel * ldpanel + k0 * kPanel + c % kPanel;
      // The next block's weights may come from beyond L2.
      const A* next = nullptr;
      if (b + 1 < blocks)
        next = panels + v1 * L / kPanel * ldpanel + k0 * kPanel;
      else if (s + 1 < slices)
        next = panels + (k0 + deep) * kPanel;
      const auto pass = [&](auto vecs) {
        constexpr int kVecs = decltype(vecs)::value;
        if constexpr (kVecs <= kMost)
          lane_pixels<A, kVecs>(in, w, ldpanel, len, shift + c, o, out.y + c, channels,
                                reinterpret_cast<const char*>(next),
                                deep * kPanel * int64_t(sizeof(A)));
      };
      switch (int(v1 - v0)) {
        case 1:
          pass(std::integral_constant<int, 1>{});
          break;
        case 2:
          pass(std::integral_constant<int, 2>{});
          break;
        case 3:
          pass(std::integral_constant<int, 3>{});
          break;
        case 4:
          pass(std::integral_constant<int, 4>{});
          break;
      }
    }
  }
}

// Rows [row0, row1) of ghosts.
template <class A>
struct LaneDepthwise {
  A* pixels;         // y and z of a pixel; row 0 of the image, or of the ring
  int64_t ring, ld;  // rows of the ring; elements of a pixel
  const A* zeros;    // [channels]: a pixel outside of the image
  int64_t row0, row1, height, width, channels;
  const A* taps;  // [d * d][ld_taps]
  int64_t ld_taps;
  const A* shift;
  Activation act;
  int64_t y,
      z;  // offsets in a pixel: of the y that channel c of z is computed from, at y + c; of z

  A* row(int64_t r) const { return pixels + (r < ring ? r : r % ring) * width * ld; }
};

template <class A, int D, bool kFull>
GHOST_INLINE void lane_slide(const LaneDepthwise<A>& s, int64_t c, int64_t n) {
  constexpr int R = D / 2;
  using V = Vec<A>;
  auto get = [n](const A* p)
                 __attribute__((always_inline)) { return kFull ? load(p) : load_n(p, n); };
  V tap[D][D];
#pragma GCC unroll 7
  for (int i = 0; i < D; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < D; ++j) tap[i][j] = get(s.taps + (i * D + j) * s.ld_taps + c);
  const V shift = get(s.shift + c);
  const bool with_relu = s.act.act == Act::kReLU;
  const int64_t ld = s.ld, width = s.width;
  A* out = nullptr;
  auto finish = [&](V r) __attribute__((always_inline)) {
    if (with_relu) r = relu(r);
    if (kFull)
      store(out, r);
    else
      store_first(out, r, n);
    out += ld;
  };
  for (int64_t row = s.row0; row < s.row1; ++row) {
    const A* y[D];
    int64_t step[D];
#pragma GCC unroll 7
    for (int i = 0; i < D; ++i) {
      const int64_t r = row + i - R;
      const bool inside = r >= 0 && r < s.height;
      y[i] = inside ? s.row(r) + s.y + c : s.zeros;
      step[i] = inside ? ld : 0;
    }
    out = s.row(row) + s.z + c;
    // While input column w is read, acc[a] belongs to output column w - R + a.
    V acc[D];
#pragma GCC unroll 7
    for (int a = 0; a < D; ++a) acc[a] = shift;
    for (int64_t w = 0; w < width; ++w) {
#pragma GCC unroll 7
      for (int i = 0; i < D; ++i) {
        const V v = get(y[i]);
        y[i] += step[i];
#pragma GCC unroll 7
        for (int a = 0; a < D; ++a) acc[a] += tap[i][D - 1 - a] * v;
      }
      if (w >= R) finish(acc[0]);
#pragma GCC unroll 7
      for (int a = 0; a + 1 < D; ++a) acc[a] = acc[a + 1];
      acc[D - 1] = shift;
    }
#pragma GCC unroll 3
    for (int a = 0; a < R; ++a)
      if (width - R + a >= 0) finish(acc[a]);
  }
}

template <class A, int D>
__attribute__((noinline)) void lane_depthwise(const LaneDepthwise<A>& s) {
  constexpr int L = kLanes<A>;
  int64_t c = 0;
  for (; c + L <= s.channels; c += L) lane_slide<A, D, true>(s, c, L);
  if (c < s.channels) lane_slide<A, D, false>(s, c, s.channels - c);
}
template <class A>
void lane_depthwise(int64_t d, const LaneDepthwise<A>& s) {
  switch (d) {
    case 1:
      lane_depthwise<A, 1>(s);
      break;
    case 3:
      lane_depthwise<A, 3>(s);
      break;
    case 5:
      lane_depthwise<A, 5>(s);
      break;
    case 7:
      lane_depthwise<A, 7>(s);
      break;
  }
  if (s.act.act != Act::kNone && s.act.act != Act::kReLU)
    for (int64_t r = s.row0; r < s.row1; ++r)
      activate_pixels(s.act, s.row(r) + s.z, s.ld, s.width, s.channels);
}

}  // namespace GHOST_ISA
}  // namespace ghost
