// The gradient of the primary convolution's weights.
//
//   dw1[i][k] = sum_{n,p} du[i][n][p] * x[n][k][p]
//
// N images, C channels of x, m rows of du, P = H * W pixels of du.
//
// Tile map: an item is kGradRowsPerItem rows i; the outer loop goes over chunks of pixels, in a
// fixed order, so that the sums do not depend on the number of threads. The inner loop depends on
// WeightGradPath:
//   kBroadcast   values of the operand with more rows are broadcast against a transposed tile of
//                the other one
//   kDot         register blocks of 8 x 2 dot products over pixels: one operand has few rows
//   kTransposed  gemm_nn on transposed tiles: x is not planes of the compute type
// Binding resource: FMA ports.
#pragma once

#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"
#include "cpu/source.h"

namespace ghost {
namespace GHOST_ISA {

// A block of 16 sums, or 8 with 16 registers. More rows than columns: the rows stay in L1 while the
// columns stream by.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int64_t kGradRows = 8, kGradCols = 2;
#else
inline constexpr int64_t kGradRows = 4, kGradCols = 2;
#endif
inline constexpr int64_t kGradChunk = 1024;  // pixels; kGradRows float32 rows: 16 or 32 KiB

// out[i] = sum of the lanes of v[i], for L vectors together: a transpose that adds at every step.
template <class A>
GHOST_INLINE void reduce_block(Vec<A>* v, A* out) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 4
  for (int s = 1, n = L / 2; s < L; s *= 2, n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      Vec<A> pair[2] = {v[2 * i], v[2 * i + 1]};
      exchange_lanes<A>(pair[0], pair[1], s);
      v[i] = pair[0] + pair[1];
    }
  }
  store(out, v[0]);
}

// sums[i][k] = sum over n pixels of a[i] * b[k], kGradRows x kGradCols.
template <class A>
GHOST_INLINE void dot_block(const A* const* a, const A* const* b, int64_t n, A* sums) {
  constexpr int L = kLanes<A>;
  constexpr int kSums = kGradRows * kGradCols, kVectors = (kSums + L - 1) / L * L;
  Vec<A> acc[kVectors] = {};
  int64_t p = 0;
  for (; p + L <= n; p += L) {
    const Vec<A> b0 = load(b[0] + p), b1 = load(b[1] + p);
#pragma GCC unroll 8
    for (int i = 0; i < kGradRows; ++i) {
      Vec<A> av = load(a[i] + p);
      keep(av);
      acc[2 * i] += av * b0;
      acc[2 * i + 1] += av * b1;
    }
  }
  if (p < n) {
    const Vec<A> b0 = load_n(b[0] + p, n - p), b1 = load_n(b[1] + p, n - p);
#pragma GCC unroll 8
    for (int i = 0; i < kGradRows; ++i) {
      const Vec<A> av = load_n(a[i] + p, n - p);
      acc[2 * i] += av * b0;
      acc[2 * i + 1] += av * b1;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; i += L) reduce_block<A>(acc + i, sums + i);
}

template <class A>
struct Rows {
  const A* data;  // [count][ld]
  int64_t ld, count;
};

// d[i * step_a + k * step_b] += sum over n pixels of a[i] * b[k], for all rows i of a and k of b. A
// block that is not full repeats its last row or column.
template <class A>
void add_products(const Rows<A>& a, const Rows<A>& b, int64_t n, A* d, int64_t step_a,
                  int64_t step_b) {
  for (int64_t i = 0; i < a.count; i += kGradRows) {
    const int64_t ni = a.count - i < kGradRows ? a.count - i : kGradRows;
    const A* pa[kGradRows];
    for (int64_t q = 0; q < kGradRows; ++q) pa[q] = a.data + (i + (q < ni ? q : ni - 1)) * a.ld;
    for (int64_t k = 0; k < b.count; k += kGradCols) {
      const int64_t nk = b.count - k < kGradCols ? b.count - k : kGradCols;
      const A* pb[kGradCols];
      for (int64_t q = 0; q < kGradCols; ++q) pb[q] = b.data + (k + (q < nk ? q : nk - 1)) * b.ld;
      A sums[32];
      dot_block<A>(pa, pb, n, sums);
      for (int64_t q = 0; q < ni; ++q)
        for (int64_t s = 0; s < nk; ++s)
          d[(i + q) * step_a + (k + s) * step_b] += sums[q * kGradCols + s];
    }
  }
}

// Pixels that a float32 sum of a transposed product spans; such sums are added in double.
inline constexpr int64_t kPixelsAFlush = 2048;
// Pixels of a float32 sum of a broadcast product, where a sum is one chain of additions.
inline constexpr int64_t kBroadcastFlush = 256;
// Rows of a broadcast block by its number of vectors. More than six addresses of rows would spill.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kGradRowsFor[] = {0, 6, 6, 6, 6, 5, 4};
#else
inline constexpr int kGradRowsFor[] = {0, 6, 6, 4};
#endif

// kTransposed: the product of transposed operands, [rows, px] x [px, C]. x in NHWC is read in
// place.
template <class T>
class TransposedGrad {
  using A = ComputeOf<T>;
  const WeightGradArgs& args;
  const Source<T>& source;
  const int64_t N, C, P, W, ld, chunk;
  A* const tile;       // [chunk][ld] x
  A* const panels;     // [rows / kPanel][chunk][kPanel] du
  A* const planes;     // [C][chunk + 16] x, converted or gathered before its transposition
  double* const sums;  // [rows][C]

 public:
  static int64_t chunk_pixels(int64_t C) {
    const int64_t wanted = (512 << 10) / int64_t(sizeof(A)) / C / 16 * 16;
    return wanted < 64 ? 64 : wanted > 512 ? 512 : wanted;
  }
  static int64_t scratch(int64_t C, int64_t rows) {
    const int64_t k = chunk_pixels(C);
    return k * (round_up(C, 16) + 16) + k * round_up(rows, kPanel) + C * (k + 16) + 256 +
           2 * rows * C;
  }

  TransposedGrad(const WeightGradArgs& a, const Source<T>& s, int64_t rows, A* memory)
      : args(a),
        source(s),
        N(a.problem.batch),
        C(a.problem.channels),
        P(a.problem.out_pixels()),
        W(a.problem.out_width()),
        ld(round_up(C, 16) + 16),
        chunk(chunk_pixels(C)),
        tile(memory + 64),
        panels(tile + chunk * ld + 64),
        planes(panels + chunk * round_up(rows, kPanel) + 64),
        sums(reinterpret_cast<double*>(planes + round_up(C * (chunk + 16), 2))) {}

  void run(int64_t row0, int64_t rows, A* dw) const {
    const A* du = static_cast<const A*>(args.du);
    const int vecs = C > 4 * kLanes<A> ? (kMaxVecs >= 4 ? 4 : 2) : 2;
    std::memset(sums, 0, size_t(rows * C) * sizeof(double));
    bool fresh = true;
    for (int64_t q = 0, since = 0; q < N * P; q += chunk) {
      const int64_t px = q + chunk < N * P ? chunk : N * P - q;
      int64_t ldx = ld;
      const A* x = load_tile(q, px, ldx);
      for (int64_t i = 0; i < rows; i += kPanel) {
        const int64_t count = rows - i < kPanel ? rows - i : kPanel;
        A* panel = panels + i * chunk;
        if (count < kPanel) std::memset(panel, 0, size_t(px * kPanel) * sizeof(A));
        if (args.du_step == 1)
          for (int64_t j = 0; j < px; ++j)
            read_row(du + (q + j) * args.problem.intrinsic + row0 + i, panel + j * kPanel, count);
        else
          write_transposed(du + (row0 + i) * args.du_step + q, args.du_step, panel, kPanel, px,
                           count);
      }
      const GemmOut<A> out{dw + row0 * C, C, nullptr, 0, false, false, !fresh, false};
      gemm_nn<A>(x, ldx, panels, chunk * kPanel, px, nullptr, rows, C, vecs, {}, out);
      fresh = false;
      since += px;
      if (since >= kPixelsAFlush || q + px == N * P) {
        for (int64_t i = 0; i < rows * C; ++i) sums[i] += double(dw[row0 * C + i]);
        fresh = true;
        since = 0;
      }
    }
    for (int64_t i = 0; i < rows * C; ++i) dw[row0 * C + i] = A(sums[i]);
  }

 private:
  // Pixels [q, q + px) of x, counted over all images, as [px][ldx].
  const A* load_tile(int64_t q, int64_t px, int64_t& ldx) const {
    if (source.layout == Layout::kNHWC && source.stride == 1) {
      if (sizeof(T) == sizeof(A)) {
        ldx = C;
        return reinterpret_cast<const A*>(source.x) + q * C;
      }
      for (int64_t i = 0; i < px; ++i) read_row(source.x + (q + i) * C, tile + i * ld, C);
      return tile;
    }
    for (int64_t done = 0; done < px;) {
      const int64_t n = (q + done) / P, p = (q + done) % P;
      int64_t run = P - p < px - done ? P - p : px - done;
      if (source.layout == Layout::kNHWC) {  // strided: pixel by pixel
        const int64_t h = p / W * source.stride, w = p % W * source.stride;
        read_row(source.x + n * source.image + (h * source.width + w) * C, tile + done * ld, C);
        run = 1;
      } else if (source.stride == 1 && sizeof(T) == sizeof(A)) {
        write_transposed(reinterpret_cast<const A*>(source.x) + n * source.image + p,
                         source.channel, tile + done * ld, ld, run, C);
      } else {
        for (int64_t c = 0; c < C; ++c) {
          const T* s = source.x + n * source.image + c * source.channel;
          for (int64_t i = 0; i < run; ++i) {
            const int64_t at =
                (p + i) / W * source.stride * source.width + (p + i) % W * source.stride;
            planes[c * (chunk + 16) + i] = Storage<T>::to_compute(s[at]);
          }
        }
        write_transposed(planes, chunk + 16, tile + done * ld, ld, run, C);
      }
      done += run;
    }
    return tile;
  }
};

// Rows of pixels: pixel p of image n of row r is data[r * row + n * image + p].
template <class A>
struct PixelRows {
  const A* data;
  int64_t row, image, count;
};

// kBroadcast:
//   partial[k][j] += sum over the pixels of a chunk of wide[k][p] * narrow[j][p]
// `narrow`, which has fewer rows, is transposed, a chunk of pixels at a time. The chunk stays in L1
// while all rows of `wide` pass, whose values are broadcast from their planes; each is read from
// memory once, prefetched a block ahead.
template <class A>
class BroadcastGrad {
  static constexpr int L = kLanes<A>, kMost = kWidest<A>;
  const PixelRows<A> wide, narrow;
  const int64_t pixels, P, ld, chunk;
  A* const tile;       // [chunk][ld] narrow
  A* const partial;    // [wide.count][ld] sums since the last flush
  double* const sums;  // [wide.count][ld]

 public:
  static int64_t columns(int64_t rows) { return round_up(rows, L); }
  // narrow_rows: of all items, because the order of the sums must not depend on the number of
  // threads.
  static int64_t chunk_pixels(int64_t narrow_rows) {
    const int64_t wanted = (24 << 10) / int64_t(sizeof(A)) / columns(narrow_rows);
    return wanted < 16 ? 16 : wanted < kBroadcastFlush ? wanted : kBroadcastFlush;
  }
  static int64_t scratch(int64_t chunk, int64_t wide_rows, int64_t narrow_rows) {
    return 128 + columns(narrow_rows) * (chunk + 3 * wide_rows);
  }

  BroadcastGrad(const PixelRows<A>& wide_, const PixelRows<A>& narrow_, int64_t N, int64_t P_,
                int64_t chunk_, A* memory)
      : wide(wide_),
        narrow(narrow_),
        pixels(N * P_),
        P(P_),
        ld(columns(narrow_.count)),
        chunk(chunk_),
        tile(memory + 64),
        partial(tile + chunk * ld),
        sums(reinterpret_cast<double*>(partial + wide_.count * ld)) {}

  // dw[k * step_wide + j * step_narrow] = the sum of rows k and j.
  void run(A* dw, int64_t step_wide, int64_t step_narrow) const {
    std::memset(sums, 0, size_t(wide.count * ld) * sizeof(double));
    if (ld > narrow.count) std::memset(tile, 0, size_t(chunk * ld) * sizeof(A));
    bool fresh = true;
    for (int64_t q = 0, since = 0; q < pixels; q += chunk) {
      const int64_t px = q + chunk < pixels ? chunk : pixels - q;
      for_runs(q, px, [&](int64_t n, int64_t p, int64_t at, int64_t count) {
        write_transposed(narrow.data + n * narrow.image + p, narrow.row, tile + at * ld, ld, count,
                         narrow.count);
      });
      products(q, px, fresh);
      fresh = false;
      since += px;
      if (since >= kBroadcastFlush || q + px == pixels) {
        for (int64_t i = 0; i < wide.count * ld; ++i) sums[i] += double(partial[i]);
        fresh = true;
        since = 0;
      }
    }
    for (int64_t k = 0; k < wide.count; ++k)
      for (int64_t j = 0; j < narrow.count; ++j)
        dw[k * step_wide + j * step_narrow] = A(sums[k * ld + j]);
  }

 private:
  // Calls f(image, first pixel, offset from q, count) for the part of pixels [q, q + px), counted
  // over all images, in each image.
  template <class F>
  GHOST_INLINE void for_runs(int64_t q, int64_t px, F&& f) const {
    for (int64_t done = 0; done < px;) {
      const int64_t n = (q + done) / P, p = (q + done) % P;
      const int64_t count = P - p < px - done ? P - p : px - done;
      f(n, p, done, count);
      done += count;
    }
  }

  // partial (+)= wide[:, q .. q + px) tile.
  void products(int64_t q, int64_t px, bool fresh) const {
    const int64_t vectors = ld / L, groups = (vectors + kMost - 1) / kMost;
    with_constant<1, 2, 3, 4, 5, 6>((vectors + groups - 1) / groups, [&](auto n) {
      if constexpr (constexpr int kVecs = decltype(n)::value; kVecs <= kMost)
        rows_of<kGradRowsFor[kVecs], kVecs>(q, px, fresh);
    });
  }

  // All columns in groups of kVecs vectors and of one less.
  template <int kRows, int kVecs>
  void rows_of(int64_t q, int64_t px, bool fresh) const {
    const int64_t vectors = ld / L, groups = (vectors + kVecs - 1) / kVecs;
    for (int64_t k = 0; k < wide.count; k += kRows)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t v0 = vectors * g / groups, v1 = vectors * (g + 1) / groups;
        if (v1 - v0 == kVecs)
          block<kRows, kVecs>(k, q, px, v0 * L, fresh, g == 0);
        else if constexpr (kVecs > 1)
          block<kRows, kVecs - 1>(k, q, px, v0 * L, fresh, g == 0);
      }
  }

  // Rows past the last one read the last one again, and are not stored.
  template <int kRows, int kVecs>
  __attribute__((noinline)) void block(int64_t k, int64_t q, int64_t px, int64_t col, bool fresh,
                                       bool fetch) const {
    constexpr int64_t kLine = 64 / int64_t(sizeof(A));
    const int rows = wide.count - k < kRows ? int(wide.count - k) : kRows;
    // The next block's rows, or the first rows of the next chunk.
    const int64_t ahead = k + kRows < wide.count ? kRows * wide.row : px - k * wide.row;
    Vec<A> acc[kRows][kVecs];
    A* const out = partial + k * ld + col;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        acc[i][v] = fresh || i >= rows ? Vec<A>{} : load(out + i * ld + v * L);
    const A* t = tile + col;
    const int64_t step = ld;
    for_runs(q, px,
             [&](int64_t n, int64_t p, int64_t, int64_t count) __attribute__((always_inline)) {
               const A* x[kRows];
#pragma GCC unroll 8
               for (int i = 0; i < kRows; ++i)
                 x[i] = wide.data + n * wide.image + (k + (i < rows ? i : rows - 1)) * wide.row + p;
               for (int64_t r = 0; r < count;) {
                 const int64_t stop = r + kLine < count ? r + kLine : count;
                 if (fetch) {
#pragma GCC unroll 8
                   for (int i = 0; i < kRows; ++i) __builtin_prefetch(x[i] + r + ahead, 0, 3);
                 }
                 for (; r < stop; ++r, t += step) {
                   Vec<A> d[kVecs];
#pragma GCC unroll 8
                   for (int v = 0; v < kVecs; ++v) d[v] = load(t + v * L);
#pragma GCC unroll 8
                   for (int i = 0; i < kRows; ++i) {
                     const Vec<A> xi = set1(x[i][r]);
#pragma GCC unroll 8
                     for (int v = 0; v < kVecs; ++v) acc[i][v] += xi * d[v];
                   }
                 }
               }
             });
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) store(out + i * ld + v * L, acc[i][v]);
    }
  }
};

template <class A>
void broadcast_grad(const PixelRows<A>& du, const PixelRows<A>& x, const WeightGradArgs& args,
                    A* dw) {
  const Problem& p = args.problem;
  const int64_t m = p.intrinsic, C = p.channels, N = p.batch, P = p.out_pixels();
  const bool wide_x = C >= m;
  const PixelRows<A>&wide = wide_x ? x : du, &narrow = wide_x ? du : x;
  const int64_t chunk = BroadcastGrad<A>::chunk_pixels(wide_x ? m : C),
                scratch = BroadcastGrad<A>::scratch(chunk, wide.count, narrow.count);
  A* const memory = static_cast<A*>(thread_scratch(size_t(scratch) * sizeof(A)));
  BroadcastGrad<A>(wide, narrow, N, P, chunk, memory).run(dw, wide_x ? 1 : C, wide_x ? C : 1);
}

// Few rows: dot products over the pixels of one image, both operands read in place.
template <class A>
void dot_grad(const PixelRows<A>& du, const PixelRows<A>& x, const WeightGradArgs& args, A* dw) {
  const Problem& p = args.problem;
  const int64_t m = p.intrinsic, C = p.channels, P = p.out_pixels();
  for (int64_t n = 0; n < p.batch; ++n)
    for (int64_t q = 0; q < P; q += kGradChunk) {
      const int64_t px = q + kGradChunk < P ? kGradChunk : P - q;
      const Rows<A> du_rows{du.data + n * du.image + q, du.row, du.count},
          x_rows{x.data + n * x.image + q, x.row, x.count};
      if (m >= C)
        add_products<A>(du_rows, x_rows, px, dw, C, 1);
      else
        add_products<A>(x_rows, du_rows, px, dw, 1, C);
    }
}

template <class T>
void weight_grad(const WeightGradArgs& args, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  const Problem& p = args.problem;
  const int64_t m = p.intrinsic, C = p.channels, W = p.out_width(), P = p.out_pixels();
  const Source<T> source{static_cast<const T*>(args.x),
                         C * p.height * p.width,
                         p.height * p.width,
                         C,
                         p.height,
                         p.width,
                         p.stride,
                         p.layout,
                         W};
  A* const dw = static_cast<A*>(args.dw1);
  const int64_t row0 = begin * kGradRowsPerItem,
                row1 = end * kGradRowsPerItem < m ? end * kGradRowsPerItem : m, rows = row1 - row0;
  if (rows <= 0) return;
  std::memset(dw + row0 * C, 0, size_t(rows) * C * sizeof(A));
  if (P == 0 || p.batch == 0 || C == 0) return;

  if (args.path == WeightGradPath::kTransposed || !std::is_same_v<T, A>) {
    A* const memory =
        static_cast<A*>(thread_scratch(size_t(TransposedGrad<T>::scratch(C, rows)) * sizeof(A)));
    return TransposedGrad<T>(args, source, rows, memory).run(row0, rows, dw);
  }
  if constexpr (std::is_same_v<T, A>) {
    const PixelRows<A> du{static_cast<const A*>(args.du) + row0 * args.du_step, args.du_step, P,
                          rows},
        x{source.x, source.channel, source.image, C};
    if (args.path == WeightGradPath::kBroadcast)
      broadcast_grad<A>(du, x, args, dw + row0 * C);
    else
      dot_grad<A>(du, x, args, dw + row0 * C);
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
