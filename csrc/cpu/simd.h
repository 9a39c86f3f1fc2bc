// One vector type for each instruction set, chosen by the flags of the translation unit. Everything
// is in the namespace GHOST_ISA, which each instruction set defines differently: the linker cannot
// take a function built for a newer CPU into the code of an older one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define GHOST_INLINE inline __attribute__((always_inline))

namespace ghost {
namespace GHOST_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;  // SSE2, NEON: the baseline of the compiler
#endif

// Calls f with the one of kValues that equals value, as a std::integral_constant<int>.
template <int... kValues, class F>
GHOST_INLINE void with_constant(int64_t value, F&& f) {
  ((value == kValues ? f(std::integral_constant<int, kValues>{}) : void()), ...);
}

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));

template <class A>
struct Simd;
template <>
struct Simd<float> {
  using V = VecF;
  using I = VecI32;
  using Int = int32_t;
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  using V = VecD;
  using I = VecI64;
  using Int = int64_t;
  static constexpr int kLanes = kVectorBytes / 8;
};
template <class A>
using Vec = typename Simd<A>::V;
template <class A>
inline constexpr int kLanes = Simd<A>::kLanes;

template <class A>
GHOST_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
GHOST_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

GHOST_INLINE VecF set1(float s) {
#if defined(__AVX512F__)
  return (VecF)_mm512_set1_ps(s);
#elif defined(__AVX2__)
  return (VecF)_mm256_set1_ps(s);
#else
  return VecF{s, s, s, s};
#endif
}
GHOST_INLINE VecD set1(double s) {
#if defined(__AVX512F__)
  return (VecD)_mm512_set1_pd(s);
#elif defined(__AVX2__)
  return (VecD)_mm256_set1_pd(s);
#else
  return VecD{s, s};
#endif
}

// Lane masks: mask registers of AVX-512, vectors of all-ones and all-zeros of AVX2, else the bounds
// of the lanes. lane_range(lo, hi) selects lanes lo <= l < hi.
#if defined(__AVX512F__)
template <class A>
struct MaskT {
  uint32_t bits;
};
template <class A>
GHOST_INLINE MaskT<A> lane_range(int64_t lo, int64_t hi) {
  constexpr int n = kLanes<A>;
  lo = lo < 0 ? 0 : lo > n ? n : lo;
  hi = hi < 0 ? 0 : hi > n ? n : hi;
  const uint32_t up_to_hi = hi >= 32 ? ~0u : (1u << hi) - 1u, up_to_lo = (1u << lo) - 1u;
  return {up_to_hi & ~up_to_lo};
}
GHOST_INLINE VecF load_masked(const float* p, MaskT<float> m) {
  return (VecF)_mm512_maskz_loadu_ps((__mmask16)m.bits, p);
}
GHOST_INLINE VecD load_masked(const double* p, MaskT<double> m) {
  return (VecD)_mm512_maskz_loadu_pd((__mmask8)m.bits, p);
}
GHOST_INLINE void store_masked(float* p, VecF v, MaskT<float> m) {
  _mm512_mask_storeu_ps(p, (__mmask16)m.bits, (__m512)v);
}
GHOST_INLINE void store_masked(double* p, VecD v, MaskT<double> m) {
  _mm512_mask_storeu_pd(p, (__mmask8)m.bits, (__m512d)v);
}
#elif defined(__AVX2__)
template <class A>
struct MaskT {
  typename Simd<A>::I bits;
};
template <class A>
GHOST_INLINE MaskT<A> lane_range(int64_t lo, int64_t hi) {
  constexpr int n = kLanes<A>;
  using Int = typename Simd<A>::Int;
  typename Simd<A>::I lane;
#pragma GCC unroll 8
  for (int l = 0; l < n; ++l) lane[l] = l;
  const Int from = Int(lo < 0 ? 0 : lo > n ? n : lo), to = Int(hi < 0 ? 0 : hi > n ? n : hi);
  return {(lane >= from) & (lane < to)};
}
GHOST_INLINE VecF load_masked(const float* p, MaskT<float> m) {
  return (VecF)_mm256_maskload_ps(p, (__m256i)m.bits);
}
GHOST_INLINE VecD load_masked(const double* p, MaskT<double> m) {
  return (VecD)_mm256_maskload_pd(p, (__m256i)m.bits);
}
GHOST_INLINE void store_masked(float* p, VecF v, MaskT<float> m) {
  _mm256_maskstore_ps(p, (__m256i)m.bits, (__m256)v);
}
GHOST_INLINE void store_masked(double* p, VecD v, MaskT<double> m) {
  _mm256_maskstore_pd(p, (__m256i)m.bits, (__m256d)v);
}
#else
template <class A>
struct MaskT {
  int lo, hi;
};
template <class A>
GHOST_INLINE MaskT<A> lane_range(int64_t lo, int64_t hi) {
  constexpr int n = kLanes<A>;
  return {lo < 0 ? 0 : lo > n ? n : int(lo), hi < 0 ? 0 : hi > n ? n : int(hi)};
}
template <class A>
GHOST_INLINE Vec<A> load_masked(const A* p, MaskT<A> m) {
  if (m.lo == 0 && m.hi == kLanes<A>) return load(p);
  Vec<A> v{};
  for (int l = m.lo; l < m.hi; ++l) v[l] = p[l];
  return v;
}
template <class A>
GHOST_INLINE void store_masked(A* p, Vec<A> v, MaskT<A> m) {
  for (int l = m.lo; l < m.hi; ++l) p[l] = v[l];
}
#endif
// The first n lanes. Other lanes are loaded as zero, and their memory is neither read nor written.
template <class A>
GHOST_INLINE Vec<A> load_n(const A* p, int64_t n) {
  return load_masked(p, lane_range<A>(0, n));
}
template <class A>
GHOST_INLINE void store_n(A* p, Vec<A> v, int64_t n) {
  store_masked(p, v, lane_range<A>(0, n));
}

// Makes the compiler hold v in a register. Otherwise it may load the value for each use, and load
// ports are scarce.
template <class V>
GHOST_INLINE void keep(V& v) {
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// Non-temporal store of an aligned vector: the cache line is written to memory without a read.
template <class A>
GHOST_INLINE void store_stream(A* p, Vec<A> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#else
  store(p, v);
#endif
}
GHOST_INLINE void stream_fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// max(v, 0) that keeps NaN, as torch.relu does: MAXPS returns its second operand if either is NaN.
// The maskz form is the same instruction, without GCC's warning about an undefined pass-through
// operand.
GHOST_INLINE VecF relu(VecF v) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_max_ps((__mmask16)-1, _mm512_setzero_ps(), (__m512)v);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v);
#else
  return v < 0.0f ? VecF{} : v;
#endif
}
GHOST_INLINE VecD relu(VecD v) {
#if defined(__AVX512F__)
  return (VecD)_mm512_maskz_max_pd((__mmask8)-1, _mm512_setzero_pd(), (__m512d)v);
#elif defined(__AVX2__)
  return (VecD)_mm256_max_pd(_mm256_setzero_pd(), (__m256d)v);
#else
  return v < 0.0 ? VecD{} : v;
#endif
}

// max(v, lo) and min(v, hi) that keep NaN, in the same way.
GHOST_INLINE VecF at_least(VecF v, float lo) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_max_ps((__mmask16)-1, (__m512)set1(lo), (__m512)v);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)set1(lo), (__m256)v);
#else
  return v < lo ? set1(lo) : v;
#endif
}
GHOST_INLINE VecF at_most(VecF v, float hi) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_min_ps((__mmask16)-1, (__m512)set1(hi), (__m512)v);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)set1(hi), (__m256)v);
#else
  return v > hi ? set1(hi) : v;
#endif
}
GHOST_INLINE VecD at_most(VecD v, double hi) {
  return v > hi ? set1(hi) : v;
}

// Sum of all lanes in a fixed order: pairwise halves.
template <class A>
GHOST_INLINE A reduce_add(Vec<A> v) {
  A t[kLanes<A>];
  store(t, v);
#pragma GCC unroll 4
  for (int w = kLanes<A> / 2; w > 0; w /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < w; ++i) t[i] += t[i + w];
  return t[0];
}

}  // namespace GHOST_ISA
}  // namespace ghost
