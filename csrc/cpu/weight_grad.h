// dw1[i][k] = sum over images and pixels of du[i][p] * x[k][p]: both operands are contiguous in p,
// so products are added lane by lane and lanes are summed once per chunk of pixels.
//
// Tile map: an item is kGradRowsPerItem rows i; chunks of pixels are the outer loop. With few rows
// the inner one is register blocks of 8 x 2 dot products, with many gemm_nn on transposed tiles, or
// broadcasts of x against a transposed tile of du.
// Chunks come in a fixed order, so the sums do not depend on the number of threads. Binding
// resource: FMA ports.
#pragma once

#include <type_traits>

#include "cpu/apply.h"

namespace ghost {
namespace GHOST_ISA {

// 16 (8 where there are 16 registers) sums in flight. More rows than columns: the rows stay in L1
// while the columns stream by.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int64_t kGradRows = 8, kGradCols = 2;
#else
inline constexpr int64_t kGradRows = 4, kGradCols = 2;
#endif
inline constexpr int64_t kGradChunk = 1024;  // pixels: kGradRows rows of it fill half of L1

// out[i] = sum of the lanes of v[i], for all L vectors at once: a transpose whose every step adds.
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

// sums[i][k] = over n pixels; rows and columns past the valid ones repeat the last one and are
// dropped by the caller.
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
  const A* data;
  int64_t ld, count;
};

// d[i * step_a + k * step_b] += sum over n pixels of a[i] b[k], for all rows i of a and k of b.
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

// The same sum as a product of transposed operands, [rows, px] x [px, C]: worth its transposes
// (none of x where x is NHWC) as soon as there are enough rows to share them.
inline constexpr int64_t kPixelsAFlush = 2048;

template <class T>
class TransposedGrad {
  using A = ComputeOf<T>;
  const WeightGradArgs& args;
  const Source<T>& source;
  const int64_t N, C, P, W, ld, chunk;
  A* const tile;       // [chunk][ld] x, pixels by channels
  A* const panels;     // [rows / kPanel][chunk][kPanel] du
  A* const planes;     // [C][chunk + 16] x on its way, where it needs converting or gathering first
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
        write_transposed(du + (row0 + i) * N * P + q, N * P, panel, kPanel, px, count);
      }
      const GemmOut<A> out{dw + row0 * C, C, nullptr, 0, false, false, !fresh, false};
      gemm_nn<A>(x, ldx, panels, chunk * kPanel, px, nullptr, rows, C, vecs, {}, out);
      fresh = false;
      // A float32 sum over all pixels would lose digits: it is moved to double from time to time.
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
  // Pixels [q, q + px), counted through all images, as [px][ldx].
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

// The same sum, transposed: dw1^T[k][i] = sum x[k][p] du^T[p][i], with x read by broadcasts from
// the very planes it is in. Only du, which has fewer rows, is transposed.
template <class A>
class BroadcastGrad {
  static constexpr int L = kLanes<A>, kMost = kWidest<A>;
  const Source<A>& source;
  const int64_t N, C, P, rows, ld, chunk;
  A* const tile;       // [chunk][ld] du, pixels by rows
  A* const partial;    // [C][ld] sums since the last flush
  double* const sums;  // [C][ld]

 public:
  static int64_t columns(int64_t rows) { return round_up(rows, L); }
  // The tile stays in L1 while all channels of x go by. From all rows, not from an item's: the
  // order of the sums must not depend on the number of threads.
  static int64_t chunk_pixels(const Problem& p) {
    const int64_t wanted = (24 << 10) / int64_t(sizeof(A)) / columns(p.intrinsic);
    return wanted < 16 ? 16 : wanted;
  }
  static int64_t scratch(const Problem& p, int64_t rows) {
    return 128 + columns(rows) * (chunk_pixels(p) + 3 * p.channels);
  }

  BroadcastGrad(const Problem& p, const Source<A>& s, int64_t rows_, A* memory)
      : source(s),
        N(p.batch),
        C(p.channels),
        P(p.out_pixels()),
        rows(rows_),
        ld(columns(rows_)),
        chunk(chunk_pixels(p)),
        tile(memory + 64),
        partial(tile + chunk * ld),
        sums(reinterpret_cast<double*>(partial + C * ld)) {}

  // du: [rows][N * P], dw: [rows][C]
  void run(const A* du, A* dw) const {
    std::memset(sums, 0, size_t(C * ld) * sizeof(double));
    bool fresh = true;
    for (int64_t q = 0, since = 0; q < N * P; q += chunk) {
      const int64_t px = q + chunk < N * P ? chunk : N * P - q;
      if (ld > rows) std::memset(tile, 0, size_t(px * ld) * sizeof(A));
      write_transposed(du + q, N * P, tile, ld, px, rows);
      products(q, px, fresh);
      fresh = false;
      since += px;
      if (since >= kPixelsAFlush || q + px == N * P) {
        for (int64_t i = 0; i < C * ld; ++i) sums[i] += double(partial[i]);
        fresh = true;
        since = 0;
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < C; ++k) dw[i * C + k] = A(sums[k * ld + i]);
  }

 private:
  // partial (+)= x[:, q .. q + px) tile, pixels counted through all images.
  void products(int64_t q, int64_t px, bool fresh) const {
    for (int64_t v = 0; v < ld / L;) {
      const int64_t left = ld / L - v;
      const int vecs = int(left <= kMost ? left : left < 2 * kMost ? (left + 1) / 2 : kMost);
      switch (vecs) {
#define GHOST_COLUMNS(n)                                          \
  case n:                                                         \
    if constexpr (n <= kMost) columns_of<n>(q, px, v * L, fresh); \
    break;
        GHOST_COLUMNS(1)
        GHOST_COLUMNS(2)
        GHOST_COLUMNS(3)
        GHOST_COLUMNS(4)
        GHOST_COLUMNS(5)
        GHOST_COLUMNS(6)
#undef GHOST_COLUMNS
      }
      v += vecs;
    }
  }

  template <int kVecs>
  __attribute__((noinline)) void columns_of(int64_t q, int64_t px, int64_t col, bool fresh) const {
    // More than six rows would need more addresses than there are registers for.
    constexpr int R = kRowsFor[kVecs] < 6 ? kRowsFor[kVecs] : 6;
    int64_t k = 0;
    for (; k + R <= C; k += R) block<R, kVecs>(k, q, px, col, fresh);
    for (; k < C; ++k) block<1, kVecs>(k, q, px, col, fresh);
  }

  template <int kRows, int kVecs>
  GHOST_INLINE void block(int64_t k, int64_t q, int64_t px, int64_t col, bool fresh) const {
    Vec<A> acc[kRows][kVecs];
    A* const out = partial + k * ld + col;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = fresh ? Vec<A>{} : load(out + i * ld + v * L);
    const A* t = tile + col;
    for (int64_t done = 0; done < px;) {
      const int64_t n = (q + done) / P, p = (q + done) % P;
      const int64_t run = P - p < px - done ? P - p : px - done;
      const A* x = source.x + n * source.image + k * source.channel + p;
      for (int64_t r = 0; r < run; ++r, t += ld) {
        Vec<A> d[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) d[v] = load(t + v * L);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const Vec<A> xi = set1(x[i * source.channel + r]);
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) acc[i][v] += xi * d[v];
        }
      }
      done += run;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) store(out + i * ld + v * L, acc[i][v]);
  }
};

template <class T>
void weight_grad(const WeightGradArgs& args, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  const Problem& p = args.problem;
  const int64_t m = p.intrinsic, C = p.channels, H = p.out_height(), W = p.out_width(), P = H * W,
                N = p.batch;
  const Source<T> source{static_cast<const T*>(args.x),
                         C * p.height * p.width,
                         p.height * p.width,
                         C,
                         p.height,
                         p.width,
                         p.stride,
                         p.layout,
                         W};
  A* dw = static_cast<A*>(args.dw1);
  const int64_t row0 = begin * kGradRowsPerItem,
                row1 = end * kGradRowsPerItem < m ? end * kGradRowsPerItem : m;
  if (row1 <= row0) return;
  std::memset(dw + row0 * C, 0, size_t(row1 - row0) * C * sizeof(A));
  if (P == 0 || N == 0 || C == 0) return;

  if constexpr (std::is_same_v<T, A>) {
    if (args.path == WeightGradPath::kBroadcast) {
      A* memory = static_cast<A*>(
          thread_scratch(size_t(BroadcastGrad<A>::scratch(p, row1 - row0)) * sizeof(A)));
      BroadcastGrad<A>(p, source, row1 - row0, memory)
          .run(static_cast<const A*>(args.du) + row0 * N * P, dw + row0 * C);
      return;
    }
  }
  if (args.path != WeightGradPath::kDot) {
    A* memory = static_cast<A*>(
        thread_scratch(size_t(TransposedGrad<T>::scratch(C, row1 - row0)) * sizeof(A)));
    TransposedGrad<T>(args, source, row1 - row0, memory).run(row0, row1 - row0, dw);
    return;
  }
  // Few rows: straight dot products over runs of one image, both operands read where they are.
  const A* du = static_cast<const A*>(args.du);
  const A* x = reinterpret_cast<const A*>(source.x);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t q = 0; q < P; q += kGradChunk) {
      const int64_t px = q + kGradChunk < P ? kGradChunk : P - q;
      const Rows<A> du_rows{du + row0 * N * P + n * P + q, N * P, row1 - row0},
          x_rows{x + n * C * P + q, P, C};
      if (m >= C)
        add_products<A>(du_rows, x_rows, px, dw + row0 * C, C, 1);
      else
        add_products<A>(x_rows, du_rows, px, dw + row0 * C, 1, C);
    }
}

}  // namespace GHOST_ISA
}  // namespace ghost
