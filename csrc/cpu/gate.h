// The gate of ghost_apply's epilogue: a small map, resized by nearest neighbours, multiplies out
// while it is stored.
//
//   out[n][c][h][w] = v[n][c][h][w] * gate[n][c][source(h, Hg, H)][source(w, Wg, W)]
//   source(i, in, out) = min(floor(i * (float(in) / out)), in - 1)   in float32, as F.interpolate
//
// Tile map: the caller's thread takes a line at a time, pixels along the lanes. A line is a row of
// out, or its whole plane if the caller has whole planes and short rows would leave lanes idle. The
// values of the gate for a vector of pixels are close together: one load and one permutation.
// Values that are further apart (a gate wider than out) are loaded one by one.
// Binding resource: that of the store of out.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// An array of vectors or numbers. std::vector would be one symbol for all instruction sets.
template <class T>
class Table {
  T* data_ = nullptr;
  int64_t size_ = 0;

 public:
  Table() = default;
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;
  ~Table() { std::free(data_); }

  void allocate(int64_t size) {
    const int64_t bytes = round_up(size * int64_t(sizeof(T)), 64);
    data_ = static_cast<T*>(std::aligned_alloc(64, size_t(bytes > 0 ? bytes : 64)));
    if (data_ == nullptr) throw std::bad_alloc();
    size_ = size;
  }
  T& operator[](int64_t i) const { return data_[i]; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
};

template <class O>
class Gate {
  using A = ComputeOf<O>;
  static constexpr int L = kLanes<A>;
  // The places of the gate's values for L pixels of a line. count > 0: `count` values are loaded
  // from element `base` of the gate's line on, and pixel l takes lane lanes[l] of them. count = 0:
  // pixel l takes element lanes[l] of the gate's line.
  struct Block {
    typename Simd<A>::I lanes;
    int64_t base, count;
  };

  const O* gate_ = nullptr;
  int64_t image_ = 0, channel_ = 0, row_ = 0, rows_in_ = 0;
  float row_scale_ = 0;
  bool planes_ = false;
  Table<int64_t> at_;  // pixel of a line -> element of the gate's line
  Table<Block> blocks_;

  static int64_t source(int64_t i, int64_t in, float scale) {
    const int64_t at = int64_t(float(i) * scale);
    return at < in ? at : in - 1;
  }

  Block block(int64_t first, int64_t length) const {
    const int64_t pixels = at_.size() - first;
    auto place = [&](int l) { return at_[first + (l < pixels ? l : 0)]; };
    int64_t low = place(0), high = low;
    for (int l = 1; l < L; ++l) {
      low = place(l) < low ? place(l) : low;
      high = place(l) > high ? place(l) : high;
    }
    const bool near = high - low < L;
    Block b;
    b.base = near ? low : 0;
    b.count = !near ? 0 : length - low < L ? length - low : L;
    for (int l = 0; l < L; ++l) b.lanes[l] = typename Simd<A>::Int(place(l) - b.base);
    return b;
  }

  static Vec<A> values(const O* line, const Block& b) {
    if (b.count > 0) {
      const O* p = line + b.base;
      return permute<A>(b.count == L ? Storage<O>::load(p) : Storage<O>::load_n(p, b.count),
                        b.lanes);
    }
    Vec<A> v{};
    for (int l = 0; l < L; ++l) v[l] = Storage<O>::to_compute(line[b.lanes[l]]);
    return v;
  }

 public:
  // whole: the caller writes whole planes.
  Gate(const ApplyArgs& args, int64_t H, int64_t W, bool whole)
      : gate_(static_cast<const O*>(args.gate)) {
    if (!gate_) return;
    const bool nchw = args.out_layout == Layout::kNCHW;
    const int64_t width = args.problem.gate_width, plane = args.problem.gate_height * width;
    const int64_t out_channels = args.problem.out_channels, pixel = nchw ? 1 : out_channels;
    image_ = out_channels * plane;
    channel_ = nchw ? plane : 1;
    row_ = width * pixel;
    rows_in_ = args.problem.gate_height;
    row_scale_ = float(rows_in_) / float(H);
    planes_ = whole && (!nchw || W < 2 * L);
    const float scale = float(width) / float(W);
    at_.allocate(planes_ ? H * W : W);
    for (int64_t i = 0; i < at_.size(); ++i) {
      const int64_t above = planes_ ? source(i / W, rows_in_, row_scale_) : 0;
      at_[i] = above * width + source(i % W, width, scale);
    }
    if (nchw) {
      blocks_.allocate((at_.size() + L - 1) / L);
      for (int64_t b = 0; b < blocks_.size(); ++b)
        blocks_[b] = block(b * L, planes_ ? plane : width);
    }
    for (int64_t i = 0; i < at_.size(); ++i) at_[i] *= pixel;
  }

  explicit operator bool() const { return gate_ != nullptr; }
  int64_t line_pixels() const { return at_.size(); }

  // The gate's line for row h of image n, or for its whole plane if lines are planes, from
  // `channel` on.
  const O* line(int64_t n, int64_t channel, int64_t h) const {
    return gate_ + n * image_ + channel * channel_ +
           (planes_ ? 0 : source(h, rows_in_, row_scale_) * row_);
  }
  const int64_t* at() const { return at_.data(); }

  // NCHW: dst[i] = src[i] * gate (+ add[i]) for the pixels of one channel's line.
  void write_line(const A* src, const O* line, const O* add, O* dst, bool stream) const {
    const int64_t pixels = line_pixels();
    int64_t i = 0;
    for (int64_t b = 0; b < blocks_.size(); ++b) {
      const Vec<A> g = values(line, blocks_[b]);
      if (i + L <= pixels) {
        Vec<A> r = load(src + i) * g;
        if (add) r += Storage<O>::load(add + i);
        if constexpr (std::is_same_v<O, A>) {
          if (stream)
            store_stream(dst + i, r);
          else
            store(dst + i, r);
        } else {
          Storage<O>::store(dst + i, r);
        }
      } else {
        Vec<A> r = load_n(src + i, pixels - i) * g;
        if (add) r += Storage<O>::load_n(add + i, pixels - i);
        Storage<O>::store_n(dst + i, r, pixels - i);
      }
      i += L;
    }
  }
};

}  // namespace GHOST_ISA
}  // namespace ghost
