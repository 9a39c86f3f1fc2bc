// Activations and their derivatives on vectors. A NaN stays a NaN, as in PyTorch.
//
//   y = act(x)        dx = act'(x) * dy
//
// Tile map: one vector, or a row of them; no state. Binding resource: FMA ports, for activations
// with an exponential also the divider.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/problem.h"
#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

// The exponential of float32; float64, which exists for gradcheck, uses the C library.
//
//   e^y = 2^n e^r      n = round(y / ln2), |r| <= ln2/2
//
// t = kRound + n holds n in its low bits; shifted into the exponent they are 2^(n-1): zero at the
// smallest n, -126, and Inf at the largest, 129. The polynomials are 2 e^r for |r| <= ln2/2 and
// 2 * 2^f for |f| <= 1/2, within 1.1 ulp. The factor 2 makes n = 128 representable.
inline constexpr float kRound = 12582912.0f + 126.0f;  // adding 1.5 * 2^23 rounds to an integer
GHOST_INLINE VecF half_pow2(VecF t) {
  return (VecF)((VecI32)t << 23);
}

// e^-x, 2 ulp; zero for x > 87, Inf for x < -88.73.
GHOST_INLINE VecF exp_neg(VecF x) {
  const VecF c = at_most(at_least(x, -89.0f), 87.5f);
  const VecF t = c * -1.44269504088896341f + kRound, n = t - kRound;
  const VecF r = -c - n * 0.693145751953125f - n * 1.42860682030941723212e-6f;
  VecF p = r * 0.0165246949f + 0.0837970227f;
  p = p * r + 0.333363533f;
  p = p * r + 0.999982893f;
  p = p * r + 1.99999893f;
  p = p * r + 2.0f;
  return p * half_pow2(t);
}
GHOST_INLINE VecD exp_neg(VecD x) {
  VecD r = x;
  for (int l = 0; l < kLanes<double>; ++l) r[l] = std::exp(-x[l]);
  return r;
}
// 2^(m k) for round = kRound, n = -126 .. 129; half of that for round = kRound - 1, where n is one
// more.
GHOST_INLINE VecF exp2_product(VecF m, VecF k, float round) {
  const VecF t = m * k + round, f = m * k - (t - round);
  VecF p = f * 0.00264488766f + 0.0193434563f;
  p = p * f + 0.111017928f;
  p = p * f + 0.480444759f;
  p = p * f + 1.38629365f;
  p = p * f + 2.0f;
  return p * half_pow2(t);
}

template <class A>
GHOST_INLINE Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exp_neg(x));
}

template <class A>
GHOST_INLINE Vec<A> clamp6(Vec<A> x) {
  return at_most(relu(x), A(6));
}

inline constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
inline constexpr double kLog2E = 1.44269504088896340736;
// GELU's tanh approximation is x sigmoid(u) with u = kGeluTanhScale * (x + kGeluTanhCubic x^3).
inline constexpr double kGeluTanhScale = 1.59576912160573071176, kGeluTanhCubic = 0.044715;

// e^-u. At the two clamps n is 129 and -126.
GHOST_INLINE VecF gelu_tanh_exp(VecF x) {
  constexpr float k1 = -kLog2E * kGeluTanhScale, k3 = k1 * kGeluTanhCubic;
  const VecF c = at_most(at_least(x, -10.08f), 10.0f);
  return exp2_product(c, c * c * k3 + k1, kRound);
}
GHOST_INLINE VecD gelu_tanh_exp(VecD x) {
  return exp_neg(kGeluTanhScale * (x + kGeluTanhCubic * x * x * x));
}

GHOST_INLINE VecF minus_abs(VecF x) {
  return (VecF)((VecI32)x | INT32_MIN);
}
GHOST_INLINE VecD minus_abs(VecD x) {
  return (VecD)((VecI64)x | INT64_MIN);
}
// F(x) from F(-|x|) for an F with F(x) = 1 - F(-x): the small values of F lose no digits.
template <class A>
GHOST_INLINE Vec<A> from_lower_half(Vec<A> x, Vec<A> lower) {
  return (typename Simd<A>::I)x < 0 ? lower : A(1) - lower;
}

// F of the normal distribution: F(m) = 2^(m k(m)) / 2 for m <= 0. The fit of k has an error of F of
// at most 1e-8 down to m = -5.6; from there F falls to zero at -9.94.
GHOST_INLINE VecF normal_cdf(VecF x) {
  const VecF m = at_least(minus_abs(x), -9.94f);
  VecF k = m * -2.84151838e-6f - 3.94581548e-5f;
  k = k * m - 1.86570178e-4f;
  k = k * m + 1.35972383e-4f;
  k = k * m + 7.06212455e-3f;
  k = k * m + 5.24952486e-2f;
  k = k * m - 0.459208518f;
  k = k * m + 1.15110517f;
  return from_lower_half<float>(x, exp2_product(m, k, kRound - 1.0f));
}
GHOST_INLINE VecD normal_cdf(VecD x) {
  VecD r = x;
  for (int l = 0; l < kLanes<double>; ++l) r[l] = 0.5 * std::erfc(-kSqrtHalf * x[l]);
  return r;
}

template <Act kAct, class A>
GHOST_INLINE Vec<A> activate(Vec<A> x, A slope) {
  if constexpr (kAct == Act::kReLU) return relu(x);
  if constexpr (kAct == Act::kReLU6) return clamp6<A>(x);
  if constexpr (kAct == Act::kLeakyReLU) return x > A(0) ? x : x * slope;
  if constexpr (kAct == Act::kSiLU) return x / (A(1) + exp_neg(x));
  if constexpr (kAct == Act::kHardswish) return x * clamp6<A>(x + A(3)) / A(6);
  if constexpr (kAct == Act::kGELU) return x * normal_cdf(x);
  if constexpr (kAct == Act::kGELUTanh) return x / (A(1) + gelu_tanh_exp(x));
  return x;
}

// d act(x) / dx, times g.
template <Act kAct, class A>
GHOST_INLINE Vec<A> activate_grad(Vec<A> x, Vec<A> g, A slope) {
  using V = Vec<A>;
  const V zero{};
  if constexpr (kAct == Act::kReLU) return x <= zero ? zero : g;
  if constexpr (kAct == Act::kReLU6) return x <= zero ? zero : x >= set1(A(6)) ? zero : g;
  if constexpr (kAct == Act::kLeakyReLU) return x > zero ? g : g * slope;
  if constexpr (kAct == Act::kSiLU) {
    const V q = sigmoid<A>(minus_abs(x));
    return g * (from_lower_half<A>(x, q) + x * (q * (A(1) - q)));
  }
  if constexpr (kAct == Act::kHardswish)
    return x <= set1(A(-3)) ? zero : x >= set1(A(3)) ? g : g * (x / A(3) + A(0.5));
  if constexpr (kAct == Act::kGELU)
    return g * (normal_cdf(x) + x * exp_neg(x * x * A(0.5)) * A(kInvSqrt2Pi));
  if constexpr (kAct == Act::kGELUTanh) {
    const V q = A(1) / (A(1) + gelu_tanh_exp(minus_abs(x)));
    const V du = A(kGeluTanhScale) + A(3 * kGeluTanhCubic * kGeluTanhScale) * x * x;
    return g * (from_lower_half<A>(x, q) + x * (q * (A(1) - q)) * du);
  }
  return g;
}

// Calls f with the run-time code as a compile-time constant (a std::integral_constant).
template <class F>
GHOST_INLINE void with_activation(Act act, F&& f) {
#define GHOST_ACT(A) \
  case A:            \
    return f(std::integral_constant<Act, A>{});
  switch (act) {
    GHOST_ACT(Act::kNone)
    GHOST_ACT(Act::kReLU)
    GHOST_ACT(Act::kReLU6)
    GHOST_ACT(Act::kSiLU)
    GHOST_ACT(Act::kHardswish)
    GHOST_ACT(Act::kGELU)
    GHOST_ACT(Act::kGELUTanh)
    case Act::kPReLU:  // LeakyReLU with the slope of the channel
      GHOST_ACT(Act::kLeakyReLU)
  }
#undef GHOST_ACT
}

// row [n] = act(row).
template <class A>
__attribute__((noinline)) void activate_row(const Activation& a, A* row, int64_t n) {
  constexpr int L = kLanes<A>;
  with_activation(a.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    if constexpr (kAct == Act::kNone) return;
    for (int64_t i = 0; i < n; i += L) {
      const Vec<A> v = activate<kAct, A>(load_n(row + i, n - i), A(a.slope));
      store_n(row + i, v, n - i);
    }
  });
}

// The activation of N vectors in registers. Activations with an exponential go through a buffer and
// a function that is not inlined, which keeps the kernels small.
template <class A, int N>
GHOST_INLINE void activate_vectors(const Activation& a, Vec<A>* v) {
  constexpr int L = kLanes<A>;
  if (a.act == Act::kSiLU || a.act == Act::kGELU || a.act == Act::kGELUTanh) {
    A buffer[N * L];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(buffer + i * L, v[i]);
    activate_row(a, buffer, N * L);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) v[i] = load(buffer + i * L);
    return;
  }
  with_activation(a.act, [&](auto act) __attribute__((always_inline)) {
    constexpr Act kAct = decltype(act)::value;
    if constexpr (kAct != Act::kSiLU && kAct != Act::kGELU && kAct != Act::kGELUTanh) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) v[i] = activate<kAct, A>(v[i], A(a.slope));
    }
  });
}

}  // namespace GHOST_ISA
}  // namespace ghost
