// Parameters in the form that the kernels read. A few thousand numbers, once a call or less: plain
// loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/problem.h"

namespace ghost {

// w [rows][cols], row stride ld, column stride `step` -> out [ceil(rows / kPanel)][cols][kPanel],
// padded with zeros; row i times scale[i], scale null: 1.
template <class A, class T>
void pack_panels(const T* w, int64_t rows, int64_t cols, int64_t ld, int64_t step, const A* scale,
                 A* out) {
  for (int64_t p = 0; p < rows; p += kPanel)
    for (int64_t k = 0; k < cols; ++k)
      for (int64_t i = 0; i < kPanel; ++i, ++out)
        *out = p + i < rows ? A(w[(p + i) * ld + k * step]) * (scale ? scale[p + i] : A(1)) : A(0);
}

// w [rows][cols], values of bfloat16, cols even -> out [ceil(rows / kPanel)][cols / 2][kPanel][2],
// padded with zeros: the upper halves of the float32 values.
inline void pack_pairs(const float* w, int64_t rows, int64_t cols, uint16_t* out) {
  for (int64_t p = 0; p < rows; p += kPanel)
    for (int64_t k = 0; k < cols; k += 2)
      for (int64_t i = 0; i < 2 * kPanel; ++i, ++out) {
        uint32_t bits = 0;
        if (p + i / 2 < rows) std::memcpy(&bits, w + (p + i / 2) * cols + k + i % 2, sizeof bits);
        *out = uint16_t(bits >> 16);
      }
}

// scale = gamma / sqrt(var + eps), shift = beta - mean * scale; all [n]. A null gamma is 1, a null
// beta or mean 0; without var nothing is divided.
template <class A>
void fold_norm(const A* gamma, const A* beta, const A* mean, const A* var, double eps, int64_t n,
               A* scale, A* shift) {
  for (int64_t i = 0; i < n; ++i) {
    const double s =
        (gamma ? double(gamma[i]) : 1.0) * (var ? 1.0 / std::sqrt(double(var[i]) + eps) : 1.0);
    scale[i] = A(s);
    shift[i] = A((beta ? double(beta[i]) : 0.0) - (mean ? double(mean[i]) * s : 0.0));
  }
}

// packed: scale [n] = 1 and shift [n] = 0, the affine map of a PackedLayout without primary
// convolution.
template <class A>
void identity_affine(int64_t n, A* packed) {
  for (int64_t i = 0; i < n; ++i) {
    packed[i] = A(1);
    packed[n + i] = A(0);
  }
}

// w [g][taps] -> out [g][taps], the taps of map i times scale[i].
template <class A>
void scale_taps(const A* w, int64_t g, int64_t taps, const A* scale, A* out) {
  for (int64_t i = 0; i < g * taps; ++i) out[i] = w[i] * scale[i / taps];
}

// w [g][taps] -> out [taps][g].
template <class A>
void transpose_taps(const A* w, int64_t g, int64_t taps, A* out) {
  for (int64_t i = 0; i < g * taps; ++i) out[i % taps * g + i / taps] = w[i];
}

// running = (1 - momentum) * running + momentum * factor * stat, all [n]; factor: count / (count -
// 1) for a variance, which stat has biased; else 1.
template <class A>
void blend_running(A* running, const A* stat, int64_t n, double momentum, double factor) {
  for (int64_t i = 0; i < n; ++i)
    running[i] = A((1.0 - momentum) * double(running[i]) + momentum * factor * double(stat[i]));
}

}  // namespace ghost
