// Squeeze-and-excitation in place, in three stages.
//
//   mean[n][c] = sum over pixels of x / P                               gate_means
//   gate[n][c] = f(w_expand^T act(w_reduce mean + b_reduce) + b_expand) gate_values
//   x[n][c]   *= gate[n][c]                                             gate_scale
//
// C channels, R reduced channels, P pixels.
//
// The caller runs a few images at a time through all stages: the multiplication reads x from the
// cache, and the weights are read once for several images.
//
// Tile map: means and products keep several vectors of sums; rows of both matrices are read whole,
// 8 at once for one image, fewer for up to 4 images. Sums of as many rows as a vector has lanes are
// reduced together. Binding resource: the memory bus for large maps, the weights for small ones.
#pragma once

#include "cpu/activation.h"
#include "cpu/layers.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

// Lane i: the sum of row i of rows [L, L], in the order of reduce_add.
template <class A>
GHOST_INLINE Vec<A> sum_rows(const A* rows) {
  constexpr int L = kLanes<A>;
  Vec<A> r[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) r[i] = load(rows + i * L);
#pragma GCC unroll 4
  for (int w = L / 2; w > 0; w /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < w; ++i) {
      exchange_lanes<A>(r[i], r[i + w], w);
      r[i] += r[i + w];
    }
  return r[0];
}

// The sum of one plane p [n], by lanes. rest: all-ones in the last n % L lanes.
template <class T>
GHOST_INLINE Vec<ComputeOf<T>> plane_sum(const T* p, int64_t n,
                                         typename Simd<ComputeOf<T>>::I rest) {
  using V = Vec<ComputeOf<T>>;
  constexpr int L = kLanes<ComputeOf<T>>;
  if (n < L) return Storage<T>::load_n(p, n);
  V s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    s0 += Storage<T>::load(p + i);
    s1 += Storage<T>::load(p + i + L);
    s2 += Storage<T>::load(p + i + 2 * L);
    s3 += Storage<T>::load(p + i + 3 * L);
  }
  for (; i + L <= n; i += L) s0 += Storage<T>::load(p + i);
  // A whole vector that ends at the last pixel, without the lanes that are already summed.
  if (i < n) s1 += (V)((typename Simd<ComputeOf<T>>::I)Storage<T>::load(p + n - L) & rest);
  return (s0 + s1) + (s2 + s3);
}

// Means of N vectors of channels of x [pixels][C], or of `left` channels if not kWhole.
template <class T, int N, bool kWhole>
GHOST_INLINE void channel_means(const T* x, int64_t pixels, int64_t C, ComputeOf<T> scale,
                                ComputeOf<T>* mean, int64_t left = 0) {
  using V = Vec<ComputeOf<T>>;
  constexpr int L = kLanes<ComputeOf<T>>;
  auto at = [=](const T* p) __attribute__((always_inline)) {
    return kWhole ? Storage<T>::load(p) : Storage<T>::load_n(p, left);
  };
  V even[N] = {}, odd[N] = {};
  for (int64_t i = 0; i + 2 <= pixels; i += 2, x += 2 * C) {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      even[k] += at(x + k * L);
      odd[k] += at(x + C + k * L);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < N; ++k) {
    if (pixels % 2) even[k] += at(x + k * L);
    const V v = (even[k] + odd[k]) * scale;
    if (kWhole)
      store(mean + k * L, v);
    else
      store_n(mean + k * L, v, left);
  }
}

template <class T>
void gate_means(const GateArgs& a, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  const int64_t C = a.channels, P = a.pixels;
  const A scale = A(1) / A(P);
  typename Simd<A>::I rest;
  for (int l = 0; l < L; ++l) rest[l] = l >= L - P % L ? -1 : 0;
  for (int64_t n = n0; n < n1; ++n) {
    const T* const x = static_cast<const T*>(a.x) + n * C * P;
    A* const mean = static_cast<A*>(a.means) + n * C;
    if (a.layout == Layout::kNCHW) {
      A sums[L * L] = {};
      for (int64_t c = c0; c < c1; c += L) {
        const int64_t some = c1 - c < L ? c1 - c : L;
        for (int64_t i = 0; i < some; ++i)
          store(sums + i * L, plane_sum<T>(x + (c + i) * P, P, rest));
        store_n(mean + c, sum_rows(sums) * scale, some);
      }
    } else {
      int64_t c = c0;
      for (; c + 4 * L <= c1; c += 4 * L) channel_means<T, 4, true>(x + c, P, C, scale, mean + c);
      for (; c + L <= c1; c += L) channel_means<T, 1, true>(x + c, P, C, scale, mean + c);
      if (c < c1) channel_means<T, 1, false>(x + c, P, C, scale, mean + c, c1 - c);
    }
  }
}

// sums[image][q] = w[q] * mean[image] by lanes, for Q rows of w [rows][C] (the last one again if
// there are fewer) and I images, mean [I][C], sums [I][L][L]. next: the rows that are read after
// them, to prefetch.
template <class A, int Q, int I>
__attribute__((noinline)) void reduce_rows(const A* w, int64_t rows, int64_t C, const A* mean,
                                           A* sums, const A* next) {
  constexpr int L = kLanes<A>;
  using V = Vec<A>;
  const A* row[Q];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) row[q] = w + (q < rows ? q : rows - 1) * C;
  V s[Q * I] = {};
  auto step = [&](int64_t c, auto at) __attribute__((always_inline)) {
    V m[I];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) m[i] = at(mean + i * C + c);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const V v = at(row[q] + c);
      __builtin_prefetch(next + q * C + c);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) s[q * I + i] += v * m[i];
    }
  };
  int64_t c = 0;
  for (; c + L <= C; c += L)
    step(c, [](const A* p) __attribute__((always_inline)) { return load(p); });
  if (c < C) step(c, [=](const A* p) __attribute__((always_inline)) { return load_n(p, C - c); });
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) store(sums + (i * L + q) * L, s[q * I + i]);
}

// gate[image] = from[image] + sum_q w[q] * h[image][q] over Q rows of w [Q][C], for I images: gate
// [I][C], from [I][ld_from], h [I][R]. The next Q rows are prefetched; a prefetch beyond the last
// row has no effect.
template <class A, int Q, int I>
__attribute__((noinline)) void expand_rows(const A* w, int64_t C, const A* h, int64_t R,
                                           const A* from, int64_t ld_from, A* gate) {
  constexpr int L = kLanes<A>;
  using V = Vec<A>;
  V hidden[I * Q];
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) hidden[i * Q + q] = set1(h[i * R + q]);
  auto step = [&](int64_t c, auto at, auto put) __attribute__((always_inline)) {
    V g[I];
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) g[i] = at(from + i * ld_from + c);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const V v = at(w + q * C + c);
      __builtin_prefetch(w + (Q + q) * C + c);
#pragma GCC unroll 4
      for (int i = 0; i < I; ++i) g[i] += v * hidden[i * Q + q];
    }
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) put(gate + i * C + c, g[i]);
  };
  int64_t c = 0;
  for (; c + L <= C; c += L)
    step(
        c, [](const A* p) __attribute__((always_inline)) { return load(p); },
        [](A* p, V v) __attribute__((always_inline)) { store(p, v); });
  if (c < C)
    step(
        c, [=](const A* p) __attribute__((always_inline)) { return load_n(p, C - c); },
        [=](A* p, V v) __attribute__((always_inline)) { store_n(p, v, C - c); });
}

// The gates of I images, Q rows of a matrix at a time.
template <class A, int I>
void gate_images(const GateArgs& a, int64_t n) {
  constexpr int L = kLanes<A>, kMost = I == 1 ? 8 : kVectorBytes == 64 ? 4 : 2;
  constexpr int Q = kMost < L ? kMost : L;
  const int64_t C = a.channels, R = a.reduced;
  const A* const wr = static_cast<const A*>(a.w_reduce);
  const A* const br = static_cast<const A*>(a.b_reduce);
  const A* const we = static_cast<const A*>(a.w_expand);
  const A* const be = static_cast<const A*>(a.b_expand);
  A* const mean = static_cast<A*>(a.means) + n * C;
  A* const hidden = static_cast<A*>(a.hidden) + n * R;
  A sums[I * L * L] = {};
  for (int64_t r = 0; r < R; r += L) {
    const int64_t rows = R - r < L ? R - r : L;
    for (int64_t q = 0; q < rows; q += Q)
      reduce_rows<A, Q, I>(wr + (r + q) * C, rows - q, C, mean, sums + q * L,
                           r + q + Q < R ? wr + (r + q + Q) * C : we);
    with_activation(a.act.act, [&](auto act) {
      for (int i = 0; i < I; ++i) {
        const Vec<A> v = sum_rows(sums + i * L * L) + load_n(br + r, rows);
        store_n(hidden + i * R + r, activate<decltype(act)::value, A>(v, A(a.act.slope)), rows);
      }
    });
  }
  // The gates are written over the means.
  int64_t r = 0;
  for (; r + Q <= R; r += Q)
    expand_rows<A, Q, I>(we + r * C, C, hidden + r, R, r ? mean : be, r ? C : 0, mean);
  for (; r < R; ++r)
    expand_rows<A, 1, I>(we + r * C, C, hidden + r, R, r ? mean : be, r ? C : 0, mean);
  auto gate = [&](Vec<A> v) __attribute__((always_inline)) {
    return a.sigmoid ? sigmoid<A>(v) : clamp6<A>(v + A(3)) / A(6);
  };
  const int64_t all = I * C;
  int64_t c = 0;
  for (; c + L <= all; c += L) store(mean + c, gate(load(mean + c)));
  if (c < all) store_n(mean + c, gate(load_n(mean + c, all - c)), all - c);
}

template <class A>
void gate_values(const GateArgs& a, int64_t n0, int64_t n1) {
  int64_t n = n0;
  for (; n + 4 <= n1; n += 4) gate_images<A, 4>(a, n);
  for (; n + 2 <= n1; n += 2) gate_images<A, 2>(a, n);
  if (n < n1) gate_images<A, 1>(a, n);
}

// p[i] *= gate(i) for i < n. The last vector ends at the last element; it is read before the vector
// that it overlaps is written.
template <class T, class F>
GHOST_INLINE void scale_row(T* p, int64_t n, F gate) {
  constexpr int L = kLanes<ComputeOf<T>>;
  if (n < L) return Storage<T>::store_n(p, Storage<T>::load_n(p, n) * gate(0, n), n);
  const Vec<ComputeOf<T>> last = Storage<T>::load(p + n - L) * gate(n - L, L);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + L <= n; i += L) Storage<T>::store(p + i, Storage<T>::load(p + i) * gate(i, L));
  if (i < n) Storage<T>::store(p + n - L, last);
}

template <class T>
void gate_scale(const GateArgs& a, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
  using A = ComputeOf<T>;
  const int64_t C = a.channels, P = a.pixels;
  for (int64_t n = n0; n < n1; ++n) {
    T* const x = static_cast<T*>(a.x) + n * C * P;
    const A* const gate = static_cast<const A*>(a.means) + n * C;
    if (a.layout == Layout::kNCHW) {
      for (int64_t c = c0; c < c1; ++c) {
        const Vec<A> g = set1(gate[c]);
        scale_row(x + c * P, P, [=](int64_t, int64_t) __attribute__((always_inline)) { return g; });
      }
    } else {
      const A* const from = gate + c0;
      for (int64_t i = 0; i < P; ++i)
        scale_row(x + i * C + c0, c1 - c0,
                  [=](int64_t c, int64_t k) __attribute__((always_inline)) {
                    return k == kLanes<A> ? load(from + c) : load_n(from + c, k);
                  });
    }
  }
}

// A pass of the gradient: out = scale * x + shift by planes of P pixels, with one scale and one
// shift for each plane.
template <class T>
void plane_affine(const PlaneArgs& a, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  const int64_t P = a.pixels;
  for (int64_t i = begin; i < end; ++i) {
    const T* const x = static_cast<const T*>(a.x) + i * P;
    T* const out = static_cast<T*>(a.out) + i * P;
    const Vec<A> s = set1(static_cast<const A*>(a.scale)[i]),
                 b = set1(static_cast<const A*>(a.shift)[i]);
    int64_t p = 0;
    for (; p + L <= P; p += L) Storage<T>::store(out + p, Storage<T>::load(x + p) * s + b);
    if (p < P) Storage<T>::store_n(out + p, Storage<T>::load_n(x + p, P - p) * s + b, P - p);
  }
}

// The other pass of the gradient: out[plane] = sum over pixels of x * other.
template <class T>
void plane_dot(const PlaneArgs& a, int64_t begin, int64_t end) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  const int64_t P = a.pixels;
  for (int64_t i = begin; i < end; ++i) {
    const T* const x = static_cast<const T*>(a.x) + i * P;
    const T* const y = static_cast<const T*>(a.other) + i * P;
    Vec<A> s0{}, s1{};
    int64_t p = 0;
    for (; p + 2 * L <= P; p += 2 * L) {
      s0 += Storage<T>::load(x + p) * Storage<T>::load(y + p);
      s1 += Storage<T>::load(x + p + L) * Storage<T>::load(y + p + L);
    }
    for (; p + L <= P; p += L) s0 += Storage<T>::load(x + p) * Storage<T>::load(y + p);
    if (p < P) s1 += Storage<T>::load_n(x + p, P - p) * Storage<T>::load_n(y + p, P - p);
    static_cast<A*>(a.out)[i] = reduce_add<A>(s0 + s1);
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
