// ghost_apply with channels along the lanes: NHWC, and small NCHW maps that are bound by the
// product.
//
//   y = act1(shift1 + sum over taps and channels of x * w1)     k x k, any stride and padding
//   z = act2(shift2 + depthwise(y, w2))
//   out = concat(y', z)[:, :oup] (+ residual)       y' = y, or act2(tail_scale * y + tail_shift)
//
// Tile map: an item is a run of whole images, or a range of rows of one image, walked in bands, of
// a part of the channels. Where out is NHWC of the compute type, y is made in its place in out and
// read back from there by the depthwise rows; else it lies in scratch, whole images or a ring of
// rows, pixel by pixel. Binding resource: FMA ports, the memory bus for large maps of few channels.
#pragma once

#include "core/plan.h"
#include "cpu/kernels.h"
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
  const bool nhwc, in_place;  // y in place
  const bool z_direct;        // the depthwise rows write to out
  T* const out;
  const T* const residual;

  struct Scratch {
    A *y, *z, *panel, *zeros;
    int64_t ldy, ldz;
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
        in_place(nhwc && std::is_same_v<T, A> && !p.has_residual && !p.has_tail &&
                 plan.row_splits == 1),
        z_direct(nhwc && std::is_same_v<T, A> &&
                 (!p.has_residual || p.act2.act == Act::kNone || p.act2.act == Act::kReLU)),
        out(static_cast<T*>(a.out)),
        residual(static_cast<const T*>(a.residual)) {}

  void run(int64_t item) const {
    const int64_t channel_part = item % plan.channel_splits,
                  row_part = item / plan.channel_splits % plan.row_splits,
                  tile = item / plan.channel_splits / plan.row_splits;
    const int64_t panels = (m + kPanel - 1) / kPanel;
    const int64_t c0 = panels * channel_part / plan.channel_splits * kPanel,
                  c1 = std::min(panels * (channel_part + 1) / plan.channel_splits * kPanel, m);
    const int64_t n0 = tile * plan.images, n1 = std::min(n0 + plan.images, p.batch);
    const Scratch s = scratch(c1 - c0);
    if (plan.band_rows >= H)
      whole_images(n0, n1 - n0, c0, c1, s);
    else
      bands(n0, H * row_part / plan.row_splits, H * (row_part + 1) / plan.row_splits, c0, c1, s);
  }

 private:
  bool is_whole() const { return plan.band_rows >= H; }
  int64_t ring_rows() const { return std::min(H, plan.band_rows + 2 * pad); }

  Scratch scratch(int64_t count) const {
    Scratch s;
    s.ldy = round_up(count, 16);
    s.ldz = round_up(count * (p.ratio - 1), 16);
    s.zeros = static_cast<A*>(thread_scratch(size_t(plan.scratch_bytes)));
    std::fill(s.zeros, s.zeros + s.ldy, A(0));
    s.y = s.zeros + s.ldy;
    const int64_t y_pixels = is_whole() ? plan.images * P : ring_rows() * W;
    s.z = s.y + (in_place ? 0 : y_pixels * s.ldy);
    s.panel = s.z + (z_direct ? 0 : std::min(H, plan.band_rows) * W * std::max(s.ldz, s.ldy));
    return s;
  }

  // y of image n, its row 0, channel c0; and its pixels' distance.
  A* out_y(int64_t n, int64_t c0) const {
    return reinterpret_cast<A*>(out) + n * args.out_image + c0;
  }

  // y of rows [row, row + rows) of `images` images, `to` [pixels][ld].
  void primary(int64_t n, int64_t images, int64_t row, int64_t rows, int64_t c0, int64_t c1,
               A* panel, A* to, int64_t ld) const {
    const int64_t pixels = rows * W;
    if (!p.has_primary) return given(n, images, row, rows, c0, c1, panel, to, ld);
    const A* x = static_cast<const A*>(args.x) + n * args.x_image;
    LaneSource<A> in{x, args.x_image, 1, args.x_channel, images, pixels};
    if (plan.pack) {
      for (int64_t j = 0; j < images; ++j) pack(n + j, row, rows, panel + j * pixels * K);
      in = {panel, 0, K, 1, 1, images * pixels};
    } else if (nhwc) {
      in = {x + row * W * p.channels, 0, p.channels, 1, 1, images * pixels};
    } else {
      in.x += row * W;
    }
    const LaneOut<A> o{to, ld, p.act1, plan.fetch_results && in_place, false};
    lane_product<A>(in, packed + at.w1 + c0 * K, K, packed + at.shift1 + c0, c1 - c0, plan.l1_bytes,
                    o);
  }

  // Without a primary convolution x is u: y = act1(scale1 * u + shift1).
  void given(int64_t n, int64_t images, int64_t row, int64_t rows, int64_t c0, int64_t c1, A* panel,
             A* to, int64_t ld) const {
    constexpr int L = kLanes<A>;
    for (int64_t j = 0; j < images; ++j) {
      pack(n + j, row, rows, panel);
      for (int64_t q = 0; q < rows * W; ++q, to += ld) {
        const A* u = panel + q * p.channels;
        for (int64_t c = c0; c < c1; c += L) {
          const int64_t left = c1 - c;
          store_first(to + c - c0,
                      load_n(u + c, left) * load_n(packed + at.scale1 + c, left) +
                          load_n(packed + at.shift1 + c, left),
                      left);
        }
      }
      activate_pixels(p.act1, to - rows * W * ld, ld, rows * W, c1 - c0);
    }
  }

  // The values of x under the taps of every pixel of some rows: dst [rows * W][K], K in the order
  // tap row, tap column, channel.
  void pack(int64_t n, int64_t row, int64_t rows, A* dst) const {
    const int64_t C = p.channels, k = p.kernel, s = p.stride;
    const T* const x = static_cast<const T*>(args.x) + n * args.x_image;
    if (!p.x_is_nhwc()) return pack_planes(x, row, rows, dst);
    if (k == 1 && s == 1 && p.padding == 0) return read_row(x + row * W * C, dst, rows * W * C);
    for (int64_t r = row; r < row + rows; ++r)
      for (int64_t w = 0; w < W; ++w)
        for (int64_t i = 0; i < k; ++i, dst += k * C) {
          const int64_t h = r * s + i - p.padding, from = w * s - p.padding,
                        first = std::max<int64_t>(-from, 0),
                        last = std::min(p.width - from, k);  // tap columns inside
          if (h < 0 || h >= p.height || first >= last) {
            std::fill(dst, dst + k * C, A(0));
            continue;
          }
          std::fill(dst, dst + first * C, A(0));
          read_row(x + (h * p.width + from + first) * C, dst + first * C, (last - first) * C);
          std::fill(dst + last * C, dst + k * C, A(0));
        }
  }
  // The same from NCHW: made for images of a few channels.
  void pack_planes(const T* x, int64_t row, int64_t rows, A* dst) const {
    const int64_t C = p.channels, k = p.kernel, s = p.stride;
    for (int64_t r = row; r < row + rows; ++r, dst += W * K)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
          for (int64_t c = 0; c < C; ++c) {
            const int64_t h = r * s + i - p.padding, from = j - p.padding;
            A* to = dst + (i * k + j) * C + c;
            const T* src = x + c * args.x_channel + h * p.width + from;
            for (int64_t w = 0; w < W; ++w) {
              const int64_t col = w * s + from;
              const bool inside = h >= 0 && h < p.height && col >= 0 && col < p.width;
              to[w * K] = inside ? Storage<T>::to_compute(src[w * s]) : A(0);
            }
          }
  }

  // Rows [row, row + rows) of y or z, pixel by pixel in scratch, to channels [ch, ch + count) of
  // the output.
  void write(const A* src, int64_t ld, int64_t n, int64_t row, int64_t rows, int64_t ch,
             int64_t count) const {
    count = std::min(count, p.out_channels - ch);
    if (count <= 0) return;
    if (!nhwc) {
      const int64_t o = n * args.out_image + ch * P + row * W;
      write_transposed(src, ld, out + o, P, count, rows * W, residual ? residual + o : nullptr);
      return;
    }
    constexpr int L = kLanes<A>;
    int64_t o = n * args.out_image + row * W * p.out_channels + ch;
    for (int64_t q = 0; q < rows * W; ++q, o += p.out_channels, src += ld)
      for (int64_t c = 0; c < count; c += L) {
        Vec<A> v = load_n(src + c, count - c);
        if (residual) v += Storage<T>::load_n(residual + o + c, count - c);
        Storage<T>::store_n(out + o + c, v, count - c);
      }
  }

  // y of some rows to the output.
  void write_y(const A* y, int64_t ld, int64_t n, int64_t row, int64_t rows, int64_t c0, int64_t c1,
               A* temporary) const {
    if (!p.has_tail) return write(y, ld, n, row, rows, c0, c1 - c0);
    constexpr int L = kLanes<A>;
    const A* const scale = packed + at.tail + c0;
    const A* const shift = scale + m;
    const int64_t count = c1 - c0;
    for (int64_t q = 0; q < rows * W; ++q)
      for (int64_t c = 0; c < count; c += L)
        store_first(temporary + q * ld + c,
                    load_n(y + q * ld + c, count - c) * load_n(scale + c, count - c) +
                        load_n(shift + c, count - c),
                    count - c);
    activate_pixels(p.act2, temporary, ld, rows * W, count);
    write(temporary, ld, n, row, rows, c0, count);
  }

  // Ghosts of channels [c0, c1), rows [r0, r1) of image n. y: row 0 of the image, or of the ring.
  void cheap(int64_t n, int64_t r0, int64_t r1, int64_t c0, int64_t c1, const A* y, int64_t ring,
             int64_t ldy, const Scratch& s) const {
    const int64_t count = std::min(c1, p.out_channels - m) - c0;
    if (p.ratio == 1 || count <= 0 || r1 <= r0) return;
    LaneDepthwise<A> rows{y,          ring,
                          ldy,        s.zeros,
                          r0,         r1,
                          H,          W,
                          count,      packed + at.lane_taps + c0,
                          p.ghosts(), packed + at.shift2 + c0,
                          p.act2,     s.z,
                          s.ldz,      nullptr};
    if (z_direct) {
      const int64_t o = n * args.out_image + r0 * W * p.out_channels + m + c0;
      rows.out = reinterpret_cast<A*>(out) + o;
      rows.ld_out = p.out_channels;
      if (residual) rows.residual = reinterpret_cast<const A*>(residual) + o;
    }
    lane_depthwise<A>(d, rows);
    if (!z_direct) write(s.z, s.ldz, n, r0, r1 - r0, m + c0, count);
  }

  void whole_images(int64_t n0, int64_t images, int64_t c0, int64_t c1, const Scratch& s) const {
    A* const y = in_place ? out_y(n0, c0) : s.y;
    const int64_t ldy = in_place ? p.out_channels : s.ldy;
    primary(n0, images, 0, H, c0, c1, s.panel, y, ldy);
    for (int64_t j = 0; j < images; ++j) {
      const A* const yj = y + j * P * ldy;
      if (!in_place) write_y(yj, ldy, n0 + j, 0, H, c0, c1, temporary(s));
      cheap(n0 + j, 0, H, c0, c1, yj, H, ldy, s);
    }
  }
  // Room for a changed copy of y.
  A* temporary(const Scratch& s) const { return z_direct ? s.panel : s.z; }

  void bands(int64_t n, int64_t row0, int64_t row1, int64_t c0, int64_t c1,
             const Scratch& s) const {
    const int64_t ring = in_place ? H : ring_rows(), ldy = in_place ? p.out_channels : s.ldy;
    A* const base = in_place ? out_y(n, c0) : s.y;
    const auto y = [&](int64_t r) { return base + r % ring * W * ldy; };
    const int64_t last = std::min(row1 + pad, H);
    int64_t have = std::max<int64_t>(row0 - pad, 0), done = row0;
    while (done < row1) {
      // Rows from done - pad on stay in the ring.
      const int64_t until = std::min(last, done + plan.band_rows + pad);
      while (have < until) {
        const int64_t stop = std::min(until, (have / ring + 1) * ring);  // the ring's end
        primary(n, 1, have, stop - have, c0, c1, s.panel, y(have), ldy);
        const int64_t o0 = std::max(have, row0), o1 = std::min(stop, row1);
        for (int64_t r = o0; !in_place && r < o1; r += plan.band_rows) {
          const int64_t count = std::min(plan.band_rows, o1 - r);
          write_y(y(r), ldy, n, r, count, c0, c1, temporary(s));
        }
        have = stop;
      }
      const int64_t ready = std::min({have == H ? H : have - pad, done + plan.band_rows, row1});
      cheap(n, done, ready, c0, c1, base, ring, ldy, s);
      done = ready;
    }
  }
};

}  // namespace GHOST_ISA
}  // namespace ghost
