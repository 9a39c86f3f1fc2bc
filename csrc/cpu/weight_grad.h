// dw1[i][k] = sum over images and pixels of du[i][p] * x[k][p]: both operands are contiguous in p, so products are added lane
// by lane and lanes are summed once per chunk of pixels.
//
// Tile map: an item is kRowsPerItem rows i; chunks of images (x and du of a chunk fit L2) are the outer loop, register blocks
// of 4 x 6 sums the inner ones. Chunks come in a fixed order, so the sums do not depend on the number of threads.
// Binding resource: FMA ports (10 loads for 24 FMAs).
#pragma once

#include "cpu/apply.h"

namespace ghost {
namespace GHOST_ISA {

inline constexpr int64_t kGradRows = 4, kGradCols = 6;

// sums[i][k] += over n pixels; rows and columns past the valid ones repeat the last one and are dropped by the caller.
template <class A>
GHOST_INLINE void dot_block(const A* const* a, const A* const* b, int64_t n, A (*sums)[kGradCols]) {
  constexpr int L = kLanes<A>;
  Vec<A> acc[kGradRows][kGradCols] = {};
  int64_t p = 0;
  for (; p + L <= n; p += L) {
    Vec<A> av[kGradRows];
#pragma GCC unroll 4
    for (int i = 0; i < kGradRows; ++i) av[i] = load(a[i] + p);
#pragma GCC unroll 6
    for (int k = 0; k < kGradCols; ++k) {
      const Vec<A> bv = load(b[k] + p);
#pragma GCC unroll 4
      for (int i = 0; i < kGradRows; ++i) acc[i][k] += av[i] * bv;
    }
  }
  if (p < n) {
    Vec<A> av[kGradRows];
#pragma GCC unroll 4
    for (int i = 0; i < kGradRows; ++i) av[i] = load_n(a[i] + p, n - p);
#pragma GCC unroll 6
    for (int k = 0; k < kGradCols; ++k) {
      const Vec<A> bv = load_n(b[k] + p, n - p);
#pragma GCC unroll 4
      for (int i = 0; i < kGradRows; ++i) acc[i][k] += av[i] * bv;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kGradRows; ++i)
#pragma GCC unroll 6
    for (int k = 0; k < kGradCols; ++k) sums[i][k] = reduce_add<A>(acc[i][k]);
}

template <class T>
void weight_grad(const WeightGradArgs& args, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  const Problem& p = args.problem;
  const int64_t m = p.intrinsic, C = p.channels, H = p.out_height(), W = p.out_width(), P = H * W, N = p.batch;
  const Source<T> source{static_cast<const T*>(args.x), C * p.height * p.width, C, p.height, p.width, p.stride, p.layout, W};
  const A* du = static_cast<const A*>(args.du);
  A* dw = static_cast<A*>(args.dw1);
  const bool native = p.layout == Layout::kNCHW && sizeof(T) == sizeof(A) && p.stride == 1;
  const int64_t rows0 = begin * kGradRowsPerItem, rows1 = end * kGradRowsPerItem < m ? end * kGradRowsPerItem : m;
  if (rows1 <= rows0) return;
  std::memset(dw + rows0 * C, 0, size_t(rows1 - rows0) * C * sizeof(A));
  if (P == 0 || N == 0) return;

  // Pixels a chunk: whole images joined while small, rows of one image when large. Fixed by shapes alone.
  const int64_t budget = args.l2_bytes / 2 / int64_t(sizeof(A)) / (C + kGradRowsPerItem);
  const bool join = P <= budget / 2 && N > 1;
  const int64_t images = join ? (budget / P < N ? budget / P : N) : 1;
  int64_t rows = join || budget >= P ? H : budget / W;
  if (rows < 1) rows = 1;
  // Direct reading only pays where no lane is lost at the end of a plane.
  const bool pack_x = !native || (images > 1 && P % kLanes<A> != 0), pack_du = images > 1 && P % kLanes<A> != 0;
  const int64_t ld = round_up((join ? images * P : rows * W), 16) + 16;
  A* panel = static_cast<A*>(thread_scratch(size_t((C + kGradRows) * ld + 256) * sizeof(A))) + 64;
  A* du_panel = panel + C * ld + 64;

  for (int64_t n0 = 0; n0 < N; n0 += images)
    for (int64_t r0 = 0; r0 < H; r0 += rows) {
      const int64_t count = n0 + images < N ? images : N - n0, nr = r0 + rows < H ? rows : H - r0, px = nr * W;
      if (pack_x)
        for (int64_t j = 0; j < count; ++j) source.pack(n0 + j, r0, nr, panel + j * px, ld);
      for (int64_t i = rows0; i < rows1; i += kGradRows) {
        const int64_t ni = rows1 - i < kGradRows ? rows1 - i : kGradRows;
        if (pack_du)
          for (int64_t q = 0; q < ni; ++q)
            for (int64_t j = 0; j < count; ++j) read_row(du + ((n0 + j) * m + i + q) * P, du_panel + q * ld + j * P, P);
        for (int64_t k = 0; k < C; k += kGradCols) {
          const int64_t nk = C - k < kGradCols ? C - k : kGradCols;
          // One run of pixels if joined, otherwise image by image.
          const int64_t runs = pack_du ? 1 : count, run = pack_du ? count * px : px;
          for (int64_t j = 0; j < runs; ++j) {
            const A* a[kGradRows];
            const A* b[kGradCols];
            for (int64_t q = 0; q < kGradRows; ++q) {
              const int64_t row = q < ni ? q : ni - 1;
              a[q] = pack_du ? du_panel + row * ld : du + ((n0 + j) * m + i + row) * P + r0 * W;
            }
            for (int64_t q = 0; q < kGradCols; ++q) {
              const int64_t col = k + (q < nk ? q : nk - 1);
              b[q] = pack_x ? panel + col * ld + j * px
                            : reinterpret_cast<const A*>(source.x) + ((n0 + j) * C + col) * P + r0 * W;
            }
            A sums[kGradRows][kGradCols];
            dot_block<A>(a, b, run, sums);
            for (int64_t q = 0; q < ni; ++q)
              for (int64_t s = 0; s < nk; ++s) dw[(i + q) * C + k + s] += sums[q][s];
          }
        }
      }
    }
}

}  // namespace GHOST_ISA
}  // namespace ghost
