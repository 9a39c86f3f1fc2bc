// Shared by the backward kernels: vectors in registers, batch norm parameters, and the reduction
//
//   out[i] = sum over r < rows of part[r][i]
//
// by a whole block, a thread every groups-th row of one column, in a fixed order.
// Binding resource: that of the kernel that includes this file.
#pragma once

#include <cstring>

#include "cuda/backward.h"
#include "cuda/epilogue.cuh"
#include "cuda/fast_div.cuh"
#include "cuda/gemm.cuh"
#include "cuda/prim.cuh"

namespace ghost::cuda {

// Blocks per multiprocessor that the register budget allows.
template <class T>
inline constexpr int kBackwardBlocks = sizeof(T) == 8 ? 1 : 2;

// ------------------------------------------------------------------------------------ vectors

// Elements of T in 16 bytes.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ __forceinline__ void unpack(const uint4& raw, Accumulator<T> (&v)[kVector<T>]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = prim::unpack_pair<T>(words[i]);
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
    }
  } else {
    memcpy(v, &raw, 16);
  }
}
template <class T>
__device__ __forceinline__ uint4 pack(const Accumulator<T> (&v)[kVector<T>]) {
  uint4 raw;
  if constexpr (sizeof(T) == 2) {
    raw.x = prim::pack_pair<T>(v[0], v[1]);
    raw.y = prim::pack_pair<T>(v[2], v[3]);
    raw.z = prim::pack_pair<T>(v[4], v[5]);
    raw.w = prim::pack_pair<T>(v[6], v[7]);
  } else {
    memcpy(&raw, v, 16);
  }
  return raw;
}

// The first `count` elements of v to p, `step` apart. wide: step is 1 and p is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ void store_vector(T* p, int64_t step, int count, bool wide,
                                             const Accumulator<T> (&v)[kVector<T>]) {
  if (wide && count >= kVector<T>) {
    prim::store<uint4>(p, pack<T>(v));
    return;
  }
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e)
    if (e < count) p[e * step] = prim::from_float<T>(v[e]);
}

// --------------------------------------------------------------------------------- parameters

// Gamma, beta, mean and var as the kernels take them.
struct NormParams {
  ParamRef gamma, beta, mean, var;
  double eps = 0;

  NormParams() = default;
  explicit NormParams(const NormArgs& n)
      : gamma(n.gamma), beta(n.beta), mean(n.mean), var(n.var), eps(n.eps) {}
};

// Batch norm of one channel as a * scale + shift, with the mean and 1 / std for its gradient.
template <class A>
struct Affine {
  A scale = 0, shift = 0, mean = 0, inv_std = 0;
};
template <class A>
__device__ __forceinline__ Affine<A> load_affine(const NormParams& n, int64_t c) {
  Affine<A> f;
  f.mean = load_param<A>(n.mean, c);
  f.inv_std = prim::rsqrt(load_param<A>(n.var, c) + static_cast<A>(n.eps));
  f.scale = load_param_or(n.gamma, c, A(1)) * f.inv_std;
  f.shift = load_param_or(n.beta, c, A(0)) - f.mean * f.scale;
  return f;
}

// -------------------------------------------------------------------------------- sums

// Column i is the i-th number of a row.
struct NextColumn {
  __device__ __forceinline__ int operator()(int i) const { return i; }
};

// Calls store(i, sum over r < rows of part[r * pitch + columns(i)]) for i < count. The whole block
// takes part, in a fixed order: each thread adds up every groups-th row, then one thread of a
// column adds up the groups. `shared` has kThreads numbers. Ends with a barrier.
template <class A, class Store, class Column = NextColumn>
__device__ __forceinline__ void sum_rows(const A* part, int rows, int64_t pitch, int count,
                                         A* shared, const Store& store,
                                         const Column& columns = Column()) {
  int lanes = 8;  // columns at a time
  while (lanes < count && lanes < kThreads) lanes *= 2;
  const int tid = static_cast<int>(threadIdx.x), groups = kThreads / lanes;
  const int column = tid & (lanes - 1), group = tid / lanes;
  for (int first = 0; first < count; first += lanes) {
    const int i = first + column;
    A sum = 0;
    if (i < count) {
      const A* const own = part + columns(i);
#pragma unroll 4
      for (int r = group; r < rows; r += groups) sum += own[r * pitch];
    }
    shared[tid] = sum;
    prim::sync_threads();
    if (group == 0 && i < count) {
      for (int k = 1; k < groups; ++k) sum += shared[k * lanes + column];
      store(i, sum);
    }
    prim::sync_threads();
  }
}

}  // namespace ghost::cuda
