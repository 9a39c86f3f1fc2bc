// Activations and their derivatives on vectors. NaN goes through every one of them, as in PyTorch.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/problem.h"
#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

// exp in the compute type. float32: range reduction to |r| <= ln2/2 and a degree-6 Taylor
// polynomial, 2 ulp; the result saturates to 0 and +Inf like expf, NaN in gives NaN out. float64
// exists for gradcheck and takes the C library's.
GHOST_INLINE VecF exp_v(VecF x) {
  const VecF c = at_least(at_most(x, 88.8f), -103.9f);
  const VecF magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const VecF t = c * 1.44269504088896341f + magic;
  const VecF n = t - magic;
  const VecF r = c - n * 0.693145751953125f - n * 1.42860682030941723212e-6f;
  VecF p = r * 1.388888888888889e-3f + 8.333333333333333e-3f;
  p = p * r + 4.1666666666666664e-2f;
  p = p * r + 1.6666666666666666e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)p, (__m512)n);
#else
  // 2^n in two factors, so that results in the subnormal range and just below overflow stay exact.
  const VecI32 k = (VecI32)t - (VecI32)magic;
  const VecI32 k1 = k >> 1, k2 = k - k1;
  return p * (VecF)((k1 + 127) << 23) * (VecF)((k2 + 127) << 23);
#endif
}
GHOST_INLINE VecD exp_v(VecD x) {
  VecD r = x;
  for (int l = 0; l < kLanes<double>; ++l) r[l] = std::exp(x[l]);
  return r;
}
template <class V, class F>
GHOST_INLINE V by_lane(V x, F f) {
  V r = x;
  for (size_t l = 0; l < sizeof(V) / sizeof(x[0]); ++l) r[l] = f(x[l]);
  return r;
}
template <class V>
GHOST_INLINE V erf_v(V x) {
  return by_lane(x, [](auto v) { return std::erf(v); });
}
template <class V>
GHOST_INLINE V tanh_v(V x) {
  return by_lane(x, [](auto v) { return std::tanh(v); });
}

template <class A>
GHOST_INLINE Vec<A> sigmoid(Vec<A> x) {
  return A(1) / (A(1) + exp_v(-x));
}

template <class A>
GHOST_INLINE Vec<A> clamp6(Vec<A> x) {
  return at_most(relu(x), A(6));
}

// x * sigmoid(x).
GHOST_INLINE VecD silu(VecD x) {
  return x / (1.0 + exp_v(-x));
}
GHOST_INLINE VecF silu(VecF x) {
#if defined(__AVX512F__)
  // A division costs as much as the whole exponential: take the 14-bit reciprocal and one Newton
  // step (28 bits). The clamp keeps the reciprocal normal; what it changes is below 4e-36. -Inf /
  // Inf is NaN, as in torch.
  const VecF d = 1.0f + exp_v(at_most(-x, 86.0f));
  const VecF r = (VecF)_mm512_maskz_rcp14_ps((__mmask16)-1, (__m512)d);
  const VecF s = x * (r * (2.0f - d * r));
  return x == -__builtin_inff() ? set1(__builtin_nanf("")) : s;
#else
  return x / (1.0f + exp_v(-x));
#endif
}

inline constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
inline constexpr double kGeluTanhScale = 0.79788456080286535588, kGeluTanhCubic = 0.044715;

template <Act kAct, class A>
GHOST_INLINE Vec<A> activate(Vec<A> x, A slope) {
  if constexpr (kAct == Act::kReLU) return relu(x);
  if constexpr (kAct == Act::kReLU6) return clamp6<A>(x);
  if constexpr (kAct == Act::kLeakyReLU) return x > A(0) ? x : x * slope;
  if constexpr (kAct == Act::kSiLU) return silu(x);
  if constexpr (kAct == Act::kHardswish) return x * clamp6<A>(x + A(3)) / A(6);
  if constexpr (kAct == Act::kGELU) return x * A(0.5) * (A(1) + erf_v(x * A(kSqrtHalf)));
  if constexpr (kAct == Act::kGELUTanh)
    return x * A(0.5) * (A(1) + tanh_v(A(kGeluTanhScale) * (x + A(kGeluTanhCubic) * x * x * x)));
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
    const V s = sigmoid<A>(x);
    return g * s * (A(1) + x * (A(1) - s));
  }
  if constexpr (kAct == Act::kHardswish)
    return x <= set1(A(-3)) ? zero : x >= set1(A(3)) ? g : g * (x / A(3) + A(0.5));
  if constexpr (kAct == Act::kGELU)
    return g * (A(0.5) * (A(1) + erf_v(x * A(kSqrtHalf))) +
                x * exp_v(x * x * A(-0.5)) * A(kInvSqrt2Pi));
  if constexpr (kAct == Act::kGELUTanh) {
    const V inner = A(kGeluTanhScale) * (x + A(kGeluTanhCubic) * x * x * x);
    const V t = tanh_v(inner);
    const V d_inner = A(kGeluTanhScale) * (A(1) + A(3 * kGeluTanhCubic) * x * x);
    return g * (A(0.5) * (A(1) + t) + A(0.5) * x * (A(1) - t * t) * d_inner);
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
    case Act::kPReLU:  // the caller gives every channel its slope
      GHOST_ACT(Act::kLeakyReLU)
  }
#undef GHOST_ACT
}

}  // namespace GHOST_ISA
}  // namespace ghost
