// Element types in memory and their vectors in the compute type: float64 for float64, float32 for
// all others. Also the copies of tiles between a layout and channel-major scratch: rows (NCHW), and
// transposed blocks (NHWC).
//
//   read_transposed    dst[c][p] = src[p][c]
//   write_transposed   dst[p][c] = src[c][p] (* gate[p][c]) (+ add[p][c])
//
// Tile map: a block of L x L values, L lanes, is transposed in registers. Binding resource: shuffle
// ports, load and store ports.
#pragma once

#include "cpu/simd.h"

namespace ghost {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace GHOST_ISA {

template <class T>
struct Storage {
  using Compute = T;
  static GHOST_INLINE Vec<T> load(const T* p) { return GHOST_ISA::load(p); }
  static GHOST_INLINE void store(T* p, Vec<T> v) { GHOST_ISA::store(p, v); }
  static GHOST_INLINE Vec<T> load_n(const T* p, int64_t n) { return GHOST_ISA::load_n(p, n); }
  static GHOST_INLINE void store_n(T* p, Vec<T> v, int64_t n) { GHOST_ISA::store_n(p, v, n); }
  static GHOST_INLINE T to_compute(T v) { return v; }
  static GHOST_INLINE T from_compute(T v) { return v; }
};

inline constexpr int kHalfVectorBytes = kVectorBytes / 2;
typedef uint16_t VecU16 __attribute__((vector_size(kHalfVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));

// One instruction; GCC 12 compiles __builtin_convertvector to five.
GHOST_INLINE VecU32 widen_bits(VecU16 h) {
#if defined(__AVX512F__)
  return (VecU32)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (VecU32)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VecU32);
#endif
}
// The values are below 2^16.
GHOST_INLINE VecU16 narrow_bits(VecU32 u) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i v = (__m256i)u;
  return (VecU16)_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
#else
  return __builtin_convertvector(u, VecU16);
#endif
}

struct Widen {
  static GHOST_INLINE VecF apply(VecU16 h, BFloat16) { return (VecF)(widen_bits(h) << 16); }
  static GHOST_INLINE VecF apply(VecU16 h, Float16) {
#if defined(__AVX512F__)
    return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
    return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
    // Shift exponent and mantissa into place, rebias by a multiplication (exact, for subnormals
    // too), correct Inf and NaN.
    const VecU32 u = __builtin_convertvector(h, VecU32);
    const VecU32 sign = (u & 0x8000u) << 16, magnitude = (u & 0x7fffu) << 13;
    VecU32 r = (VecU32)((VecF)magnitude * 0x1p112f);
    const VecU32 special = (VecU32)((u & 0x7c00u) == 0x7c00u);
    r = (r & ~special) | ((magnitude | 0x7f800000u) & special);
    return (VecF)(r | sign);
#endif
  }
};

struct Narrow {
  static GHOST_INLINE VecU16 apply(VecF v, BFloat16) {
    const VecU32 u = (VecU32)v;
    const VecU32 rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;  // to nearest, ties to even
    const VecU32 nan = (VecU32)(v != v);
    return narrow_bits((rounded & ~nan) | (0x7fc0u & nan));
  }
  static GHOST_INLINE VecU16 apply(VecF v, Float16) {
#if defined(__AVX512F__)
    return (VecU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (VecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const VecU32 u = (VecU32)v, sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    // Normal halves are rebiased and rounded as integers; subnormal halves are rounded by an
    // addition.
    const VecU32 normal = (a - 0x38000000u + (0xfffu + ((a >> 13) & 1u))) >> 13;
    const VecU32 subnormal = (VecU32)((VecF)a + 0.5f) - 0x3f000000u;
    const VecU32 small = (VecU32)(a < 0x38800000u), big = (VecU32)(a >= 0x477ff000u);
    const VecU32 nan = (VecU32)(a > 0x7f800000u);
    VecU32 r = (normal & ~small) | (subnormal & small);
    r = (r & ~big) | (0x7c00u & big);
    r = (r & ~nan) | (0x7e00u & nan);
    return __builtin_convertvector(r | sign, VecU16);
#endif
  }
};

template <class H>
struct HalfStorage {
  using Compute = float;
  static GHOST_INLINE VecF load(const H* p) {
    VecU16 h;
    std::memcpy(&h, p, sizeof h);
    return Widen::apply(h, H{});
  }
  static GHOST_INLINE void store(H* p, VecF v) {
    const VecU16 h = Narrow::apply(v, H{});
    std::memcpy(p, &h, sizeof h);
  }
  static GHOST_INLINE VecF load_n(const H* p, int64_t n) {
    H tmp[kLanes<float>] = {};
    if (n > 0) std::memcpy(tmp, p, size_t(n < kLanes<float> ? n : kLanes<float>) * sizeof(H));
    return load(tmp);
  }
  static GHOST_INLINE void store_n(H* p, VecF v, int64_t n) {
    H tmp[kLanes<float>];
    store(tmp, v);
    if (n > 0) std::memcpy(p, tmp, size_t(n < kLanes<float> ? n : kLanes<float>) * sizeof(H));
  }
  static GHOST_INLINE float to_compute(H h) { return load_n(&h, 1)[0]; }
  static GHOST_INLINE H from_compute(float f) {
    H h;
    store_n(&h, set1(f), 1);
    return h;
  }
};
template <>
struct Storage<BFloat16> : HalfStorage<BFloat16> {};
template <>
struct Storage<Float16> : HalfStorage<Float16> {};

template <class T>
using ComputeOf = typename Storage<T>::Compute;

// dst [n] = src [n], converted.
template <class T>
GHOST_INLINE void read_row(const T* src, ComputeOf<T>* dst, int64_t n) {
  constexpr int L = kLanes<ComputeOf<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store(dst + i, Storage<T>::load(src + i));
  if (i < n) store_n(dst + i, Storage<T>::load_n(src + i, n - i), n - i);
}
template <class T>
GHOST_INLINE void write_row(const ComputeOf<T>* src, T* dst, int64_t n) {
  constexpr int L = kLanes<ComputeOf<T>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) Storage<T>::store(dst + i, load(src + i));
  if (i < n) Storage<T>::store_n(dst + i, load_n(src + i, n - i), n - i);
}

// dst [n] = src [n] with non-temporal stores; dst of any alignment.
template <class A>
GHOST_INLINE void stream_row(const A* src, A* dst, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = int64_t((kVectorBytes - reinterpret_cast<uintptr_t>(dst) % kVectorBytes) %
                      kVectorBytes / sizeof(A));
  if (i > n) i = n;
  if (i > 0) store_n(dst, load_n(src, i), i);
  for (; i + L <= n; i += L) store_stream(dst + i, load(src + i));
  if (i < n) store_n(dst + i, load_n(src + i, n - i), n - i);
}

// Swaps the lanes of a whose number has bit s set with the lanes of b whose number has it clear.
template <class A>
GHOST_INLINE void exchange_lanes(Vec<A>& a, Vec<A>& b, int s) {
  constexpr int L = kLanes<A>;
  const Vec<A> x = a, y = b;
#if defined(__clang__)
  for (int l = 0; l < L; ++l) {
    a[l] = (l & s) ? y[l - s] : x[l];
    b[l] = (l & s) ? y[l] : x[l + s];
  }
#else
  typename Simd<A>::I lo, hi;  // lanes of (x, y): L + l means lane l of y
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    lo[l] = (l & s) ? L + l - s : l;
    hi[l] = (l & s) ? L + l : l + s;
  }
  a = __builtin_shuffle(x, y, lo);
  b = __builtin_shuffle(x, y, hi);
#endif
}

// The even lanes of (a, b) into a, the odd ones into b.
template <class A>
GHOST_INLINE void unzip(Vec<A>& a, Vec<A>& b) {
  constexpr int L = kLanes<A>;
  const Vec<A> x = a, y = b;
#if defined(__clang__)
  for (int l = 0; l < L; ++l) {
    a[l] = l < L / 2 ? x[2 * l % L] : y[2 * l % L];
    b[l] = l < L / 2 ? x[2 * l % L + 1] : y[2 * l % L + 1];
  }
#else
  // AVX2: first inside the halves of 16 bytes, then whole pairs of elements, one instruction each.
  constexpr bool kHalves = kVectorBytes == 32;
  constexpr int H = kHalves ? L / 4 : L / 2;  // elements from x, then as many from y
  typename Simd<A>::I even, odd, order;
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) {
    const int half = l / (2 * H) * 2 * H, in_half = l % (2 * H);
    even[l] = in_half < H ? half + 2 * in_half : L + half + 2 * (in_half - H);
    odd[l] = even[l] + 1;
    order[l] = l / H == 1 ? l + H : l / H == 2 ? l - H : l;
  }
  a = __builtin_shuffle(x, y, even);
  b = __builtin_shuffle(x, y, odd);
  if (kHalves) {
    a = __builtin_shuffle(a, order);
    b = __builtin_shuffle(b, order);
  }
#endif
}

// v[lanes[0]], v[lanes[1]], ...
template <class A>
GHOST_INLINE Vec<A> permute(Vec<A> v, typename Simd<A>::I lanes) {
#if defined(__clang__)
  Vec<A> r;
  for (int l = 0; l < kLanes<A>; ++l) r[l] = v[lanes[l]];
  return r;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// Transposes a block of L x L in registers, by log2(L) butterfly steps.
template <class A>
GHOST_INLINE void transpose_registers(Vec<A>* r) {
  constexpr int L = kLanes<A>;
#pragma GCC unroll 4
  for (int s = 1; s < L; s *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (!(i & s)) exchange_lanes<A>(r[i], r[i + s], s);
  }
}

// Calls f with the corners of L x L blocks that cover rows x cols. A last block overlaps the one
// before instead of being partial (both write the same values), unless rows or cols are less than
// L.
template <int L, class F>
GHOST_INLINE void for_blocks(int64_t rows, int64_t cols, F&& f) {
  const bool whole = rows >= L && cols >= L;
  for (int64_t p = 0; p < rows; p += L)
    for (int64_t c = 0; c < cols; c += L)
      f(whole && p + L > rows ? rows - L : p, whole && c + L > cols ? cols - L : c);
}

// dst[c][p] = src[p][c] for one L x L block, or for a partial one of `rows` pixels p by `cols`
// channels c.
template <class T>
GHOST_INLINE void read_block(const T* src, int64_t ld_src, ComputeOf<T>* dst, int64_t ld_dst) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  Vec<A> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) r[i] = Storage<T>::load(src + i * ld_src);
  transpose_registers<A>(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(dst + i * ld_dst, r[i]);
}
template <class T>
__attribute__((noinline)) void read_partial_block(const T* src, int64_t ld_src, ComputeOf<T>* dst,
                                                  int64_t ld_dst, int64_t rows, int64_t cols) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  Vec<A> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    r[i] = i < rows ? Storage<T>::load_n(src + i * ld_src, cols) : Vec<A>{};
  transpose_registers<A>(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    if (i < cols) store_n(dst + i * ld_dst, r[i], rows);
}

// dst[c][p] = src[p][c] for `rows` pixels p and `cols` channels c: src [rows][ld_src], an NHWC
// tile, into channel-major scratch dst [cols][ld_dst].
template <class T>
void read_transposed(const T* src, int64_t ld_src, ComputeOf<T>* dst, int64_t ld_dst, int64_t rows,
                     int64_t cols) {
  constexpr int L = kLanes<ComputeOf<T>>;
  for_blocks<L>(rows, cols, [&](int64_t p, int64_t c) {
    const T* s = src + p * ld_src + c;
    ComputeOf<T>* d = dst + c * ld_dst + p;
    if (rows >= L && cols >= L)
      read_block<T>(s, ld_src, d, ld_dst);
    else
      read_partial_block<T>(s, ld_src, d, ld_dst, rows - p < L ? rows - p : L,
                            cols - c < L ? cols - c : L);
  });
}

// A gate for transposed output: pixel p is multiplied by the channels at gate + at[p].
template <class T>
struct GateAt {
  const T* gate;  // null: none
  const int64_t* at;
};

// dst[p][c] = src[c][p] (* gate[p][c]) (+ add[p][c]) for one block, or a partial one.
template <class T>
GHOST_INLINE void write_block(const ComputeOf<T>* src, int64_t ld_src, T* dst, const T* add,
                              GateAt<T> gate, int64_t ld_dst) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  Vec<A> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) r[i] = load(src + i * ld_src);
  transpose_registers<A>(r);
  if (gate.gate) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) r[i] *= Storage<T>::load(gate.gate + gate.at[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i)
    Storage<T>::store(dst + i * ld_dst, add ? r[i] + Storage<T>::load(add + i * ld_dst) : r[i]);
}
template <class T>
__attribute__((noinline)) void write_partial_block(const ComputeOf<T>* src, int64_t ld_src, T* dst,
                                                   const T* add, GateAt<T> gate, int64_t ld_dst,
                                                   int64_t rows, int64_t cols) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  Vec<A> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) r[i] = i < cols ? load_n(src + i * ld_src, rows) : Vec<A>{};
  transpose_registers<A>(r);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i >= rows) continue;
    if (gate.gate) r[i] *= Storage<T>::load_n(gate.gate + gate.at[i], cols);
    if (add) r[i] += Storage<T>::load_n(add + i * ld_dst, cols);
    Storage<T>::store_n(dst + i * ld_dst, r[i], cols);
  }
}

// dst[p][c] = src[c][p] (* gate[p][c]) (+ add[p][c]): channel-major scratch src [cols][ld_src] into
// an NHWC tile dst [rows][ld_dst]; add as dst, or null.
template <class T>
void write_transposed(const ComputeOf<T>* src, int64_t ld_src, T* dst, int64_t ld_dst, int64_t rows,
                      int64_t cols, const T* add = nullptr, GateAt<T> gate = {}) {
  constexpr int L = kLanes<ComputeOf<T>>;
  for_blocks<L>(rows, cols, [&](int64_t p, int64_t c) {
    const ComputeOf<T>* s = src + c * ld_src + p;
    T* d = dst + p * ld_dst + c;
    const T* a = add ? add + p * ld_dst + c : nullptr;
    const GateAt<T> g = gate.gate ? GateAt<T>{gate.gate + c, gate.at + p} : gate;
    if (rows >= L && cols >= L)
      write_block<T>(s, ld_src, d, a, g, ld_dst);
    else
      write_partial_block<T>(s, ld_src, d, a, g, ld_dst, rows - p < L ? rows - p : L,
                             cols - c < L ? cols - c : L);
  });
}

}  // namespace GHOST_ISA
}  // namespace ghost
