// Both gradients of a depthwise convolution of stride 2 (those of stride 1 are stencils again).
//
//   dw[i][j] = sum_{h,w} grad[h][w] * x[2 h + i - R][2 w + j - R]                       R = K / 2
//   dx[h][w] = sum_{i,j} weight[i][j] * grad[(h + R - i) / 2][(w + R - j) / 2]
//              over i of the parity of h + R, j of the parity of w + R
//
// One plane at a time: x and dx [H][W], grad [Ho][Wo], weight and dw [K][K]. grad is copied into
// rows with borders of zeros; x as well, split into even and odd columns.
//
// Tile map: pixels along the lanes.
//   dw: a vector of grad multiplies one vector of x for each tap; the sums of some kernel rows stay
//       in registers
//   dx: the even and the odd columns are two stencils of grad with every other tap; their vectors
//       are zipped before they are stored
// Binding resource: load ports.
#pragma once

#include <algorithm>

#include "cpu/depthwise_conv.h"

namespace ghost {
namespace GHOST_ISA {

// (a, b) = a[0], b[0], a[1], b[1], ...: the reverse of unzip.
template <class A>
GHOST_INLINE void zip(Vec<A>& a, Vec<A>& b) {
  constexpr int L = kLanes<A>;
  const Vec<A> x = a, y = b;
#if defined(__clang__)
  for (int l = 0; l < L; ++l) {
    a[l] = l % 2 ? y[l / 2] : x[l / 2];
    b[l] = l % 2 ? y[L / 2 + l / 2] : x[L / 2 + l / 2];
  }
#else
  typename Simd<A>::I first, second;  // lanes of (x, y)
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    first[l] = (l % 2 ? L : 0) + l / 2;
    second[l] = first[l] + L / 2;
  }
  a = __builtin_shuffle(x, y, first);
  b = __builtin_shuffle(x, y, second);
#endif
}

template <class A, int K>
class HalvedGrad {
  using V = Vec<A>;
  static constexpr int R = K / 2, L = kLanes<A>;
  static constexpr int64_t kBorder = 16;
  // Kernel rows whose sums stay in registers together.
  static constexpr int kFit = ((kVectorBytes == 64 ? 32 : 16) - 4) / K;
  static constexpr int kRows = kFit < 1 ? 1 : kFit < K ? kFit : K;
  const int64_t H, W, Ho, Wo, ld;
  // Element (0, 0) of rows of ld elements, with R rows of zeros above and below.
  A *even, *odd, *grad;

  static int64_t row_elements(int64_t out_width) { return round_up(out_width, L) + 2 * kBorder; }

 public:
  // Elements of scratch.
  static int64_t scratch(int64_t height, int64_t out_height, int64_t out_width) {
    return (2 * (height + 2 * R) + out_height + 2 * R) * row_elements(out_width);
  }

  HalvedGrad(int64_t height, int64_t width, int64_t out_height, int64_t out_width, A* memory)
      : H(height), W(width), Ho(out_height), Wo(out_width), ld(row_elements(out_width)) {
    std::fill(memory, memory + scratch(H, Ho, Wo), A(0));  // the borders stay zero
    even = memory + R * ld + kBorder;
    odd = even + (H + 2 * R) * ld;
    grad = odd + (H + 2 * R) * ld;
  }

  // Copies x [H, W] and g [Ho, Wo], the operands of `weight` and `input`, into scratch.
  void load_planes(const A* x, const A* g) const {
    for (int64_t h = 0; h < Ho; ++h) {
      A* const to = grad + h * ld;
      for (int64_t w = 0; w < Wo; w += L) store(to + w, load_n(g + h * Wo + w, Wo - w));
    }
    for (int64_t h = 0; h < H; ++h) {
      const A* const row = x + h * W;
      for (int64_t q = 0; q < Wo; q += L) {
        V u = load_n(row + 2 * q, W - 2 * q), v = load_n(row + 2 * q + L, W - 2 * q - L);
        unzip<A>(u, v);
        store(even + h * ld + q, u);
        store(odd + h * ld + q, v);
      }
    }
  }

  // sums [K * K] += dw, by lanes.
  void weight(V* sums) const { weight_rows<0>(sums); }

  // dx [H, W] for the taps [K * K].
  void input(const A* taps, A* dx) const {
    for (int64_t h = 0; h < H; h += 2) {
      input_row<R % 2>(taps, h, dx + h * W);
      if (h + 1 < H) input_row<(R + 1) % 2>(taps, h + 1, dx + (h + 1) * W);
    }
  }

 private:
  template <int I>
  void weight_rows(V* sums) const {
    constexpr int kTake = I + kRows < K ? kRows : K - I;
    V acc[kTake * K];
#pragma GCC unroll 49
    for (int t = 0; t < kTake * K; ++t) acc[t] = sums[I * K + t];
    for (int64_t h = 0; h < Ho; ++h) {
      const int64_t row = (2 * h + I - R) * ld;
      for (int64_t w = 0; w < Wo; w += L) {
        const V g = load(grad + h * ld + w);  // zeros past the row's end
        const A *const e = even + row + w, *const o = odd + row + w;
#pragma GCC unroll 7
        for (int i = 0; i < kTake; ++i)
#pragma GCC unroll 7
          for (int j = 0; j < K; ++j)
            acc[i * K + j] +=
                g * load(((j + R) % 2 == 0 ? e + (j - R) / 2 : o + (j - R - 1) / 2) + i * ld);
      }
    }
#pragma GCC unroll 49
    for (int t = 0; t < kTake * K; ++t) sums[I * K + t] = acc[t];
    if constexpr (I + kTake < K) weight_rows<I + kTake>(sums);
  }

  // Row h of dx, the sum over kernel rows kFirst, kFirst + 2, ...
  template <int kFirst>
  GHOST_INLINE void input_row(const A* taps, int64_t h, A* dx) const {
    const A* const top = grad + (h + R - kFirst) / 2 * ld;
    for (int64_t q = 0; q < Wo; q += L) {
      V acc[2] = {};
#pragma GCC unroll 7
      for (int i = kFirst; i < K; i += 2)
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j) {
          const int p = (j + R) % 2;  // column 2 q + p takes tap j from column q + (p + R - j) / 2
          acc[p] += set1(taps[i * K + j]) * load(top - (i - kFirst) / 2 * ld + q + (p + R - j) / 2);
        }
      zip<A>(acc[0], acc[1]);
      const int64_t rest = W - 2 * q;
      if (rest >= 2 * L) {
        store(dx + 2 * q, acc[0]);
        store(dx + 2 * q + L, acc[1]);
      } else {
        store_n(dx + 2 * q, acc[0], rest);
        store_n(dx + 2 * q + L, acc[1], rest - L);
      }
    }
  }
};

}  // namespace GHOST_ISA
}  // namespace ghost
