// The parameters of inference in the order and types of CudaPackedLayout:
//
//   scale = gamma / sqrt(var + eps),  shift = beta - mean * scale      (of either batch norm)
//   w1_out = w1 * scale1 if folded, else w1;  w2_out = w2 * scale2
//
// Tile map: a thread takes every gridDim * blockDim-th element of each vector.
// Binding resource: launch latency; the kernel runs once per module.
#pragma once

#include "cuda/epilogue.cuh"

namespace ghost::cuda {

template <class T>
struct PackParams {
  const T* w1 = nullptr;  // [m, c] or null
  ParamRef w2;            // [g, taps]
  Norm<Accumulator<T>> norm1, norm2;
  int64_t w1_count = 0, c = 0, m = 0, g = 0, taps = 0;
  bool folded = false;
  T* w1_out = nullptr;
  Accumulator<T>*scale1 = nullptr, *shift1 = nullptr, *w2_out = nullptr, *shift2 = nullptr;
  ParamRef slopes1, slopes2;  // of a PReLU [m], [g], or none
  Accumulator<T>*slopes1_out = nullptr, *slopes2_out = nullptr;
  unsigned char* rest = nullptr;  // [rest_bytes], set to zero
  int64_t rest_bytes = 0;
};

template <class A>
__device__ __forceinline__ A norm_scale(const Norm<A>& n, int64_t c) {
  const A gamma = load_param_or(n.gamma, c, A(1));
  return n.var.data == nullptr ? gamma : gamma * prim::rsqrt(load_param<A>(n.var, c) + n.eps);
}
template <class A>
__device__ __forceinline__ A norm_shift(const Norm<A>& n, int64_t c) {
  const A beta = load_param_or(n.beta, c, A(0));
  return n.mean.data == nullptr ? beta : beta - load_param<A>(n.mean, c) * norm_scale(n, c);
}

template <class T>
__global__ void __launch_bounds__(256) ghost_pack_kernel(const PackParams<T> p) {
  prim::wait_for_previous_kernel();
  using A = Accumulator<T>;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = first; i < p.w1_count; i += step)
    p.w1_out[i] = p.folded
                      ? prim::from_float<T>(prim::to_float(p.w1[i]) * norm_scale(p.norm1, i / p.c))
                      : p.w1[i];
  for (int64_t i = first; i < p.m; i += step) {
    if (!p.folded) p.scale1[i] = norm_scale(p.norm1, i);
    p.shift1[i] = norm_shift(p.norm1, i);
  }
  for (int64_t i = first; i < p.g * p.taps; i += step)
    p.w2_out[i] = load_param<A>(p.w2, i) * norm_scale(p.norm2, i / p.taps);
  for (int64_t i = first; i < p.g; i += step) p.shift2[i] = norm_shift(p.norm2, i);
  if (p.slopes1.data != nullptr)
    for (int64_t i = first; i < p.m; i += step) p.slopes1_out[i] = load_param<A>(p.slopes1, i);
  if (p.slopes2.data != nullptr)
    for (int64_t i = first; i < p.g; i += step) p.slopes2_out[i] = load_param<A>(p.slopes2, i);
  for (int64_t i = first; i < p.rest_bytes; i += step) p.rest[i] = 0;
}

// mean and var [channels] from partial statistics (combine_partials). A warp takes one channel.
template <class A>
__global__ void __launch_bounds__(256)
    combine_stats_kernel(const Partials<A> partials, int64_t channels, A* mean, A* var) {
  prim::wait_for_previous_kernel();
  const int64_t c = int64_t(blockIdx.x) * (blockDim.x / 32) + prim::warp();
  if (c >= channels) return;
  A m, v;
  combine_partials(partials, c, m, v);
  if (prim::lane() == 0) {
    mean[c] = m;
    var[c] = v;
  }
}

}  // namespace ghost::cuda
