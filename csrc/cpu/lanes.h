// Products with channels along the lanes: NHWC.
//
//   Y[p][c] = act(shift[c] + sum_k X[p][k] W[k][c])
//
// Tile map: a block keeps kPixels x kVecs accumulators in registers. Weights are loaded as vectors
// of channels from the panels, values of x are broadcast. K goes in slices: a slice of the block's
// weights stays in L1 while all pixels pass. Maps of 49 or 196 pixels leave no lane idle; lanes
// past the last channel are never stored. Binding resource: FMA ports.
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
// Vectors of channels in a block. Blocks start at the first vector of a panel.
template <class A>
inline constexpr int kMostBlockVecs = kPanelVecs<A> == 1 ? 4 : 2;
constexpr int most_pixels(int vecs) {
#if defined(__AVX512F__) || defined(__aarch64__)
  return vecs <= 2 ? 12 : vecs == 3 ? 8 : 6;
#else
  return vecs == 1 ? 12 : vecs == 2 ? 6 : 4;
#endif
}

// Stores the first n lanes, n > 0, without a mask: masked stores are slow on some AVX2 processors.
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

// If the last channels of a product fill half a vector, a vector sums two values of a pixel at
// once: lane 2 * c + j sums the products of channel c with values 2 * i + j of x, i = 0, 1, ...
// The two lanes of a channel are added at the end.
#if defined(__AVX512F__) || defined(__AVX2__)
template <class A>
inline constexpr bool kHasHalves = sizeof(A) == 4;
#else
template <class A>
inline constexpr bool kHasHalves = false;
#endif

// The last channels of a product, from `from` on, with their weights in the order of these lanes.
//   panels: [ceil(channels / 8)][K / 2][kPanel]
//   shift: [ceil(channels / 8)][kPanel], in even lanes
template <class A>
struct HalfVectors {
  int64_t from, channels;
  A *panels, *shift;

  // The first of these channels if the product has m: all channels if they fill half a vector or
  // one and a half; else the last half vector if the number of half vectors is odd; else m (none).
  static int64_t first(int64_t m) {
    constexpr int kHalf = kLanes<A> / 2;
    const int64_t halves = (m + kHalf - 1) / kHalf;
    return !kHasHalves<A> || halves % 2 == 0 ? m : halves <= 3 ? 0 : (halves - 1) * kHalf;
  }
  int64_t panel_count() const { return (channels + kPanel / 2 - 1) / (kPanel / 2); }
  // From panels [ceil((from + channels) / kPanel)][K][kPanel] and their shift; K is even.
  void pack(const A* packed, const A* packed_shift, int64_t K) {
    std::fill_n(panels, panel_count() * K / 2 * kPanel, A(0));
    std::fill_n(shift, panel_count() * kPanel, A(0));
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = from + c;
      const A* const w = packed + at / kPanel * kPanel * K + at % kPanel;
      A* const to = panels + c / (kPanel / 2) * (K / 2) * kPanel + c % (kPanel / 2) * 2;
      for (int64_t k = 0; k < K; ++k) to[k / 2 * kPanel + k % 2] = w[k * kPanel];
      shift[c / (kPanel / 2) * kPanel + c % (kPanel / 2) * 2] = packed_shift[at];
    }
  }
};

// All lanes p[0]; or p[0] in even and p[1] in odd lanes.
template <int kValues, class A>
GHOST_INLINE Vec<A> broadcast(const A* p) {
  if constexpr (kValues == 1) {
    return set1(*p);
  } else {
    double pair;
    std::memcpy(&pair, p, sizeof pair);
    return (Vec<A>)set1(pair);
  }
}

// Stores the low or the high half of v, at most n elements.
#if defined(__AVX512F__) || defined(__AVX2__)
GHOST_INLINE void store_half(float* p, VecF v, bool high, int64_t n) {
  constexpr int kHalf = kLanes<float> / 2;
#if defined(__AVX512F__)
  const __m256 half =
      high ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v);
#else
  const __m128 half =
      high ? _mm256_extractf128_ps((__m256)v, 1) : _mm256_castps256_ps128((__m256)v);
#endif
  if (n >= kHalf)
    std::memcpy(p, &half, sizeof half);
  else
    for (int l = 0; l < n; ++l) p[l] = half[l];
}
#endif

// Memory that a product prefetches evenly: later input, and the place of later results.
struct Ahead {
  const char *read, *write;
  int64_t read_bytes = 0, write_bytes = 0;
};
inline constexpr int64_t kDistance = 4096;        // bytes ahead
inline constexpr int64_t kFewResults = 64 << 10;  // bytes: they stay in L1 or near it

// The x of a product, pixels and channels in any order. K is `taps` rows of values: one, or one
// under each row of taps of a k x k convolution.
template <class A>
struct LaneSource {
  const A* x;                   // image 0, pixel 0, channel 0
  int64_t image, pixel, depth;  // elements to the next image, pixel and channel
  int64_t images, pixels;       // pixels of a row
  int64_t rows = 1, row = 0;    // of an image; elements from row to row
  int64_t taps = 1, tap = 0;    // rows of taps; elements from one to the next
};

// The destination of the sums of a product.
template <class A>
struct LaneOut {
  A* y;  // [pixels][ld], from channel 0 of the product
  int64_t ld;
  Activation act;
  bool fetch = false;       // prefetch x from beyond L2; x is contiguous
  bool fetch_y = false;     // prefetch the place after y too
  bool accumulate = false;  // add to y instead of to the shift: slices of K after the first
};

// y [pixels][ld] = act(y), `channels` of each pixel.
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

// `tiles` register blocks of kPixels pixels each, one after the other. weights: the first vector of
// the block in its panel [K][kPanel]; the next panel is ldpanel elements further. K: values of one
// row of taps, divided by kValues, the values of a pixel that a vector sums at once.
template <class A, int kValues, int kVecs, int kPixels>
__attribute__((noinline)) void lane_block(const A* x, const LaneSource<A>& in, const A* weights,
                                          int64_t ldpanel, int64_t K, const A* shift,
                                          const LaneOut<A>& out, A* y, int64_t channels,
                                          Ahead& ahead, int64_t tiles) {
  constexpr int L = kLanes<A>, kChannels = L / kValues, kGroups = (kPixels + 2) / 3;
  using V = Vec<A>;
  const int64_t last = channels - (kVecs - 1) * kChannels;  // channels of the last vector
  // Locals: for the compiler, a store may change the structures.
  const int64_t next = in.pixel * int64_t(sizeof(A)),
                deeper = in.depth * kValues * int64_t(sizeof(A)), pixel = in.pixel, taps = in.taps,
                tap = in.tap, ld = out.ld;
  const Activation act = out.act;
  const bool accumulate = out.accumulate, with_relu = act.act == Act::kReLU;
  Ahead to_fetch = ahead;
  for (int64_t t = 0; t < tiles; ++t, x += kPixels * pixel, y += kPixels * ld) {
    V acc[kPixels][kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const V s = accumulate ? V{} : load(shift + v * L);
#pragma GCC unroll 12
      for (int q = 0; q < kPixels; ++q) acc[q][v] = s;
    }
    const A* w = weights;
    for (int64_t i = 0; i < taps; ++i) {
      // One pointer for three pixels: base, base + next and base + 2 * next are addressing modes.
      const char* p[kGroups];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
        p[g] = reinterpret_cast<const char*>(x + i * tap + 3 * g * pixel);
      for (int64_t k = 0; k < K; ++k) {
        __builtin_prefetch(to_fetch.read, 0, 3);
        __builtin_prefetch(to_fetch.write, 1, 3);
        to_fetch.read += to_fetch.read_bytes;
        to_fetch.write += to_fetch.write_bytes;
        V wv[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
          wv[v] = load(w + v / kPanelVecs<A> * ldpanel + v % kPanelVecs<A> * L);
#pragma GCC unroll 12
        for (int q = 0; q < kPixels; ++q) {
          const V xv = broadcast<kValues>(reinterpret_cast<const A*>(p[q / 3] + q % 3 * next));
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) acc[q][v] += xv * wv[v];
        }
        w += kPanel;
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) p[g] += deeper;
      }
    }
#pragma GCC unroll 12
    for (int q = 0; q < kPixels; q += kValues)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        A* const to = y + q * ld + v * kChannels;
        if constexpr (kValues == 2) {
          V even = acc[q][v], odd = acc[q + 1 < kPixels ? q + 1 : q][v];
          unzip<A>(even, odd);
          V r = even + odd;
          if (with_relu) r = relu(r);
          const int64_t n = v == kVecs - 1 ? last : kChannels;
          store_half(to, r, false, n);
          if (q + 1 < kPixels) store_half(to + ld, r, true, n);
          continue;
        }
        const bool partial = v == kVecs - 1 && last < L;
        V r = acc[q][v];
        if (accumulate) r += partial ? load_n(to, last) : load(to);
        if (with_relu) r = relu(r);
        if (partial)
          store_first(to, r, last);
        else
          store(to, r);
      }
    if (!with_relu && act.act != Act::kNone) activate_pixels(act, y, ld, kPixels, channels);
  }
  ahead = to_fetch;
}

template <class A>
using LaneBlock = void (*)(const A*, const LaneSource<A>&, const A*, int64_t, int64_t, const A*,
                           const LaneOut<A>&, A*, int64_t, Ahead&, int64_t);

template <class A, int kValues, int kVecs, size_t... kIndex>
constexpr std::array<LaneBlock<A>, sizeof...(kIndex)> lane_blocks(std::index_sequence<kIndex...>) {
  return {lane_block<A, kValues, kVecs, int(kIndex) + 1>...};
}

// All pixels of one block of channels, in tiles of kMost pixels or fewer, of nearly equal size.
template <class A, int kValues, int kVecs>
void lane_pixels(const LaneSource<A>& in, const A* w, int64_t ldpanel, int64_t K, const A* shift,
                 const LaneOut<A>& out, A* y, int64_t channels, Ahead ahead) {
  constexpr int kMost = most_pixels(kVecs);
  static constexpr auto kBlocks = lane_blocks<A, kValues, kVecs>(std::make_index_sequence<kMost>{});
  const int64_t tiles = (in.pixels + kMost - 1) / kMost, small = in.pixels / tiles,
                large = in.pixels % tiles;  // tiles of one pixel more
  const int64_t rounds = in.images * in.rows * tiles * in.taps * K;
  ahead.read_bytes = (ahead.read_bytes + rounds - 1) / rounds;
  ahead.write_bytes /= rounds;
  for (int64_t r = 0; r < in.images * in.rows; ++r) {
    const A* x = in.x + r / in.rows * in.image + r % in.rows * in.row;
    const auto run = [&](int64_t count, int64_t some) {
      if (some == 0) return;
      kBlocks[size_t(count - 1)](x, in, w, ldpanel, K, shift, out, y, channels, ahead, some);
      x += some * count * in.pixel;
      y += some * count * out.ld;
    };
    run(small + 1, large);
    run(small, tiles - large);
  }
}

// The last channels of a product: a vector sums two values of a pixel at once.
template <class A>
void lane_halves(const LaneSource<A>& source, int64_t K, const LaneOut<A>& out,
                 const HalfVectors<A>& halves, const Ahead& ahead) {
  if constexpr (kHasHalves<A>) {
    const int64_t halves_of_vector = (halves.channels + kLanes<A> / 2 - 1) / (kLanes<A> / 2);
    with_constant<1, 2, 3>(halves_of_vector, [&](auto vecs) {
      lane_pixels<A, 2, decltype(vecs)::value>(source, halves.panels, K / 2 * kPanel,
                                               K / source.taps / 2, halves.shift, out,
                                               out.y + halves.from, halves.channels, ahead);
    });
  }
}

// Y [images * rows * pixels][M] from X of the same pixels and K values each.
//   panels: [ceil(M / kPanel)][K][kPanel], padded with zeros
//   shift: [M], padded to kPanel
//   depth: values of a slice of K
//   halves: the channels from M on
template <class A>
void lane_product(const LaneSource<A>& source, const A* panels, int64_t K, const A* shift,
                  int64_t M, int64_t depth, const LaneOut<A>& out, const HalfVectors<A>& halves) {
  constexpr int L = kLanes<A>, kMost = kMostBlockVecs<A>;
  const int64_t ldpanel = K * kPanel, total = (M + L - 1) / L, blocks = (total + kMost - 1) / kMost;
  // A slice is several rows of taps, or a part of one.
  const int64_t per_tap = K / source.taps,
                some = std::max<int64_t>(depth / std::max<int64_t>(per_tap, 1), 1),
                parts = std::max<int64_t>((per_tap + depth - 1) / depth, 1),
                slices = parts > 1 ? source.taps * parts : (source.taps + some - 1) / some;
  // All passes prefetch the results of a large product, the first pass those of a small one.
  const int64_t pixels = source.images * source.rows * source.pixels, e = sizeof(A),
                results = pixels * out.ld * e;
  const bool large = results > kFewResults;
  const int64_t passes = large ? slices * blocks + (halves.channels > 0 ? 1 : 0) : 1;
  // With nothing to prefetch the addresses stay at x and y, which are valid memory.
  const auto ahead = [&](int64_t pass) {
    Ahead a{reinterpret_cast<const char*>(source.x), reinterpret_cast<const char*>(out.y)};
    if (out.fetch && pass == 0) {
      a.read += kDistance;
      a.read_bytes = pixels * source.pixel * e;
    }
    if (out.fetch_y && pass < passes) {
      a.write += large ? results + results / passes * pass : kDistance;
      a.write_bytes = results / passes;
    }
    return a;
  };
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
      const A* const w = panels + c / kPanel * ldpanel + k0 * kPanel + c % kPanel;
      // The weights of the next block may come from beyond L2.
      Ahead fetch = ahead(s * blocks + b);
      const A* next = nullptr;
      if (b + 1 < blocks)
        next = panels + v1 * L / kPanel * ldpanel + k0 * kPanel;
      else if (s + 1 < slices)
        next = panels + (k0 + deep) * kPanel;
      if (next && fetch.read_bytes == 0) {
        fetch.read = reinterpret_cast<const char*>(next);
        fetch.read_bytes = deep * kPanel * int64_t(sizeof(A));
      }
      with_constant<1, 2, 3, 4>(v1 - v0, [&](auto vecs) {
        constexpr int kVecs = decltype(vecs)::value;
        if constexpr (kVecs <= kMost)
          lane_pixels<A, 1, kVecs>(in, w, ldpanel, len, shift + c, o, out.y + c, channels, fetch);
      });
    }
  }
  if (halves.channels > 0) lane_halves<A>(source, K, out, halves, ahead(slices * blocks));
}

}  // namespace GHOST_ISA
}  // namespace ghost
