// Activations and their derivatives on small arrays of registers; batch norm as scale and shift:
//
//   bn(u) = u * scale + shift,  scale = gamma / sqrt(var + eps),  shift = beta - mean * scale
//
// The activation is a run-time code: one uniform branch serves the whole array of a thread. NaN
// goes through every activation, as in PyTorch.
// Tile map: a thread owns its array; a warp combines the partial statistics of a channel.
// Binding resource: issue slots.
#pragma once

#include <cmath>

#include "core/problem.h"
#include "cuda/params.h"
#include "cuda/prim.cuh"

namespace ghost::cuda {

using prim::Accumulator;

inline constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
inline constexpr double kGeluTanhScale = 0.79788456080286535588, kGeluTanhCubic = 0.044715;

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

template <class A>
__device__ __forceinline__ A clamp6(A x) {
  return prim::min_nan(prim::max_nan(x, A(0)), A(6));
}

// One value through an activation that takes many instructions.
template <class A>
__device__ __forceinline__ A activate_costly(Act act, A x) {
  switch (act) {
    case Act::kSiLU:
      return x / (A(1) + std::exp(-x));
    case Act::kHardswish:
      return x * clamp6(x + A(3)) / A(6);
    case Act::kGELU:
      return x * A(0.5) * (A(1) + std::erf(x * A(kSqrtHalf)));
    default:  // kGELUTanh
      return x * A(0.5) *
             (A(1) + std::tanh(A(kGeluTanhScale) * (x + A(kGeluTanhCubic) * x * x * x)));
  }
}

// v = act(v), where slope(i) is the slope of v[i]. Cheap activations are unrolled over all values.
// For the others a loop computes the first values and rotates v: an unrolled loop would be most of
// the kernel's code, and an index known only at run time would force v out of the registers.
template <class A, int N, class Slope>
__device__ __forceinline__ void activate(Act act, const Slope& slope, A (&v)[N]) {
  switch (act) {
    case Act::kNone:
      return;
    case Act::kReLU:
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = prim::max_nan(v[i], A(0));
      return;
    case Act::kReLU6:
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = clamp6(v[i]);
      return;
    case Act::kLeakyReLU:
    case Act::kPReLU:
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = v[i] > A(0) ? v[i] : v[i] * slope(i);
      return;
    default:
      break;
  }
  constexpr int kAtOnce = N >= 16 && N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
#pragma unroll 1
  for (int k = 0; k < N; k += kAtOnce) {
    A done[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) done[i] = activate_costly(act, v[i]);
#pragma unroll
    for (int i = 0; i < N - kAtOnce; ++i) v[i] = v[i + kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) v[N - kAtOnce + i] = done[i];
  }
}

template <class A>
__device__ __forceinline__ A activate_grad_costly(Act act, A x, A g) {
  switch (act) {
    case Act::kSiLU: {
      const A s = sigmoid(x);
      return g * s * (A(1) + x * (A(1) - s));
    }
    case Act::kHardswish:
      return x <= A(-3) ? A(0) : x >= A(3) ? g : g * (x / A(3) + A(0.5));
    case Act::kGELU:
      return g * (A(0.5) * (A(1) + std::erf(x * A(kSqrtHalf))) +
                  x * std::exp(x * x * A(-0.5)) * A(kInvSqrt2Pi));
    default: {  // kGELUTanh
      const A t = std::tanh(A(kGeluTanhScale) * (x + A(kGeluTanhCubic) * x * x * x));
      const A d_inner = A(kGeluTanhScale) * (A(1) + A(3 * kGeluTanhCubic) * x * x);
      return g * (A(0.5) * (A(1) + t) + A(0.5) * x * (A(1) - t * t) * d_inner);
    }
  }
}

// g = g * d act(x) / dx at x = v * scale + shift, for values of two channels in turn: v[0], v[2],
// ... belong to scale[0], shift[0], slope(0). v is rotated with g in the loop, and unchanged at the
// end. For a PReLU, use_slopes(products) gets g min(x, 0), each value's gradient of the slope.
template <class A, int N, class Slope, class UseSlopes>
__device__ __forceinline__ void activate_grad(Act act, const Slope& slope, const A (&scale)[2],
                                              const A (&shift)[2], A (&v)[N], A (&g)[N],
                                              const UseSlopes& use_slopes) {
  const auto x = [&](int i) { return prim::fma(v[i], scale[i & 1], shift[i & 1]); };
  switch (act) {
    case Act::kNone:
      return;
    case Act::kReLU:
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = x(i) <= A(0) ? A(0) : g[i];
      return;
    case Act::kReLU6:
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = x(i) <= A(0) || x(i) >= A(6) ? A(0) : g[i];
      return;
    case Act::kPReLU: {
      A products[N];
#pragma unroll
      for (int i = 0; i < N; ++i) products[i] = x(i) > A(0) ? A(0) : g[i] * x(i);
      use_slopes(products);
      [[fallthrough]];
    }
    case Act::kLeakyReLU: {
      const A slopes[2] = {slope(0), slope(1)};
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = x(i) > A(0) ? g[i] : g[i] * slopes[i & 1];
      return;
    }
    default:
      break;
  }
#pragma unroll 1
  for (int k = 0; k < N; k += 2) {
    const A first[2] = {v[0], v[1]};
    const A done[2] = {activate_grad_costly(act, x(0), g[0]),
                       activate_grad_costly(act, x(1), g[1])};
#pragma unroll
    for (int i = 0; i < N - 2; ++i) {
      v[i] = v[i + 2];
      g[i] = g[i + 2];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      v[N - 2 + e] = first[e];
      g[N - 2 + e] = done[e];
    }
  }
}

// ------------------------------------------------------------------------- pairs of channels

// Two neighbouring elements of T, from or to an address aligned to both.
__device__ __forceinline__ void load_pair(const prim::half_t* p, float (&v)[2]) {
  const float2 f = prim::unpack_pair<prim::half_t>(prim::load<uint32_t>(p));
  v[0] = f.x;
  v[1] = f.y;
}
__device__ __forceinline__ void load_pair(const prim::bfloat16_t* p, float (&v)[2]) {
  const float2 f = prim::unpack_pair<prim::bfloat16_t>(prim::load<uint32_t>(p));
  v[0] = f.x;
  v[1] = f.y;
}
__device__ __forceinline__ void load_pair(const float* p, float (&v)[2]) {
  const float2 f = prim::load<float2>(p);
  v[0] = f.x;
  v[1] = f.y;
}
__device__ __forceinline__ void load_pair(const double* p, double (&v)[2]) {
  v[0] = p[0];
  v[1] = p[1];
}
__device__ __forceinline__ void store_pair(prim::half_t* p, float x, float y) {
  prim::store<uint32_t>(p, prim::pack_pair<prim::half_t>(x, y));
}
__device__ __forceinline__ void store_pair(prim::bfloat16_t* p, float x, float y) {
  prim::store<uint32_t>(p, prim::pack_pair<prim::bfloat16_t>(x, y));
}
__device__ __forceinline__ void store_pair(float* p, float x, float y) {
  prim::store<float2>(p, float2{x, y});
}
__device__ __forceinline__ void store_pair(double* p, double x, double y) {
  p[0] = x;
  p[1] = y;
}

// Two neighbouring elements of T, rounded, as they are stored: a register for 16-bit types.
template <class T>
struct PairOf {
  Accumulator<T> v[2];
};
template <>
struct PairOf<prim::half_t> {
  uint32_t bits;
};
template <>
struct PairOf<prim::bfloat16_t> {
  uint32_t bits;
};
template <class T>
__device__ __forceinline__ void store_pair(T* p, const PairOf<T>& pair) {
  if constexpr (sizeof(T) == 2)
    prim::store<uint32_t>(p, pair.bits);
  else
    store_pair(p, pair.v[0], pair.v[1]);
}
template <class T>
__device__ __forceinline__ void store_one(T* p, const PairOf<T>& pair, int which) {
  if constexpr (sizeof(T) == 2)
    prim::store<uint16_t>(p, uint16_t(pair.bits >> (16 * which)));
  else
    *p = pair.v[which];
}

// pairs = act(v), rounded; v is overwritten. For 16-bit types the rounding instruction includes
// ReLU, and ReLU6 follows on pairs of rounded numbers: rounding is monotonic and keeps 0 and 6, so
// that the result is the same. kAny = false: the type has 16 bits, the activation is ReLU or none.
template <class T, bool kAny = true, class A, int N, class Slope>
__device__ __forceinline__ void activate_pairs(Act act, const Slope& slope, A (&v)[N],
                                               PairOf<T> (&pairs)[N / 2]) {
  if constexpr (!kAny) {
    static_assert(sizeof(T) == 2);
    if (act == Act::kReLU) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        pairs[i].bits = prim::pack_pair_relu<T>(v[2 * i], v[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) pairs[i].bits = prim::pack_pair<T>(v[2 * i], v[2 * i + 1]);
    }
    return;
  } else if constexpr (sizeof(T) == 2) {
    if (act == Act::kReLU || act == Act::kReLU6) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i)
        pairs[i].bits = prim::pack_pair_relu<T>(v[2 * i], v[2 * i + 1]);
      if (act == Act::kReLU) return;
      const uint32_t six = prim::pack_pair<T>(6.0f, 6.0f);
#pragma unroll
      for (int i = 0; i < N / 2; ++i) pairs[i].bits = prim::min_pair<T>(pairs[i].bits, six);
      return;
    }
  }
  activate(act, slope, v);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    if constexpr (sizeof(T) == 2)
      pairs[i].bits = prim::pack_pair<T>(v[2 * i], v[2 * i + 1]);
    else
      pairs[i] = {v[2 * i], v[2 * i + 1]};
  }
}

// ------------------------------------------------------------------- per-channel parameters

template <class A>
__device__ __forceinline__ A load_param(const ParamRef& p, int64_t i) {
  switch (p.dtype) {
    case DType::kFloat64:
      return A(static_cast<const double*>(p.data)[i]);
    case DType::kBFloat16:
      return A(prim::to_float(static_cast<const prim::bfloat16_t*>(p.data)[i]));
    case DType::kFloat16:
      return A(prim::to_float(static_cast<const prim::half_t*>(p.data)[i]));
    case DType::kFloat32:
      break;
  }
  return A(static_cast<const float*>(p.data)[i]);
}
template <class A>
__device__ __forceinline__ A load_param(const A* p, int64_t i) {
  return p[i];
}
template <class A>
__device__ __forceinline__ A load_param_or(const ParamRef& p, int64_t i, A otherwise) {
  return p.data == nullptr ? otherwise : load_param<A>(p, i);
}

// Partial statistics of a pass: split s of `splits` has count[s] values of every channel, with mean
// mean[c * splits + s] and sum of squared deviations m2[c * splits + s].
template <class A>
struct Partials {
  A* mean = nullptr;   // [channels, splits]
  A* m2 = nullptr;     // [channels, splits]
  A* count = nullptr;  // [splits]
  int splits = 0;
};

// The scale and shift of a batch norm, from the source that NormSource names (params.h).
template <class A>
struct Norm {
  NormSource source = NormSource::kReady;
  const A* scale = nullptr;
  const A* shift = nullptr;
  ParamRef gamma, beta, mean, var;
  Partials<A> partials;
  A eps = A(0);
  A* mean_out = nullptr;  // kPartials: the combined statistics, written by one block
  A* var_out = nullptr;
};

// Mean and biased variance of kCount channels from their partials, by one warp:
//
//   d_s  = mean_s - mean_0             distance from the mean of the first split, which keeps the
//   d    = sum of n_s d_s / n          digits of a large mean
//   mean = mean_0 + d
//   var  = sum of (m2_s + n_s (d_s - d)^2) / n
//
// The lanes are added in a fixed tree: every block gets the same bits. Several channels at once
// share the wait for memory.
template <int kCount, class A>
__device__ __forceinline__ void combine_partials(const Partials<A>& p,
                                                 const int64_t (&channel)[kCount],
                                                 A (&mean)[kCount], A (&var)[kCount]) {
  const int lane = int(prim::lane());
  A n = A(0), base[kCount], d[kCount], m2[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    base[k] = p.splits > 0 ? p.mean[channel[k] * p.splits] : A(0);
    d[k] = m2[k] = A(0);
  }
#pragma unroll 2
  for (int s = lane; s < p.splits; s += 32) {
    const A count = p.count[s];
    n += count;
#pragma unroll
    for (int k = 0; k < kCount; ++k) d[k] += count * (p.mean[channel[k] * p.splits + s] - base[k]);
  }
#pragma unroll
  for (int x = 16; x > 0; x >>= 1) {
    n += prim::shuffle_xor(n, x);
#pragma unroll
    for (int k = 0; k < kCount; ++k) d[k] += prim::shuffle_xor(d[k], x);
  }
  const A share = n > A(0) ? A(1) / n : A(0);
#pragma unroll
  for (int k = 0; k < kCount; ++k) d[k] *= share;
#pragma unroll 2
  for (int s = lane; s < p.splits; s += 32) {
    const A count = p.count[s];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int64_t at = channel[k] * p.splits + s;
      const A from_mean = p.mean[at] - base[k] - d[k];
      m2[k] += p.m2[at] + count * from_mean * from_mean;
    }
  }
#pragma unroll
  for (int x = 16; x > 0; x >>= 1) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) m2[k] += prim::shuffle_xor(m2[k], x);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    mean[k] = base[k] + d[k];
    var[k] = m2[k] * share;
  }
}
template <class A>
__device__ __forceinline__ void combine_partials(const Partials<A>& p, int64_t channel, A& mean,
                                                 A& var) {
  const int64_t channels[1] = {channel};
  A means[1], vars[1];
  combine_partials(p, channels, means, vars);
  mean = means[0];
  var = vars[0];
}

// scale[i], shift[i] for i < count to shared memory, of channel first + i * step (step: 1 for
// intrinsic channels, ghosts_per_map for ghosts), from a norm whose source is kReady; zeros for
// i >= valid. All threads of the block call it; a sync_threads must follow.
template <class A>
__device__ __forceinline__ void load_ready_norm(const Norm<A>& norm, int64_t first, int step,
                                                int valid, int count, A* scale, A* shift) {
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const int64_t c = first + int64_t(i) * step;
    scale[i] = i >= valid ? A(0) : norm.scale ? norm.scale[c] : A(1);
    shift[i] = i < valid && norm.shift ? norm.shift[c] : A(0);
  }
}

// load_ready_norm for a norm of any source. leader: the block also writes the combined statistics.
template <class A>
__device__ __forceinline__ void load_norm(const Norm<A>& norm, int64_t first, int step, int valid,
                                          int count, bool leader, A* scale, A* shift) {
  if (norm.source == NormSource::kReady)
    return load_ready_norm(norm, first, step, valid, count, scale, shift);
  const int warps = int(blockDim.x >> 5), lane = int(prim::lane());
  if (norm.source == NormSource::kPartials) {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int i = int(prim::warp()) * kAtOnce; i < count; i += warps * kAtOnce) {
      int64_t channel[kAtOnce];
      A mean[kAtOnce], var[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        channel[k] = first + int64_t(i + k < valid ? i + k : valid - 1) * step;
      combine_partials(norm.partials, channel, mean, var);
      if (lane >= kAtOnce) continue;
      // Lane k finishes channel k.
      int64_t c = channel[0];
      A m = mean[0], v = var[0];
#pragma unroll
      for (int k = 1; k < kAtOnce; ++k)
        if (lane == k) {
          c = channel[k];
          m = mean[k];
          v = var[k];
        }
      A a = A(0), b = A(0);
      if (i + lane < valid) {
        a = load_param_or(norm.gamma, c, A(1)) * prim::rsqrt(v + norm.eps);
        b = load_param_or(norm.beta, c, A(0)) - m * a;
        if (leader) {
          norm.mean_out[c] = m;
          norm.var_out[c] = v;
        }
      }
      if (i + lane < count) {
        scale[i + lane] = a;
        shift[i + lane] = b;
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    A a = A(0), b = A(0);
    if (i < valid) {
      const int64_t c = first + int64_t(i) * step;
      a = load_param_or(norm.gamma, c, A(1)) *
          prim::rsqrt(load_param_or(norm.var, c, A(1)) + norm.eps);
      b = load_param_or(norm.beta, c, A(0)) - load_param_or(norm.mean, c, A(0)) * a;
    }
    scale[i] = a;
    shift[i] = b;
  }
}

// An activation with its slope: one for all channels, or for a PReLU one per channel.
template <class A>
struct Activated {
  Act act = Act::kNone;
  A slope = A(0);
  ParamRef slopes;
};

// slope[i] of channel first + i * step for i < count in shared memory; zeros past `valid`.
template <class A>
__device__ __forceinline__ void load_slopes(const Activated<A>& act, int64_t first, int step,
                                            int valid, int count, A* slope) {
  if (act.act != Act::kLeakyReLU && act.act != Act::kPReLU) return;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    A v = act.slope;
    if (act.slopes.data != nullptr)
      v = i < valid ? load_param<A>(act.slopes, first + int64_t(i) * step) : A(0);
    slope[i] = v;
  }
}

}  // namespace ghost::cuda
