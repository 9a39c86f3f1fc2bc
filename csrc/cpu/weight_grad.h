// dw1[i][k] = sum over images and pixels of du[i][p] * x[k][p]: both operands are contiguous in p,
// so products are added lane by lane and lanes are summed once per chunk of pixels.
//
// Tile map: an item is kGradRowsPerItem rows i; chunks of pixels are the outer loop. With few rows
// the inner one is register blocks of 8 x 2 dot products, with many gemm_nn on transposed tiles.
// Chunks come in a fixed order, so the sums do not depend on the number of threads. Binding
// resource: FMA ports.
#pragma once

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
      const GemmOut<A> out{dw + row0 * C, C, nullptr, 0, false, false, !fresh};
      gemm_nn<A>(x, ldx, panels, chunk * kPanel, px, nullptr, rows, C, vecs, false, out);
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

  if (args.transpose) {
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
