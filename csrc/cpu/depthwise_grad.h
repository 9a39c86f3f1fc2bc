// Both gradients of a depthwise convolution in one pass over x and grad, NCHW.
//
// An item is a channel with all its images, so that dw is summed in one fixed order. Of a plane,
// grad is copied once into rows with borders of zeros, and x into such rows too, for stride 2 taken
// apart into even and odd columns. Then, with pixels along the lanes:
//   dw: a vector of grad meets one vector of x for each tap; k * k sums stay in registers for k <=
//   3 dx: for stride 2 the even and the odd columns are two small stencils of grad with every other
//       tap, woven together as they are stored; for stride 1 the stencil with its taps reversed
// Binding resource: load ports.
#pragma once

#include <algorithm>

#include "cpu/depthwise_conv.h"

namespace ghost {
namespace GHOST_ISA {

template <class T, int K>
class DepthwiseGrad {
  using A = ComputeOf<T>;
  using V = Vec<A>;
  static constexpr int R = K / 2, L = kLanes<A>;
  static constexpr int64_t kBorder = 16;
  const DepthwiseGradArgs& a;
  const int64_t s, columns, ld;  // columns of x that a tap sees side by side, and row length
  A *even, *odd, *grad, *line;   // odd is even for stride 1
  A* weave;                      // two rows of dx, even and odd columns

  static int64_t row_elements(const DepthwiseGradArgs& a) {
    return round_up((a.width + a.stride - 1) / a.stride, L) + 2 * kBorder;
  }

 public:
  explicit DepthwiseGrad(const DepthwiseGradArgs& args)
      : a(args), s(args.stride), columns((args.width + s - 1) / s), ld(row_elements(args)) {
    const int64_t x_rows = a.height * ld, g_rows = a.out_height * ld;
    const int64_t total = s * x_rows + g_rows + 3 * a.width + 4 * ld + 256;
    even = static_cast<A*>(thread_scratch(size_t(total) * sizeof(A)));
    odd = even + (s - 1) * x_rows;
    grad = odd + x_rows;
    line = grad + g_rows;
    weave = line + a.width + 64;
    std::fill(even, line, A(0));  // the borders stay zero from plane to plane
  }

  void run(int64_t c) const {
    const int64_t P = a.height * a.width, Po = a.out_height * a.out_width;
    const A* const weight = static_cast<const A*>(a.weight) + c * K * K;
    V sums[K * K] = {};
    for (int64_t n = 0; n < a.batch; ++n) {
      const int64_t plane = n * a.channels + c;
      const T* const g = static_cast<const T*>(a.grad) + plane * Po;
      for (int64_t h = 0; h < a.out_height; ++h)
        read_row(g + h * a.out_width, grad + h * ld + kBorder, a.out_width);
      const T* const x = static_cast<const T*>(a.x) + plane * P;
      for (int64_t h = 0; h < a.height; ++h) split(x + h * a.width, h);
      for (int i = 0; i < K; ++i) weight_row(i, sums + i * K);
      if (a.dx != nullptr) input(weight, static_cast<T*>(a.dx) + plane * P);
    }
    A* const dw = static_cast<A*>(a.dw) + c * K * K;
    for (int t = 0; t < K * K; ++t) dw[t] = reduce_add<A>(sums[t]);
  }

 private:
  void split(const T* x, int64_t r) const {
    if (s == 1) return read_row(x, even + r * ld + kBorder, a.width);
    const A* src = line;
    if constexpr (sizeof(T) == sizeof(A))
      src = reinterpret_cast<const A*>(x);
    else
      read_row(x, line, a.width);
    A *e = even + r * ld + kBorder, *o = odd + r * ld + kBorder;
    const int64_t pairs = a.width / 2;
    for (int64_t w = 0; w < pairs; ++w) {
      e[w] = src[2 * w];
      o[w] = src[2 * w + 1];
    }
    if (a.width % 2) e[pairs] = src[a.width - 1];
  }

  // Sums of the taps of kernel row i.
  void weight_row(int i, V* sums) const {
    V acc[K];
#pragma GCC unroll 7
    for (int j = 0; j < K; ++j) acc[j] = sums[j];
    // Output rows whose row of x, h * s + i - R, is inside the image.
    const int64_t h0 = i >= R ? 0 : (R - i + s - 1) / s;
    const int64_t room = a.height - 1 + R - i;
    const int64_t h1 = room < 0 ? 0 : std::min(a.out_height, room / s + 1);
    for (int64_t h = h0; h < h1; ++h) {
      const int64_t row = (h * s + i - R) * ld + kBorder;
      const A* const g = grad + h * ld + kBorder;
      for (int64_t w = 0; w < a.out_width; w += L) {
        const V gv = load(g + w);  // zeros past the row's end
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j) {
          const A* p;
          if (s == 1)
            p = even + row + w + j - R;
          else
            p = ((j + R) % 2 == 0 ? even + (j - R) / 2 : odd + (j - R - 1) / 2) + row + w;
          acc[j] += gv * load(p);
        }
      }
    }
#pragma GCC unroll 7
    for (int j = 0; j < K; ++j) sums[j] = acc[j];
  }

  void input(const A* weight, T* dx) const {
    for (int64_t h = 0; h < a.height; ++h) {
      A* const first = weave;
      A* const second = weave + ld;
      for (int64_t q = 0; q < columns; q += L) {
        V acc[2] = {};
        // Kernel rows that reach row h from a row of grad.
        for (int i = int((h + R) % s); i < K; i += int(s)) {
          const int64_t r = (h + R - i) / s;
          if (h + R < i || r >= a.out_height) continue;
          const A* const g = grad + r * ld + kBorder + q;
          const A* const t = weight + i * K;
          if (s == 1) {
#pragma GCC unroll 7
            for (int j = 0; j < K; ++j) acc[0] += set1(t[j]) * load(g + R - j);
          } else {
            // Column 2 q + p takes tap j from column q + (p + R - j) / 2 of grad.
#pragma GCC unroll 7
            for (int j = 0; j < K; ++j) {
              const int p = (j + R) % 2;
              acc[p] += set1(t[j]) * load(g + (p + R - j) / 2);
            }
          }
        }
        store(first + q, acc[0]);
        store(second + q, acc[1]);
      }
      T* const out = dx + h * a.width;
      if (s == 1) {
        write_row(first, out, a.width);
        continue;
      }
      A* const row = sizeof(T) == sizeof(A) ? reinterpret_cast<A*>(out) : line;
      const int64_t pairs = a.width / 2;
      for (int64_t w = 0; w < pairs; ++w) {
        row[2 * w] = first[w];
        row[2 * w + 1] = second[w];
      }
      if (a.width % 2) row[a.width - 1] = first[pairs];
      if (sizeof(T) != sizeof(A)) write_row(row, out, a.width);
    }
  }
};

template <class T, int K>
void depthwise_grad_channels(const DepthwiseGradArgs& a, int64_t begin, int64_t end) {
  const DepthwiseGrad<T, K> gradient(a);
  for (int64_t c = begin; c < end; ++c) gradient.run(c);
}

template <class T>
void depthwise_grad(const DepthwiseGradArgs& a, int64_t begin, int64_t end) {
  switch (a.kernel) {
    case 1:
      return depthwise_grad_channels<T, 1>(a, begin, end);
    case 3:
      return depthwise_grad_channels<T, 3>(a, begin, end);
    case 5:
      return depthwise_grad_channels<T, 5>(a, begin, end);
    case 7:
      return depthwise_grad_channels<T, 7>(a, begin, end);
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
