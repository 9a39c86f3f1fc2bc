// Squeeze-and-excitation in place, in three stages.
//
//   mean[n][c] = sum over pixels of x / P                  gate_means
//   gate[n][c] = f(w_expand' act(w_reduce mean + b) + b')  gate_values
//   x[n][c]   *= gate[n][c]                                gate_scale
//
// The caller runs a few images at a time through all three, so that what was summed is still in the
// cache when it is multiplied, and the weights are read once for several images.
// Binding resource: the memory bus for large maps, the weights' bytes for small ones.
#pragma once

#include "cpu/activation.h"
#include "cpu/layers.h"
#include "cpu/storage.h"

namespace ghost {
namespace GHOST_ISA {

template <class T>
void gate_means(const GateArgs& a, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
  using A = ComputeOf<T>;
  using V = Vec<A>;
  constexpr int L = kLanes<A>;
  const int64_t C = a.channels, P = a.pixels;
  const A scale = A(1) / A(P);
  for (int64_t n = n0; n < n1; ++n) {
    const T* const x = static_cast<const T*>(a.x) + n * C * P;
    A* const mean = static_cast<A*>(a.means) + n * C;
    if (a.layout == Layout::kNCHW) {
      for (int64_t c = c0; c < c1; ++c) {
        const T* p = x + c * P;
        V s0{}, s1{}, s2{}, s3{};
        int64_t i = 0;
        for (; i + 4 * L <= P; i += 4 * L) {
          s0 += Storage<T>::load(p + i);
          s1 += Storage<T>::load(p + i + L);
          s2 += Storage<T>::load(p + i + 2 * L);
          s3 += Storage<T>::load(p + i + 3 * L);
        }
        for (; i + L <= P; i += L) s0 += Storage<T>::load(p + i);
        if (i < P) s1 += Storage<T>::load_n(p + i, P - i);
        mean[c] = reduce_add<A>((s0 + s1) + (s2 + s3)) * scale;
      }
    } else {
      for (int64_t c = c0; c < c1; c += L) {
        const int64_t left = c1 - c;
        V s0{}, s1{};
        int64_t i = 0;
        for (; i + 2 <= P; i += 2) {
          s0 += Storage<T>::load_n(x + i * C + c, left);
          s1 += Storage<T>::load_n(x + (i + 1) * C + c, left);
        }
        if (i < P) s0 += Storage<T>::load_n(x + i * C + c, left);
        store_n(mean + c, (s0 + s1) * scale, left);
      }
    }
  }
}

template <class A>
void activate_values(const Activation& a, A* v, int64_t n) {
  constexpr int L = kLanes<A>;
  with_activation(a.act, [&](auto act) {
    constexpr Act kAct = decltype(act)::value;
    for (int64_t i = 0; i < n; i += L)
      store_n(v + i, activate<kAct, A>(load_n(v + i, n - i), A(a.slope)), n - i);
  });
}

template <class A>
void gate_values(const GateArgs& a, int64_t n0, int64_t n1) {
  using V = Vec<A>;
  constexpr int L = kLanes<A>, kImages = 4;
  const int64_t C = a.channels, R = a.reduced;
  const A* const wr = static_cast<const A*>(a.w_reduce);
  const A* const br = static_cast<const A*>(a.b_reduce);
  const A* const we = static_cast<const A*>(a.w_expand);
  const A* const be = static_cast<const A*>(a.b_expand);
  for (int64_t n = n0; n < n1; n += kImages) {
    const int images = n1 - n < kImages ? int(n1 - n) : kImages;
    A* const mean = static_cast<A*>(a.means) + n * C;
    A* const hidden = static_cast<A*>(a.hidden) + n * R;
    for (int64_t r = 0; r < R; ++r) {
      V s[kImages] = {};
      for (int64_t c = 0; c < C; c += L) {
        const V w = load_n(wr + r * C + c, C - c);
        for (int j = 0; j < images; ++j) s[j] += w * load_n(mean + j * C + c, C - c);
      }
      for (int j = 0; j < images; ++j) hidden[j * R + r] = reduce_add<A>(s[j]) + br[r];
    }
    for (int j = 0; j < images; ++j) activate_values(a.act, hidden + j * R, R);
    // The means are not needed any more: the gates take their place.
    for (int64_t c = 0; c < C; c += 2 * L) {
      const bool both = C - c > L;
      V g[kImages][2];
      for (int j = 0; j < images; ++j) {
        g[j][0] = load_n(be + c, C - c);
        g[j][1] = both ? load_n(be + c + L, C - c - L) : V{};
      }
      for (int64_t r = 0; r < R; ++r) {
        const V w0 = load_n(we + r * C + c, C - c);
        const V w1 = both ? load_n(we + r * C + c + L, C - c - L) : V{};
        for (int j = 0; j < images; ++j) {
          const V h = set1(hidden[j * R + r]);
          g[j][0] += w0 * h;
          g[j][1] += w1 * h;
        }
      }
      for (int j = 0; j < images; ++j)
        for (int k = 0; k < (both ? 2 : 1); ++k) {
          const V v = g[j][k];
          const V value = a.sigmoid ? sigmoid<A>(v) : clamp6<A>(v + A(3)) / A(6);
          store_n(mean + j * C + c + k * L, value, C - c - k * L);
        }
    }
  }
}

template <class T>
void gate_scale(const GateArgs& a, int64_t n0, int64_t n1, int64_t c0, int64_t c1) {
  using A = ComputeOf<T>;
  constexpr int L = kLanes<A>;
  const int64_t C = a.channels, P = a.pixels;
  for (int64_t n = n0; n < n1; ++n) {
    T* const x = static_cast<T*>(a.x) + n * C * P;
    const A* const gate = static_cast<const A*>(a.means) + n * C;
    if (a.layout == Layout::kNCHW) {
      for (int64_t c = c0; c < c1; ++c) {
        const Vec<A> g = set1(gate[c]);
        T* p = x + c * P;
        int64_t i = 0;
        for (; i + L <= P; i += L) Storage<T>::store(p + i, Storage<T>::load(p + i) * g);
        if (i < P) Storage<T>::store_n(p + i, Storage<T>::load_n(p + i, P - i) * g, P - i);
      }
    } else {
      for (int64_t i = 0; i < P; ++i)
        for (int64_t c = c0; c < c1; c += L) {
          T* p = x + i * C + c;
          const Vec<A> g = load_n(gate + c, c1 - c);
          Storage<T>::store_n(p, Storage<T>::load_n(p, c1 - c) * g, c1 - c);
        }
    }
  }
}

// The two passes of its gradient.
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
