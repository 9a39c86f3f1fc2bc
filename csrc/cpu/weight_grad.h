// dw1[i][k] = sum over images and pixels of du[i][p] * x[k][p]: both operands are contiguous in p, so products are added lane
// by lane and lanes are summed once per chunk of pixels.
//
// Tile map: an item is kGradRowsPerItem rows i; chunks of pixels are the outer loop, register blocks of 8 x 2 sums the inner
// ones. Chunks come in a fixed order, so the sums do not depend on the number of threads.
// Binding resource: FMA ports (10 loads for 16 FMAs).
#pragma once

#include "cpu/apply.h"

namespace ghost {
namespace GHOST_ISA {

// 16 (8 where there are 16 registers) sums in flight. More rows than columns: the rows stay in L1 while the columns stream by.
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

// sums[i][k] = over n pixels; rows and columns past the valid ones repeat the last one and are dropped by the caller.
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
void add_products(const Rows<A>& a, const Rows<A>& b, int64_t n, A* d, int64_t step_a, int64_t step_b) {
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
        for (int64_t s = 0; s < nk; ++s) d[(i + q) * step_a + (k + s) * step_b] += sums[q * kGradCols + s];
    }
  }
}

template <class T>
void weight_grad(const WeightGradArgs& args, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  const Problem& p = args.problem;
  const int64_t m = p.intrinsic, C = p.channels, H = p.out_height(), W = p.out_width(), P = H * W, N = p.batch;
  const Source<T> source{static_cast<const T*>(args.x), C * p.height * p.width, p.height * p.width, C, p.height, p.width,
                         p.stride, p.layout, W};
  const A* du = static_cast<const A*>(args.du);
  A* dw = static_cast<A*>(args.dw1);
  const bool native = p.layout == Layout::kNCHW && sizeof(T) == sizeof(A) && p.stride == 1;
  const int64_t rows0 = begin * kGradRowsPerItem, rows1 = end * kGradRowsPerItem < m ? end * kGradRowsPerItem : m;
  if (rows1 <= rows0) return;
  std::memset(dw + rows0 * C, 0, size_t(rows1 - rows0) * C * sizeof(A));
  if (P == 0 || N == 0) return;

  // A chunk of pixels: several small images joined, one image, or some rows of a large one. Fixed by shapes alone.
  const int64_t images = P * 2 <= kGradChunk ? (kGradChunk / P < N ? kGradChunk / P : N) : 1;
  const int64_t rows = images > 1 || P <= 2 * kGradChunk ? H : (kGradChunk / W > 0 ? kGradChunk / W : 1);
  const bool pack = !native || images > 1;
  const int64_t ld = round_up(images * rows * W, 16) + 16;
  A* panel = pack ? static_cast<A*>(thread_scratch(size_t(C * ld + 128) * sizeof(A))) + 64 : nullptr;

  for (int64_t n0 = 0; n0 < N; n0 += images)
    for (int64_t r0 = 0; r0 < H; r0 += rows) {
      const int64_t count = n0 + images < N ? images : N - n0, nr = r0 + rows < H ? rows : H - r0, px = count * nr * W;
      const A* x = panel;
      int64_t ldx = ld;
      if (pack) {
        for (int64_t j = 0; j < count; ++j) source.pack(n0 + j, r0, nr, panel + j * nr * W, ld);
      } else {
        x = reinterpret_cast<const A*>(source.x) + n0 * C * P + r0 * W;
        ldx = P;
      }
      // The longer operand is walked once, eight rows at a time; the shorter one streams by from L2 for each of them.
      const Rows<A> du_rows{du + rows0 * N * P + n0 * P + r0 * W, N * P, rows1 - rows0}, x_rows{x, ldx, C};
      if (m >= C)
        add_products<A>(du_rows, x_rows, px, dw + rows0 * C, C, 1);
      else
        add_products<A>(x_rows, du_rows, px, dw + rows0 * C, 1, C);
    }
}

}  // namespace GHOST_ISA
}  // namespace ghost
