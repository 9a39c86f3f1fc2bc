// The register-blocked product of the 1x1 convolution, of its recomputation, and of dx (with the
// weights transposed).
//
//   Y[i][p] (+)= shift[i] + sum_k W[i][k] X[k][p]
//
// Tile map: a block keeps kRows x kVecs accumulators in registers; pixels run along the lanes,
// weights are broadcast. For each k a block issues kRows + kVecs loads for kRows * kVecs FMAs. One
// to four pixels past the last whole vector are computed with channels along the lanes.
// Binding resource: FMA ports.
#pragma once

#include "core/plan.h"
#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

// The destination of a finished block.
template <class A>
struct GemmOut {
  A* y;  // [M][ldy]
  int64_t ldy;
  A* copy;  // [M][ldcopy], a second destination (the first half of the concat), or null
  int64_t ldcopy;
  bool relu;        // of the finished sum
  bool stream;      // non-temporal stores to `copy`, whose blocks must be aligned to vectors
  bool accumulate;  // start from y instead of from shift
  bool ahead;       // prefetch the place of the results of the next columns
};

// Memory that a product prefetches evenly, in the order of addresses.
template <class A>
struct Run {
  const A* at = nullptr;
  int64_t count = 0;  // 0: nothing
};

// Prefetches of a product from beyond L2: the next columns of x, or the memory that is read and
// written after the product.
template <class A>
struct Meanwhile {
  bool columns = false;
  Run<A> read, write;
};

// The next address of a run, and the bytes that it advances for each k.
struct Walk {
  const char* at = nullptr;
  int64_t step = 0;
};
struct Walks {
  bool any = false;
  Walk read, write;
};

// One register block of kRows channels: w [K][kPanel] from the block's first channel on; x
// [K][ldx]; columns of out from col on; rows: channels to store; tail: pixels of the last vector if
// kTail. Prefetches stand between the products, two lines for each k: a core keeps few lines in
// flight, and many at once would stall the products. Fetch::kColumns: two vectors of each row of
// `next` [K][ldx].
template <class A, int kRows, int kVecs, bool kTail, Fetch kFetch>
GHOST_INLINE void gemm_block(const A* x, int64_t ldx, const A* w, int64_t K, const A* shift,
                             const GemmOut<A>& out, int64_t col, int rows, int64_t tail,
                             const A* next, const Walks& walks) {
  constexpr int L = kLanes<A>;
  using V = Vec<A>;
  V acc[kRows][kVecs];
  A* y = out.y + col;
  const auto mask = lane_range<A>(0, tail);
  if (out.accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        acc[i][v] = i >= rows                 ? V{}
                    : kTail && v == kVecs - 1 ? load_masked(y + i * out.ldy + v * L, mask)
                                              : load(y + i * out.ldy + v * L);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V s = shift ? set1(shift[i]) : V{};
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = s;
    }
  }
  const char *read = walks.read.at, *write = walks.write.at;
  const int64_t read_step = walks.read.step, write_step = walks.write.step;
  for (int64_t k = 0; k < K; ++k) {
    if constexpr (kFetch == Fetch::kColumns) {
      __builtin_prefetch(next, 0, 2);
      __builtin_prefetch(next + L, 0, 2);
      next += ldx;
    } else if constexpr (kFetch == Fetch::kImages) {
      __builtin_prefetch(read, 0, 2);
      __builtin_prefetch(write, 0, 2);
      read += read_step;
      write += write_step;
    }
    V xv[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      xv[v] = kTail && v == kVecs - 1 ? load_masked(x + v * L, mask) : load(x + v * L);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V wi = set1(w[i]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] += wi * xv[v];
    }
    x += ldx;
    w += kPanel;
  }
  A* c = out.copy ? out.copy + col : nullptr;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      V r = acc[i][v];
      if (out.relu) r = relu(r);
      if (kTail && v == kVecs - 1) {
        store_masked(y + v * L, r, mask);
        if (c) store_masked(c + v * L, r, mask);
      } else {
        store(y + v * L, r);
        if (out.ahead) __builtin_prefetch(y + (kVecs + v) * L, 1, 2);
        if (c) {
          if (out.stream)
            store_stream(c + v * L, r);
          else
            store(c + v * L, r);
        }
      }
    }
    y += out.ldy;
    if (c) c += out.ldcopy;
  }
}

// 32 vector registers with AVX-512 and NEON, 16 elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32, kMaxVecs = max_vecs(kRegisters);
inline constexpr int kRowsFor[kMaxVecs + 1] = {0, 16, 8, 8, 4, 4, 4};
#else
inline constexpr int kRegisters = 16, kMaxVecs = max_vecs(kRegisters);
inline constexpr int kRowsFor[kMaxVecs + 1] = {0, 8, 4, 4};
#endif
// float64 has the two narrow blocks only: each further one adds seconds to the build.
template <class A>
inline constexpr int kWidest = sizeof(A) == 8 ? 2 : kMaxVecs;

// All channels [0, M) of one block of pixels, kVecs vectors wide.
template <class A, int kVecs, bool kTail>
__attribute__((noinline)) void gemm_columns(const A* x, int64_t ldx, const A* panels,
                                            int64_t ldpanel, int64_t K, const A* shift, int64_t M,
                                            const GemmOut<A>& out, int64_t col, int64_t tail,
                                            const A* next, Walks& walks) {
  constexpr int R = kRowsFor[kVecs], L = kLanes<A>;
  GemmOut<A> o = out;
  for (int64_t i = 0; i < M; i += R) {
    const A* w = panels + i / kPanel * ldpanel + i % kPanel;
    const A* s = shift ? shift + i : nullptr;
    o.y = out.y + i * out.ldy;
    o.copy = out.copy ? out.copy + i * out.ldcopy : nullptr;
    const int rows = M - i < R ? int(M - i) : R;
    if (!kTail && rows == R && walks.any) {
      gemm_block<A, R, kVecs, false, Fetch::kImages>(x, ldx, w, K, s, o, col, rows, tail, nullptr,
                                                     walks);
      walks.read.at += walks.read.step * K;
      walks.write.at += walks.write.step * K;
      continue;
    }
    // Each block of channels prefetches two vectors of the next columns.
    const int64_t pair = i / R * 2;
    if (!kTail && rows == R && next && pair < kVecs) {
      gemm_block<A, R, kVecs, false, Fetch::kColumns>(x, ldx, w, K, s, o, col, rows, tail,
                                                      next + pair * L, walks);
      continue;
    }
    // The smallest block that holds the rows. Panels and shifts are padded with zeros to kPanel
    // channels: a block may compute rows that it does not store.
#define GHOST_ROWS(n)                                                                           \
  gemm_block<A, (n <= R ? n : R), kVecs, kTail, Fetch::kNothing>(x, ldx, w, K, s, o, col, rows, \
                                                                 tail, nullptr, walks)
    if (rows > 8)
      GHOST_ROWS(16);
    else if (rows > 4)
      GHOST_ROWS(8);
    else if (rows > 2)
      GHOST_ROWS(4);
    else
      GHOST_ROWS(2);
#undef GHOST_ROWS
  }
}

// The last kPixels pixels, too few for a vector: channels of a panel along the lanes, kPanels
// panels at a time for enough independent sums. A sum has the order of gemm_block. Returns the
// first row that is left.
template <class A, int kPixels, int kPanels>
int64_t gemm_pixels(const A* x, int64_t ldx, const A* panels, int64_t ldpanel, int64_t K,
                    const A* shift, int64_t M, const GemmOut<A>& out, int64_t row) {
  constexpr int L = kLanes<A>, kParts = (int(kPanel) + L - 1) / L;
  using V = Vec<A>;
  const auto mask = lane_range<A>(0, kPanel - (kParts - 1) * L);
  auto part = [&](const A* p, int v) __attribute__((always_inline)) {
    return v == kParts - 1 ? load_masked(p + v * L, mask) : load(p + v * L);
  };
  for (; row + (kPanels - 1) * kPanel < M; row += kPanels * kPanel) {
    const A* w = panels + row / kPanel * ldpanel;
    const int64_t rows = M - row < kPanels * kPanel ? M - row : kPanels * kPanel;
    A lanes[kPixels][kPanels][kParts * L] = {};
    for (int q = 0; q < kPixels; ++q)
      for (int64_t i = 0; i < rows; ++i)
        lanes[q][i / kPanel][i % kPanel] = out.accumulate ? out.y[(row + i) * out.ldy + q]
                                           : shift        ? shift[row + i]
                                                          : A(0);
    // GCC holds the accumulators in registers if no other code stands in these loops.
    V acc[kPanels][kParts][kPixels];
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kParts; ++v)
#pragma GCC unroll 4
        for (int q = 0; q < kPixels; ++q) acc[p][v][q] = part(lanes[q][p], v);
    const A* xk = x;
    for (int64_t k = 0; k < K; ++k, xk += ldx, w += kPanel) {
      V xv[kPixels];
#pragma GCC unroll 4
      for (int q = 0; q < kPixels; ++q) xv[q] = set1(xk[q]);
#pragma GCC unroll 8
      for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 4
        for (int v = 0; v < kParts; ++v) {
          const V wv = part(w + p * ldpanel, v);
#pragma GCC unroll 4
          for (int q = 0; q < kPixels; ++q) acc[p][v][q] += wv * xv[q];
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < kParts; ++v)
#pragma GCC unroll 4
        for (int q = 0; q < kPixels; ++q)
          store(lanes[q][p] + v * L, out.relu ? relu(acc[p][v][q]) : acc[p][v][q]);
    for (int q = 0; q < kPixels; ++q)
      for (int64_t i = 0; i < rows; ++i) {
        const A r = lanes[q][i / kPanel][i % kPanel];
        out.y[(row + i) * out.ldy + q] = r;
        if (out.copy) out.copy[(row + i) * out.ldcopy + q] = r;
      }
  }
  return row;
}

template <class A, int kPixels>
__attribute__((noinline)) void gemm_tail(const A* x, int64_t ldx, const A* panels, int64_t ldpanel,
                                         int64_t K, const A* shift, int64_t M,
                                         const GemmOut<A>& out) {
  constexpr int kParts = (int(kPanel) + kLanes<A> - 1) / kLanes<A>;
  constexpr int kMany = 8 / (kPixels * kParts);
  int64_t row = 0;
  if constexpr (kMany > 1)
    row = gemm_pixels<A, kPixels, kMany>(x, ldx, panels, ldpanel, K, shift, M, out, row);
  gemm_pixels<A, kPixels, 1>(x, ldx, panels, ldpanel, K, shift, M, out, row);
}

// The pixels past the last whole vector, if they are few: a last vector costs as much as a full
// one. Returns their number, or 0 if they are left to a masked vector.
template <class A>
int64_t gemm_rest(const A* x, int64_t ldx, const A* panels, int64_t ldpanel, int64_t K,
                  const A* shift, int64_t M, int64_t pixels, const GemmOut<A>& out) {
  const int64_t rest = pixels % kLanes<A>;
  if (rest == 0 || rest > kMostPixels || rest * 4 >= M) return 0;
  GemmOut<A> o = out;
  o.y += pixels - rest;
  if (o.copy) o.copy += pixels - rest;
  const A* const last = x + pixels - rest;
  with_constant<1, 2, 3, 4>(rest, [&](auto n) {
    gemm_tail<A, decltype(n)::value>(last, ldx, panels, ldpanel, K, shift, M, o);
  });
  return rest;
}

// Bytes of x in a slice of K, `vecs` vectors for each k.
inline constexpr int64_t kSlice = 24 << 10;

// Planes of kLongPlane pixels and more, from beyond L2, are read kLongDepth side by side, kLongRun
// pixels of each before the next planes: few enough streams for the hardware prefetcher. It follows
// streams by page, and a page holds several shorter planes.
inline constexpr int64_t kLongPlane = 512, kLongDepth = 36, kLongRun = 1024;

// Y [M][pixels] from X [K][ldx], `vecs` vectors of pixels at a time.
//   panels: [ceil(M / kPanel)][K][kPanel], padded with zeros; ldpanel: elements from panel to panel
//   shift: [M], padded to kPanel, or null
template <class A>
void gemm_nn(const A* x, int64_t ldx, const A* panels, int64_t ldpanel, int64_t K, const A* shift,
             int64_t M, int64_t pixels, int vecs, const Meanwhile<A>& meanwhile,
             const GemmOut<A>& out) {
  constexpr int L = kLanes<A>;
  vecs = vecs < kWidest<A> ? vecs : kWidest<A>;
  pixels -= gemm_rest<A>(x, ldx, panels, ldpanel, K, shift, M, pixels, out);
  if (pixels == 0) return;
  const int64_t total = (pixels + L - 1) / L;  // vectors, the last one possibly partial
  const int64_t blocks = (total + vecs - 1) / vecs;
  const int64_t most_depth = kSlice / (vecs * kVectorBytes);
  int64_t slices = K > most_depth * 3 / 2 ? (K + most_depth - 1) / most_depth : 1, run = 1;
  if (meanwhile.columns && pixels >= kLongPlane) {
    slices = K > kLongDepth * 3 / 2 ? (K + kLongDepth - 1) / kLongDepth : 1;
    run = kLongRun / (vecs * L);
  }
  const int64_t depth = K > 0 ? (K + slices - 1) / slices : 1;
  Walks walks;
  const int64_t rounds = blocks * (M / kRowsFor[(total + blocks - 1) / blocks]) * K;
  const auto walk = [&](const Run<A>& what) {
    // With nothing to prefetch the address stays at x, which is valid memory.
    if (what.count == 0 || rounds == 0) return Walk{reinterpret_cast<const char*>(x), 0};
    walks.any = true;
    return Walk{reinterpret_cast<const char*>(what.at),
                (what.count * int64_t(sizeof(A)) + rounds - 1) / rounds};
  };
  walks.read = walk(meanwhile.read);
  walks.write = walk(meanwhile.write);
  for (int64_t b0 = 0; b0 < blocks; b0 += run) {
    const int64_t b1 = b0 + run < blocks ? b0 + run : blocks;
    // A deep product goes in slices of K, whose columns of x stay in L1 while all channels pass.
    // The sums stay in y in between, in the compute type.
    for (int64_t k = 0; k == 0 || k < K; k += depth) {
      const int64_t len = K - k < depth ? K - k : depth;
      GemmOut<A> o = out;
      o.accumulate = out.accumulate || k > 0;
      if (k + len < K) {
        o.relu = false;
        o.copy = nullptr;
      }
      const A* pk = panels + k * kPanel;
      for (int64_t b = b0; b < b1; ++b) {
        // An even split: 13 vectors in blocks of 6 are 4 + 4 + 5, not 6 + 6 + 1.
        const int64_t v0 = total * b / blocks, v1 = total * (b + 1) / blocks;
        const int64_t col = v0 * L, tail = pixels - (v1 - 1) * L;
        const A* xk = x + col + k * ldx;
        // The hardware prefetcher is late at the start of every page: the next columns are
        // prefetched here.
        const A* next = nullptr;
        if (meanwhile.columns)
          next = b + 1 < b1    ? xk + (v1 - v0) * L
                 : k + len < K ? x + total * b0 / blocks * L + (k + len) * ldx
                               : x + v1 * L;
        with_constant<1, 2, 3, 4, 5, 6>(v1 - v0, [&](auto n) {
          if constexpr (constexpr int kVecs = decltype(n)::value; kVecs <= kWidest<A>) {
            if (tail < L)
              gemm_columns<A, kVecs, true>(xk, ldx, pk, ldpanel, len, shift, M, o, col, tail, next,
                                           walks);
            else
              gemm_columns<A, kVecs, false>(xk, ldx, pk, ldpanel, len, shift, M, o, col, L, next,
                                            walks);
          }
        });
      }
    }
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
