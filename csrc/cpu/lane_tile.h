// ghost_apply with channels along the lanes: NHWC, and small NCHW maps, where the product takes
// most of the time.
//
//   y = act1(shift1 + sum over taps and channels of x * w1)     k x k, any stride and padding
//   z = act2(shift2 + depthwise(y, w2))
//   out = concat(y', z)[:, :out_channels] (+ residual)
//
// y' is y, or act2(tail_scale * y + tail_shift).
//
// H x W, P pixels of out; m intrinsic channels; K values of x under the taps of a pixel; d the size
// of the depthwise kernel.
//
// Tile map: an item is a part of the channels of a run of whole images, or of a range of rows of
// one image, in bands. y and z of a pixel are adjacent, as in NHWC: in out itself, or in scratch,
// from which finished rows are converted, transposed or added to the residual. Scratch holds whole
// images or a ring of rows. Binding resource: FMA ports; the memory bus for large maps of few
// channels.
#pragma once

#include "core/plan.h"
#include "cpu/amx.h"
#include "cpu/kernels.h"
#include "cpu/lane_depthwise.h"
#include "cpu/lanes.h"
#include "cpu/scratch.h"

namespace ghost {
namespace GHOST_ISA {

template <class T>
class LaneTile {
  using A = ComputeOf<T>;
  const ApplyArgs& args;
  const Problem& p;
  const ApplyPlan& plan;
  const PackedLayout at;
  const A* const packed;
  const int64_t H, W, P, m, K, d, pad;
  const bool nhwc, in_place;
  T* const out;
  const T* const residual;

  // The channels of an item, and the memory of their y and z.
  struct Part {
    int64_t c0, channels;  // first intrinsic channel, and their number
    int64_t g0, ghosts;    // first ghost, and their number, without those that the slice cuts off
    // ghosts_per_map > 1: offset in a pixel of the copies of y, one for each ghost; else 0.
    int64_t repeated;
    A* panel;               // packed rows of x
    A* pixels;              // [images][ring][W][ld] y and z; row r is at r % ring
    HalfVectors<A> halves;  // the last channels of the product
    int64_t ring, ld;
  };

 public:
  explicit LaneTile(const ApplyArgs& a)
      : args(a),
        p(a.problem),
        plan(a.plan),
        at(p),
        packed(static_cast<const A*>(a.packed)),
        H(p.out_height()),
        W(p.out_width()),
        P(H * W),
        m(p.intrinsic),
        K(p.depth()),
        d(p.dw_size),
        pad(p.pad()),
        nhwc(p.layout == Layout::kNHWC),
        in_place(plan.in_place),
        out(static_cast<T*>(a.out)),
        residual(static_cast<const T*>(a.residual)) {}

  void run(int64_t item) const {
    const Share s = share_of(p, plan, item);
    const Part part = make_part(s.image0, s.channel0, s.channel1);
    if (plan.band_rows >= H)
      whole_images(s.image0, s.image1 - s.image0, part);
    else
      bands(s.image0, s.row0, s.row1, part);
    if (plan.stream) stream_fence();
  }

 private:
  Part make_part(int64_t n, int64_t c0, int64_t c1) const {
    Part part;
    part.c0 = c0;
    part.channels = c1 - c0;
    const int64_t ghosts_per_map = p.ghosts_per_map();
    part.g0 = c0 * ghosts_per_map;
    part.ghosts =
        std::clamp<int64_t>(p.out_channels - m - part.g0, 0, part.channels * ghosts_per_map);
    part.repeated = ghosts_per_map > 1 ? part.channels + part.ghosts : 0;
    const bool whole = plan.band_rows >= H;
    part.ring = whole || in_place ? H : std::min(H, plan.band_rows + 2 * pad);
    part.ld = in_place ? p.out_channels
                       : part.channels + part.ghosts + (ghosts_per_map > 1 ? part.ghosts : 0);
    part.panel = static_cast<A*>(thread_scratch(size_t(plan.scratch_bytes)));
    pack_halves(part);
    if (in_place) {
      part.pixels = reinterpret_cast<A*>(out) + n * args.out_image + c0;
    } else {
      part.pixels = part.panel;
      part.panel += round_up((whole ? plan.images : 1) * part.ring * W * part.ld, 16);
    }
    return part;
  }

  // Packs the weights of the part's last channels if they fill half a vector at most. The choice
  // depends on all m channels, so that the order of a sum is the same for any number of threads.
  void pack_halves(Part& part) const {
    const bool in_lanes = p.has_primary && !plan.amx && (plan.pack || nhwc) && p.channels % 2 == 0;
    HalfVectors<A>& h = part.halves;
    h.from =
        std::clamp<int64_t>((in_lanes ? HalfVectors<A>::first(m) : m) - part.c0, 0, part.channels);
    h.channels = part.channels - h.from;
    h.shift = part.panel;
    h.panels = h.shift + h.panel_count() * kPanel;
    part.panel = h.panels + h.panel_count() * K / 2 * kPanel;
    h.pack(packed + at.w1 + part.c0 * K, packed + at.shift1 + part.c0, K);
  }

  // y of rows [row, row + rows) of `images` images, to `to` [images * rows * W][ld].
  void primary(int64_t n, int64_t images, int64_t row, int64_t rows, const Part& part,
               A* to) const {
    const int64_t c0 = part.c0;
    if (!p.has_primary) return given(n, images, row, rows, part, to);
    if constexpr (kHasTiles && std::is_same_v<T, BFloat16>) {
      if (plan.amx) {
        const auto pairs = reinterpret_cast<const T*>(packed + at.pairs) + c0 * K;
        tile_product(source<T>(n, images, row, rows, part), pairs, K, packed + at.pair_scale + c0,
                     packed + at.shift1 + c0, part.channels, to, part.ld, p.act1,
                     !plan.pack && p.stride == 1);
        return;
      }
    }
    const LaneOut<A> o{to,   part.ld, p.act1, plan.fetch_results, plan.fetch_results && in_place,
                       false};
    lane_product<A>(source<A>(n, images, row, rows, part), packed + at.w1 + c0 * K, K,
                    packed + at.shift1 + c0, part.halves.from, plan.depth, o, part.halves);
  }

  // The x of the product: E is the compute type, or T for products on tiles.
  template <class E>
  LaneSource<E> source(int64_t n, int64_t images, int64_t row, int64_t rows,
                       const Part& part) const {
    const int64_t C = p.channels, k = p.kernel, s = p.stride;
    const E* const x = static_cast<const E*>(args.x) + n * args.x_image;
    if (plan.pack) {
      E* const panel = reinterpret_cast<E*>(part.panel);
      const int64_t line = (p.width + 2 * p.padding) * C, lines = line * ((rows - 1) * s + k);
      for (int64_t j = 0; j < images; ++j) pad_rows(n + j, row, rows, panel + j * lines);
      if (k == 1 && s == 1 && p.padding == 0) return {panel, 0, C, 1, 1, images * rows * W};
      return {panel, lines, s * C, 1, images, W, rows, s * line, k, line};
    }
    if (!nhwc) return {x + row * W, args.x_image, 1, args.x_channel, images, rows * W};
    if (s == 1) return {x + row * W * C, 0, C, 1, 1, images * rows * W};
    return {x + row * s * p.width * C, args.x_image, s * C, 1, images, W, rows, s * p.width * C};
  }

  // Without a primary convolution x is u: y = act1(scale1 * u + shift1).
  void given(int64_t n, int64_t images, int64_t row, int64_t rows, const Part& part, A* to) const {
    constexpr int L = kLanes<A>;
    for (int64_t j = 0; j < images; ++j) {
      pad_rows(n + j, row, rows, part.panel);
      for (int64_t q = 0; q < rows * W; ++q)
        for (int64_t c = 0; c < part.channels; c += L) {
          const int64_t left = part.channels - c, at_c = part.c0 + c;
          store_first(to + q * part.ld + c,
                      load_n(part.panel + q * p.channels + at_c, left) *
                              load_n(packed + at.scale1 + at_c, left) +
                          load_n(packed + at.shift1 + at_c, left),
                      left);
        }
      activate_pixels(p.act1, to, part.ld, rows * W, part.channels);
      to += rows * W * part.ld;
    }
  }

  // x [C][x_channel] to dst [pixels][C]: write_transposed, but from T.
  void transpose_planes(const T* x, int64_t pixels, T* dst) const {
    constexpr int L = kLanes<A>;
    const int64_t C = p.channels;
    if (C < L || pixels < L) {
      for (int64_t q = 0; q < pixels; ++q)
        for (int64_t c = 0; c < C; ++c) dst[q * C + c] = x[c * args.x_channel + q];
      return;
    }
    for_blocks<L>(C, pixels, [&](int64_t c, int64_t q) {
      Vec<A> r[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) r[i] = Storage<T>::load(x + (c + i) * args.x_channel + q);
      transpose_registers<A>(r);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) Storage<T>::store(dst + (q + i) * C + c, r[i]);
    });
  }

  // The rows of x that rows [row, row + rows) of the output read, as NHWC of the compute type or of
  // T, padding included: dst [(rows - 1) * stride + kernel][width + 2 * padding][C].
  template <class E>
  void pad_rows(int64_t n, int64_t row, int64_t rows, E* dst) const {
    const int64_t C = p.channels, border = p.padding * C, line = p.width * C;
    const T* const x = static_cast<const T*>(args.x) + n * args.x_image;
    if constexpr (!std::is_same_v<E, A>)
      if (!nhwc && p.kernel == 1 && p.stride == 1 && p.padding == 0)
        return transpose_planes(x + row * p.width, rows * p.width, dst);
    for (int64_t r = 0; r < (rows - 1) * p.stride + p.kernel; ++r, dst += line + 2 * border) {
      const int64_t h = row * p.stride + r - p.padding;
      if (h < 0 || h >= p.height) {
        std::fill_n(dst, line + 2 * border, E{});
        continue;
      }
      std::fill_n(dst, border, E{});
      std::fill_n(dst + border + line, border, E{});
      if constexpr (!std::is_same_v<E, A>) {
        if (nhwc)
          std::copy_n(x + h * line, line, dst + border);
        else
          transpose_planes(x + h * p.width, p.width, dst + border);
      } else if (nhwc)
        read_row(x + h * line, dst + border, line);
      else
        planes_to_pixels(x + h * p.width, dst + border);
    }
  }
  // x [C][x_channel] to dst [width][C].
  void planes_to_pixels(const T* x, A* dst) const {
    const int64_t C = p.channels;
    if (C >= kLanes<A>) {
      // The function reads NHWC: pixels and channels are exchanged here.
      read_transposed(x, args.x_channel, dst, C, C, p.width);
      return;
    }
    for (int64_t c = 0; c < C; ++c)
      for (int64_t w = 0; w < p.width; ++w)
        dst[w * C + c] = Storage<T>::to_compute(x[c * args.x_channel + w]);
  }

  // z of rows [r0, r1) of the image [ring][W][ld].
  void cheap(const Part& part, A* image, int64_t r0, int64_t r1) const {
    if (part.ghosts == 0) return;
    lane_depthwise<A>(
        d, {image + part.repeated, image + (in_place ? m : part.channels), part.ld, part.ld,
            part.ring, r0, r1, H, W, part.ghosts, packed + at.lane_taps + part.g0, p.ghosts(),
            packed + at.shift2 + part.g0, p.act2});
  }

  // Copies y [pixels][ld], one copy for each ghost of a channel: the inputs of the depthwise rows.
  void repeat(const Part& part, A* y, int64_t pixels) const {
    if (part.repeated == 0) return;
    const int64_t ghosts_per_map = p.ghosts_per_map();
    for (int64_t q = 0; q < pixels; ++q, y += part.ld)
      for (int64_t g = 0; g < part.ghosts; ++g) y[part.repeated + g] = y[g / ghosts_per_map];
  }

  // Finished rows [r0, r1) of image n from scratch to out.
  void write(const Part& part, const A* image, int64_t n, int64_t r0, int64_t r1) const {
    for (int64_t r = r0; r < r1;) {
      const int64_t stop = std::min(r1, (r / part.ring + 1) * part.ring);  // the end of the ring
      write_run(part, image + r % part.ring * W * part.ld, n, r, (stop - r) * W);
      r = stop;
    }
  }
  void write_run(const Part& part, const A* src, int64_t n, int64_t row, int64_t pixels) const {
    const int64_t first = n * args.out_image;
    if (p.has_tail) src = with_tail(part, src, pixels);
    if (!nhwc) {
      const int64_t y = first + part.c0 * P + row * W, z = first + (m + part.g0) * P + row * W;
      write_transposed(src, part.ld, out + y, P, part.channels, pixels,
                       residual ? residual + y : nullptr);
      if (part.ghosts > 0)
        write_transposed(src + part.channels, part.ld, out + z, P, part.ghosts, pixels,
                         residual ? residual + z : nullptr);
      return;
    }
    int64_t o = first + row * W * p.out_channels;
    if (part.ld == p.out_channels) return write_line(src, o, pixels * part.ld);
    for (int64_t q = 0; q < pixels; ++q, src += part.ld, o += p.out_channels) {
      write_line(src, o + part.c0, part.channels);
      write_line(src + part.channels, o + m + part.g0, part.ghosts);
    }
  }
  void write_line(const A* src, int64_t o, int64_t count) const {
    if constexpr (kHasTiles && std::is_same_v<T, BFloat16>)
      if (plan.amx) return write_line<TileStorage>(src, o, count);
    write_line<Storage<T>>(src, o, count);
  }
  template <class S>
  void write_line(const A* src, int64_t o, int64_t count) const {
    constexpr int L = kLanes<A>;
    if constexpr (std::is_same_v<A, T>) {
      if (plan.stream) return stream_row(src, out + o, count);
    }
    T* const to = out + o;
    int64_t i = 0;
    if (!residual) {
      for (; i + L <= count; i += L) S::store(to + i, load(src + i));
      if (i < count) S::store_n(to + i, load_n(src + i, count - i), count - i);
      return;
    }
    const T* const add = residual + o;
    for (; i + L <= count; i += L) S::store(to + i, load(src + i) + S::load(add + i));
    if (i < count)
      S::store_n(to + i, load_n(src + i, count - i) + S::load_n(add + i, count - i), count - i);
  }

  // A copy of src [pixels][ld] whose first half is act2(tail_scale * y + tail_shift).
  const A* with_tail(const Part& part, const A* src, int64_t pixels) const {
    constexpr int L = kLanes<A>;
    const A* const scale = packed + at.tail + part.c0;
    const A* const shift = scale + m;
    std::memcpy(part.panel, src, size_t(pixels * part.ld) * sizeof(A));
    for (int64_t q = 0; q < pixels; ++q)
      for (int64_t c = 0; c < part.channels; c += L) {
        const int64_t left = part.channels - c;
        A* const y = part.panel + q * part.ld + c;
        store_first(y, load_n(y, left) * load_n(scale + c, left) + load_n(shift + c, left), left);
      }
    activate_pixels(p.act2, part.panel, part.ld, pixels, part.channels);
    return part.panel;
  }

  void whole_images(int64_t n0, int64_t images, const Part& part) const {
    primary(n0, images, 0, H, part, part.pixels);
    repeat(part, part.pixels, images * P);
    for (int64_t j = 0; j < images; ++j) {
      A* const image = part.pixels + j * P * part.ld;
      cheap(part, image, 0, H);
      if (!in_place) write(part, image, n0 + j, 0, H);
    }
  }

  void bands(int64_t n, int64_t row0, int64_t row1, const Part& part) const {
    const int64_t last = std::min(row1 + pad, H);
    int64_t have = std::max<int64_t>(row0 - pad, 0), done = row0;
    while (done < row1) {
      // Rows from done - pad on stay in the ring.
      const int64_t until = std::min(last, done + plan.band_rows + pad);
      while (have < until) {
        const int64_t stop = std::min(until, (have / part.ring + 1) * part.ring);
        A* const y = part.pixels + have % part.ring * W * part.ld;
        primary(n, 1, have, stop - have, part, y);
        repeat(part, y, (stop - have) * W);
        have = stop;
      }
      const int64_t ready = std::min({have == H ? H : have - pad, done + plan.band_rows, row1});
      cheap(part, part.pixels, done, ready);
      if (!in_place) write(part, part.pixels, n, done, ready);
      done = ready;
    }
  }
};

}  // namespace GHOST_ISA
}  // namespace ghost
