// ghost_apply with pixels along the lanes, one pass from x and the packed parameters to out.
//
//   y = act1(W1' x + shift1)            W1' includes the scale of bn1
//   z = act2(w2' (*) y + shift2)        w2' includes the scale of bn2
//   out = concat(y, z)[:, :out_channels] (* gate) (+ residual)
//
// y is written to a tile of scratch, or to out itself. H x W, P pixels of out; m intrinsic
// channels; d the size of the depthwise kernel.
//
// Tile map: an item is a run of images (small maps, joined into one row of pixels) or a range of
// rows of one image (large maps, in bands; the last d - 1 rows of y are carried from band to band).
// Inside an item, channels go in groups whose y stays in L2. Binding resource: FMA ports if C is
// above about 16, else the memory bus.
#pragma once

#include "core/plan.h"
#include "cpu/activation.h"
#include "cpu/depthwise.h"
#include "cpu/gate.h"
#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/lane_tile.h"
#include "cpu/scratch.h"
#include "cpu/source.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

inline bool linear_or_relu(const Activation& a) {
  return a.act == Act::kNone || a.act == Act::kReLU;
}

// T: element type of x, O: of out. They differ in training only, where one of both is scratch of
// the compute type.
template <class T, class O>
class ApplyTile {
  using A = ComputeOf<T>;
  const ApplyArgs& args;
  const Problem& p;
  const ApplyPlan& plan;
  const PackedLayout at;
  const A* const packed;
  const int64_t H, W, P, m, ghosts_per_map, d, pad, out_channel;
  const bool nchw;
  // direct: out has planes of the compute type and no residual, gate or scatter; y and z may be
  // computed in place.
  const bool direct, y_direct, z_direct;
  Source<T> source;
  O* const out;
  const O* const residual;
  const Gate<O> gate;

 public:
  explicit ApplyTile(const ApplyArgs& args_)
      : args(args_),
        p(args.problem),
        plan(args.plan),
        at(p),
        packed(static_cast<const A*>(args.packed)),
        H(p.out_height()),
        W(p.out_width()),
        P(H * W),
        m(p.intrinsic),
        ghosts_per_map(p.ghosts_per_map()),
        d(p.dw_size),
        pad(p.pad()),
        out_channel(args.out_channel),
        nchw(args.out_layout == Layout::kNCHW),
        direct(nchw && sizeof(O) == sizeof(A) && !p.has_residual && !p.has_gate() &&
               args.scatter == 1),
        y_direct(direct && (linear_or_relu(p.act1) || !plan.stream)),
        z_direct(direct && (linear_or_relu(p.act2) || !plan.stream)),
        source{static_cast<const T*>(args.x),
               args.x_image,
               args.x_channel,
               p.channels,
               p.height,
               p.width,
               p.stride,
               p.layout,
               W},
        out(static_cast<O*>(args.out)),
        residual(static_cast<const O*>(args.residual)),
        gate(args, H, W, plan.band_rows >= H) {}

  void run(int64_t item) const {
    const Share s = share_of(p, plan, item);
    if (plan.band_rows >= H)
      whole_images(s.image0, s.image1 - s.image0, s.channel0, s.channel1);
    else
      bands(s.image0, s.row0, s.row1, s.channel0, s.channel1);
    if (plan.stream) stream_fence();
  }

 private:
  // Whether non-temporal stores are possible: rows that start at p, `step` elements apart, are
  // aligned to vectors.
  static bool streamable(const O* p, int64_t step) {
    return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0 &&
           step * sizeof(O) % kVectorBytes == 0;
  }

  // NHWC: whether y and z are written in one transposed pass. In scratch the rows of z then follow
  // the rows of y.
  bool writes_with_ghosts(int64_t c0, int64_t c1) const {
    return !nchw && args.scatter == 1 && ghosts_per_map > 0 && c0 == 0 && c1 == m;
  }

  // y [c1 - c0][ldy] of channels [c0, c1) from x [C][ldx], `pixels` pixels; copy: the place of
  // these channels in out, or null.
  void primary(const A* x, int64_t ldx, int64_t pixels, int64_t c0, int64_t c1, A* y, int64_t ldy,
               A* copy, const Meanwhile<A>& meanwhile) const {
    const GemmOut<A> o{y,
                       ldy,
                       copy,
                       out_channel,
                       p.act1.act == Act::kReLU,
                       plan.stream,
                       false,
                       plan.fetch_results};
    gemm_nn<A>(x, ldx, packed + at.w1 + c0 * p.channels, kPanel * p.channels, p.channels,
               packed + at.shift1 + c0, c1 - c0, pixels, plan.vecs, meanwhile, o);
    if (!linear_or_relu(p.act1)) activate_rows(first_act(c0), y, ldy, c1 - c0, pixels);
  }

  // The memory that the product of images [n, n + images) prefetches: the next images of x, and the
  // part of out that is written before their product ends. Columns of x if either is not
  // contiguous.
  Meanwhile<A> meanwhile(int64_t n, int64_t images) const {
    const int64_t left = p.batch - n - images, more = left < images ? left : images;
    if (plan.fetch != Fetch::kImages || more <= 0) return columns();
    if (p.joined) {  // x is du, in cache
      Meanwhile<A> next;
      next.write = {reinterpret_cast<const A*>(out) + (n + images) * args.out_image,
                    more * p.out_channels * P};
      return next;
    }
    if (args.x_channel != P) return columns();
    Meanwhile<A> next;
    next.read = {reinterpret_cast<const A*>(source.x) + (n + images) * args.x_image,
                 more * args.x_image};
    if (out_channel == P && !plan.stream) {
      // A y in place is written by the product, so only z is prefetched.
      const int64_t first = direct && images == 1 ? m : 0;
      next.write = {reinterpret_cast<const A*>(out) + n * args.out_image + first * P,
                    images * args.out_image};
    }
    return next;
  }
  Meanwhile<A> columns() const {
    Meanwhile<A> next;
    next.columns = plan.fetch != Fetch::kNothing && !plan.pack;
    return next;
  }

  // Without a primary convolution x is u [c1 - c0][ldu]: y = act1(scale1 * u + shift1).
  void given(const A* u, int64_t ldu, int64_t pixels, int64_t c0, int64_t c1, A* y,
             int64_t ldy) const {
    const A* scale = packed + at.scale1 + c0;
    const A* shift = packed + at.shift1 + c0;
    for (int64_t c = 0; c < c1 - c0; ++c) {
      const Vec<A> s = set1(scale[c]), b = set1(shift[c]);
      constexpr int L = kLanes<A>;
      for (int64_t i = 0; i < pixels; i += L)
        store_n(y + c * ldy + i, load_n(u + c * ldu + i, pixels - i) * s + b, pixels - i);
    }
    activate_rows(first_act(c0), y, ldy, c1 - c0, pixels);
  }

  // An activation for rows of channels; slopes of a PReLU, `step` elements from row to row.
  struct RowActivation {
    const Activation& act;
    const A* slopes;  // null: the slope of act
    int64_t step;
    A slope(int64_t row) const { return slopes ? slopes[row * step] : A(act.slope); }
  };
  RowActivation first_act(int64_t channel) const {
    const A* slopes = static_cast<const A*>(args.slopes1);
    return {p.act1, slopes ? slopes + channel : nullptr, 1};
  }
  RowActivation second_act(int64_t ghost, int64_t step) const {
    const A* slopes = static_cast<const A*>(args.slopes2);
    return {p.act2, slopes ? slopes + ghost : nullptr, step};
  }

  static void activate_rows(const RowActivation& a, A* y, int64_t ld, int64_t rows,
                            int64_t pixels) {
    constexpr int L = kLanes<A>;
    with_activation(a.act.act, [&](auto act) {
      constexpr Act kAct = decltype(act)::value;
      if constexpr (kAct == Act::kNone) return;
      for (int64_t c = 0; c < rows; ++c) {
        A* row = y + c * ld;
        const A slope = a.slope(c);
        int64_t i = 0;
        for (; i + L <= pixels; i += L) store(row + i, activate<kAct, A>(load(row + i), slope));
        if (i < pixels)
          store_n(row + i, activate<kAct, A>(load_n(row + i, pixels - i), slope), pixels - i);
      }
    });
  }

  // src [count][ld], rows [row, row + rows) of image n, into channels [ch, ch + count) of out.
  void write(const A* src, int64_t ld, int64_t n, int64_t row, int64_t rows, int64_t ch,
             int64_t count) const {
    if (ch + count > p.out_channels) count = p.out_channels - ch;
    if (count <= 0) return;
    const int64_t px = rows * W;
    if (args.scatter > 1) return scatter(src, ld, n, row, rows, ch, count);
    if (gate) return write_gated(src, ld, n, row, rows, ch, count);
    if (!nchw) {
      const int64_t o = n * args.out_image + row * W * p.out_channels + ch;
      write_transposed(src, ld, out + o, p.out_channels, px, count,
                       residual ? residual + o : nullptr);
      return;
    }
    for (int64_t c = 0; c < count; ++c) {
      const int64_t o = n * args.out_image + (ch + c) * out_channel + row * W;
      if (residual) {
        constexpr int L = kLanes<A>;
        for (int64_t i = 0; i < px; i += L)
          Storage<O>::store_n(
              out + o + i,
              load_n(src + c * ld + i, px - i) + Storage<O>::load_n(residual + o + i, px - i),
              px - i);
      } else if (plan.stream) {  // planned only if O is A
        stream_row(src + c * ld, reinterpret_cast<A*>(out) + o, px);
      } else {
        write_row(src + c * ld, out + o, px);
      }
    }
  }

  void write_gated(const A* src, int64_t ld, int64_t n, int64_t row, int64_t rows, int64_t ch,
                   int64_t count) const {
    const int64_t px = rows * W, line = gate.line_pixels();
    if (!nchw) {
      for (int64_t i = 0; i < px; i += line) {
        const int64_t o = n * args.out_image + (row * W + i) * p.out_channels + ch;
        write_transposed(src + i, ld, out + o, p.out_channels, line, count,
                         residual ? residual + o : nullptr,
                         GateAt<O>{gate.line(n, ch, row + i / W), gate.at()});
      }
      return;
    }
    for (int64_t c = 0; c < count; ++c) {
      const int64_t o = n * args.out_image + (ch + c) * out_channel + row * W;
      const bool stream = plan.stream && streamable(out + o, line);
      for (int64_t i = 0; i < px; i += line)
        gate.write_line(src + c * ld + i, gate.line(n, ch + c, row + i / W),
                        residual ? residual + o + i : nullptr, out + o + i, stream);
    }
  }

  // As write, but pixel (h, w) goes to (h * scatter, w * scatter).
  void scatter(const A* src, int64_t ld, int64_t n, int64_t row, int64_t rows, int64_t ch,
               int64_t count) const {
    const int64_t step = args.scatter, sw = args.scatter_width;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t line = (row + r) * step * sw;
      if (!nchw) {
        write_transposed(src + r * W, ld, out + n * args.out_image + line * p.out_channels + ch,
                         p.out_channels * step, W, count);
        continue;
      }
      for (int64_t c = 0; c < count; ++c)
        for (int64_t w = 0; w < W; ++w)
          out[n * args.out_image + (ch + c) * out_channel + line + w * step] =
              Storage<O>::from_compute(src[c * ld + r * W + w]);
    }
  }

  // Ghosts of channels [c0, c1), output rows [r0, r1) of image n. y [c1 - c0][ldy]: the rows of
  // these channels from image row y_row0 on. z: scratch.
  void cheap(const A* y, int64_t ldy, int64_t y_row0, int64_t n, int64_t r0, int64_t r1, int64_t c0,
             int64_t c1, A* z) const {
    if (ghosts_per_map == 0 || r1 <= r0) return;
    const bool with_y = writes_with_ghosts(c0, c1);
    const int64_t ldz = with_y ? ldy : (r1 - r0) * W + 16;
    if (with_y) z = const_cast<A*>(y) + (c1 - c0) * ldy + (r0 - y_row0) * W;
    const bool in_place = z_direct && (!plan.stream || streamable(out + r0 * W, W));
    for (int64_t j = 0; j < ghosts_per_map; ++j) {
      const int64_t g = c0 * ghosts_per_map + j,
                    kept = (p.out_channels - m - j + ghosts_per_map - 1) / ghosts_per_map;
      const int64_t last = c1 < kept ? c1 : kept;  // the slice cuts off ghosts of later channels
      Stencil<A> s{y,
                   y_row0,
                   H,
                   W,
                   r0,
                   r1,
                   packed + at.w2 + g * d * d,
                   packed + at.shift2 + g,
                   nullptr,
                   p.act2.act == Act::kReLU,
                   false,
                   in_place && plan.stream};
      s.v = in_place
                ? reinterpret_cast<A*>(out) + n * args.out_image + (m + g) * out_channel + r0 * W
                : z + j * ldz;
      s.channels = last - c0;
      s.y_step = ldy;
      s.taps_step = ghosts_per_map * d * d;
      s.shift_step = ghosts_per_map;
      s.v_step = ghosts_per_map * (in_place ? out_channel : ldz);
      stencil<A>(d, s);
      if (in_place && !linear_or_relu(p.act2))
        activate_rows(second_act(g, ghosts_per_map), s.v, s.v_step, s.channels, (r1 - r0) * W);
    }
    if (in_place) return;
    const int64_t count = (c1 - c0) * ghosts_per_map;
    if (!linear_or_relu(p.act2))
      activate_rows(second_act(c0 * ghosts_per_map, 1), z, ldz, count, (r1 - r0) * W);
    if (with_y)
      write(y + (r0 - y_row0) * W, ldy, n, r0, r1 - r0, 0, m + count);
    else
      write(z, ldz, n, r0, r1 - r0, m + c0 * ghosts_per_map, count);
  }

  void whole_images(int64_t n0, int64_t images, int64_t c0, int64_t c1) const {
    const int64_t pixels = images * P, ld = round_up(pixels, 16) + 16;
    A* scratch = static_cast<A*>(thread_scratch(size_t(plan.scratch_bytes)));
    A* y = scratch + 64;
    A* z = y + plan.group * ld + 64;
    A* panel = z + plan.group * ghosts_per_map * ld + 64;
    const A* x = reinterpret_cast<const A*>(source.x) + n0 * args.x_image;
    int64_t ldx = args.x_channel;
    if (plan.pack) {
      source.pack_images(n0, images, panel, ld);
      x = panel;
      ldx = ld;
    }
    const Meanwhile<A> fetch = meanwhile(n0, images);
    for (int64_t g0 = c0; g0 < c1; g0 += plan.group) {
      const int64_t g1 = g0 + plan.group < c1 ? g0 + plan.group : c1;
      A* planes =
          y_direct && (images == 1 || args.out_image == P) && (!plan.stream || streamable(out, P))
              ? reinterpret_cast<A*>(out) + n0 * args.out_image + g0 * out_channel
              : nullptr;
      if (p.has_primary && planes && !plan.stream) {
        // y in the planes of out is written once and read back from the cache.
        primary(x, ldx, pixels, g0, g1, planes, out_channel, nullptr, fetch);
        for (int64_t j = 0; j < images; ++j)
          cheap(planes + j * P, out_channel, 0, n0 + j, 0, H, g0, g1, z);
        continue;
      }
      if (p.has_primary) {
        primary(x, ldx, pixels, g0, g1, y, ld, planes, fetch);
      } else {
        read_given(n0, 0, H, g0, g1, y, ld);
        given(y, ld, pixels, g0, g1, y, ld);
        planes = nullptr;
      }
      for (int64_t j = 0; j < images; ++j) {
        if (!planes && !writes_with_ghosts(g0, g1)) write(y + j * P, ld, n0 + j, 0, H, g0, g1 - g0);
        cheap(y + j * P, ld, 0, n0 + j, 0, H, g0, g1, z);
      }
    }
  }

  // u of channels [c0, c1), rows [row, row + rows) of image n, into y [c1 - c0][ld].
  void read_given(int64_t n, int64_t row, int64_t rows, int64_t c0, int64_t c1, A* y,
                  int64_t ld) const {
    if (p.layout == Layout::kNCHW) {
      for (int64_t c = c0; c < c1; ++c)
        read_row(source.x + n * args.x_image + c * args.x_channel + row * W, y + (c - c0) * ld,
                 rows * W);
    } else {
      read_transposed(source.x + n * args.x_image + row * W * m + c0, m, y, ld, rows * W, c1 - c0);
    }
  }

  // Output rows [row0, row1) of image n, a band at a time.
  void bands(int64_t n, int64_t row0, int64_t row1, int64_t c0, int64_t c1) const {
    if (y_direct && !plan.stream && plan.row_splits == 1 && p.has_primary)
      return bands_in_place(n, c0, c1);
    const int64_t count = c1 - c0, buffer_rows = plan.band_rows + 2 * pad,
                  ld = round_up(buffer_rows * W, 16) + 16;
    A* scratch = static_cast<A*>(thread_scratch(size_t(plan.scratch_bytes)));
    A* y = scratch + 64;
    A* z = y + count * ld + 64;
    A* panel = z + count * ghosts_per_map * ld + 64;
    const int64_t first = row0 - pad > 0 ? row0 - pad : 0, last = row1 + pad < H ? row1 + pad : H;
    // y holds rows [base, have); output rows up to `done` are finished.
    int64_t base = first, have = first, done = row0;
    while (done < row1) {
      // Drop the rows that no later output row reads.
      const int64_t keep = done - pad > base ? done - pad : base;
      if (keep > base && keep < have)
        for (int64_t c = 0; c < count; ++c)
          std::memmove(y + c * ld, y + c * ld + (keep - base) * W,
                       size_t(have - keep) * W * sizeof(A));
      base = keep;
      // New rows, cut at the first and the last row of this item: another item writes the y of rows
      // outside.
      int64_t until = base + buffer_rows < last ? base + buffer_rows : last;
      if (have >= row0 && have + plan.band_rows < until) until = have + plan.band_rows;
      while (have < until) {
        const int64_t stop = have < row0   ? (row0 < until ? row0 : until)
                             : have < row1 ? (row1 < until ? row1 : until)
                                           : until;
        rows(n, have, stop, have >= row0 && have < row1, c0, c1, y + (have - base) * W, ld, panel);
        have = stop;
      }
      int64_t ready = have == H ? H : have - pad;
      if (ready > row1) ready = row1;
      if (ready <= done) continue;
      cheap(y, ld, base, n, done, ready, c0, c1, z);
      done = ready;
    }
  }

  // All bands of image n, with y in the planes of out: no rows are carried or copied.
  void bands_in_place(int64_t n, int64_t c0, int64_t c1) const {
    A* panel = static_cast<A*>(thread_scratch(size_t(plan.scratch_bytes))) + 64;
    A* z = panel + (plan.pack ? p.channels * (round_up(plan.band_rows * W, 16) + 16) : 0) + 64;
    A* y = reinterpret_cast<A*>(out) + n * args.out_image + c0 * out_channel;
    int64_t done = 0;
    for (int64_t r = 0; r < H; r += plan.band_rows) {
      const int64_t until = r + plan.band_rows < H ? r + plan.band_rows : H, px = (until - r) * W;
      const A* x = reinterpret_cast<const A*>(source.x) + n * args.x_image + r * W;
      int64_t ldx = args.x_channel;
      if (plan.pack) {
        ldx = round_up(px, 16) + 16;
        source.pack(n, r, until - r, panel, ldx);
        x = panel;
      }
      primary(x, ldx, px, c0, c1, y + r * W, out_channel, nullptr, columns());
      const int64_t ready = until == H ? H : until - pad;
      if (ready <= done) continue;
      cheap(y, out_channel, 0, n, done, ready, c0, c1, z);
      done = ready;
    }
  }

  // y [c1 - c0][ld] of rows [r0, r1) of image n; also written to out if the item owns these rows.
  void rows(int64_t n, int64_t r0, int64_t r1, bool owned, int64_t c0, int64_t c1, A* y, int64_t ld,
            A* panel) const {
    const int64_t px = (r1 - r0) * W;
    A* planes =
        y_direct && linear_or_relu(p.act1) && owned && (!plan.stream || streamable(out + r0 * W, P))
            ? reinterpret_cast<A*>(out) + n * args.out_image + c0 * out_channel + r0 * W
            : nullptr;
    if (!p.has_primary) {
      read_given(n, r0, r1 - r0, c0, c1, y, ld);
      given(y, ld, px, c0, c1, y, ld);
      planes = nullptr;
    } else if (plan.pack) {
      const int64_t ldx = round_up(px, 16) + 16;
      source.pack(n, r0, r1 - r0, panel, ldx);
      primary(panel, ldx, px, c0, c1, y, ld, planes, columns());
    } else {
      primary(reinterpret_cast<const A*>(source.x) + n * args.x_image + r0 * W, args.x_channel, px,
              c0, c1, y, ld, planes, columns());
    }
    if (owned && !planes && !writes_with_ghosts(c0, c1)) write(y, ld, n, r0, r1 - r0, c0, c1 - c0);
  }
};

template <class T, class O>
void apply_items(const ApplyArgs& args, int64_t begin, int64_t end) {
  if constexpr (std::is_same_v<T, O>) {
    if (args.plan.channel_lanes) {
      const LaneTile<T> tile(args);
      for (int64_t i = begin; i < end; ++i) tile.run(i);
      return;
    }
  }
  const ApplyTile<T, O> tile(args);
  for (int64_t i = begin; i < end; ++i) tile.run(i);
}

}  // namespace GHOST_ISA
}  // namespace ghost
