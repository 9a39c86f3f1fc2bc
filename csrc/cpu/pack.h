// Packs parameters into the form that the kernels read. At most once per call, a few thousand
// numbers: plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "core/problem.h"
#include "cpu/kernels.h"

namespace ghost {

// w [rows][cols] (row stride ld, column stride step) -> panels [ceil(rows/kPanel)][cols][kPanel],
// zero padded, rows scaled.
template <class A, class T>
void pack_panels(const T* w, int64_t rows, int64_t cols, int64_t ld, int64_t step, const A* scale,
                 A* out) {
  for (int64_t p = 0; p < rows; p += kPanel)
    for (int64_t k = 0; k < cols; ++k)
      for (int64_t i = 0; i < kPanel; ++i, ++out)
        *out = p + i < rows ? A(w[(p + i) * ld + k * step]) * (scale ? scale[p + i] : A(1)) : A(0);
}

// w [rows][cols] with an even number of columns -> [ceil(rows/kPanel)][cols/2][kPanel][2], zero
// padded, the upper halves of float32: bfloat16 weights as they are.
inline void pack_pairs(const float* w, int64_t rows, int64_t cols, uint16_t* out) {
  for (int64_t p = 0; p < rows; p += kPanel)
    for (int64_t k = 0; k < cols; k += 2)
      for (int64_t i = 0; i < 2 * kPanel; ++i, ++out) {
        uint32_t bits = 0;
        if (p + i / 2 < rows) std::memcpy(&bits, w + (p + i / 2) * cols + k + i % 2, sizeof bits);
        *out = uint16_t(bits >> 16);
      }
}

// One norm as an affine map of n channels; null gamma, beta or mean stand for 1, 0 and 0, null var
// for no division:
//   scale = gamma / sqrt(var + eps)
//   shift = beta - mean * scale
template <class A>
struct FoldedNorm {
  std::vector<A> scale, shift;

  FoldedNorm(const NormArgs& norm, int64_t n) : scale(size_t(n)), shift(size_t(n)) {
    const auto value = [](const void* values, size_t i, double otherwise) {
      return values ? double(static_cast<const A*>(values)[i]) : otherwise;
    };
    for (size_t i = 0; i < size_t(n); ++i) {
      const double s = value(norm.gamma, i, 1.0) *
                       (norm.var ? 1.0 / std::sqrt(value(norm.var, i, 0.0) + norm.eps) : 1.0);
      scale[i] = A(s);
      shift[i] = A(value(norm.beta, i, 0.0) - (norm.mean ? value(norm.mean, i, 0.0) * s : 0.0));
    }
  }
};

// Packed parameters of an affine map without primary convolution that changes nothing.
template <class A>
void pack_identity(int64_t n, A* packed) {
  std::fill(std::fill_n(packed, n, A(1)), packed + 2 * n, A(0));
}

// Packed parameters of a 1x1 convolution without norm; w as in pack_panels.
template <class A>
void pack_conv(const A* w, int64_t rows, int64_t cols, int64_t ld, int64_t step, A* packed) {
  const PackedLayout at(cols, rows, 0, 1, true);
  pack_panels<A>(w, rows, cols, ld, step, static_cast<const A*>(nullptr), packed + at.w1);
  std::fill(packed + at.shift1, packed + at.numel, A(0));
}

// w [g][taps] -> out: the taps of every map times its scale.
template <class A>
void scale_taps(const A* w, int64_t g, int64_t taps, const A* scale, A* out) {
  for (int64_t i = 0; i < g * taps; ++i) out[i] = w[i] * scale[i / taps];
}

// w [g][taps] -> out [taps][g].
template <class A>
void transpose_taps(const A* w, int64_t g, int64_t taps, A* out) {
  for (int64_t i = 0; i < g * taps; ++i) out[i % taps * g + i / taps] = w[i];
}

// The parameters of one Ghost module in the compute type.
struct PackArgs {
  const void* w1;  // [m, C], or null: no primary convolution
  const void* w2;  // [g, taps]
  NormArgs norm1, norm2;
  int64_t channels, intrinsic, ghosts, taps;
};

// Fills the layout, and the slopes behind it. The layout has pairs if at.pairs > 0.
template <class A>
void pack_ghost(const PackArgs& a, const PackedLayout& at, A* packed) {
  const int64_t m = a.intrinsic, C = a.channels, g = a.ghosts;
  const A* const w1 = static_cast<const A*>(a.w1);
  const FoldedNorm<A> norm1(a.norm1, m), norm2(a.norm2, g);
  if (w1) {
    pack_panels<A>(w1, m, C, C, 1, norm1.scale.data(), packed + at.w1);
    std::fill(packed + at.shift1, packed + at.w2, A(0));
  } else {
    std::copy(norm1.scale.begin(), norm1.scale.end(), packed + at.scale1);
  }
  std::copy(norm1.shift.begin(), norm1.shift.end(), packed + at.shift1);
  scale_taps(static_cast<const A*>(a.w2), g, a.taps, norm2.scale.data(), packed + at.w2);
  transpose_taps(packed + at.w2, g, a.taps, packed + at.lane_taps);
  std::copy(norm2.shift.begin(), norm2.shift.end(), packed + at.shift2);
  if constexpr (std::is_same_v<A, float>) {
    if (at.pairs > 0) {
      std::fill(packed + at.lane_taps + g * a.taps, packed + at.pairs, A(0));
      pack_pairs(w1, m, C, reinterpret_cast<uint16_t*>(packed + at.pairs));
      A* const end = std::copy(norm1.scale.begin(), norm1.scale.end(), packed + at.pair_scale);
      std::fill(end, packed + at.numel, A(0));
    }
  }
  A* end = packed + at.numel;
  if (a.norm1.slopes) end = std::copy_n(static_cast<const A*>(a.norm1.slopes), m, end);
  if (a.norm2.slopes) std::copy_n(static_cast<const A*>(a.norm2.slopes), g, end);
}

// running = (1 - momentum) * running + momentum * factor * stat; factor makes a variance unbiased.
template <class A>
void blend_running(A* running, const A* stat, int64_t n, double momentum, double factor) {
  for (int64_t i = 0; i < n; ++i)
    running[i] = A((1.0 - momentum) * double(running[i]) + momentum * factor * double(stat[i]));
}
// The factor of a variance over `count` values.
inline double unbiased(int64_t count) {
  return count > 1 ? double(count) / double(count - 1) : 1.0;
}

}  // namespace ghost
