// From a launcher's plain data to typed kernel parameters.
#pragma once

#include <numeric>

#include "cuda/forward.cuh"
#include "cuda/forward.h"

namespace ghost::cuda {

// The widest copy (at most 16 bytes) that rows of `count` elements at p allow.
template <class T>
int32_t copy_bytes(const void* p, int64_t count) {
  int64_t bytes = 16;
  const auto fits = [&](int64_t b) {
    return reinterpret_cast<uintptr_t>(p) % size_t(b) == 0 && count * int64_t(sizeof(T)) % b == 0;
  };
  while (bytes > int64_t(sizeof(T)) && !fits(bytes)) bytes /= 2;
  return int32_t(bytes);
}

// The number of pixels that are neighbours in memory, in every tile of a plan, in NCHW maps.
inline int64_t pixel_run(const CudaTile& t, int64_t height, int64_t width, bool source) {
  if (t.tiles_w > 1) return source && t.halo > 0 ? 1 : std::gcd(int64_t(t.cols), width);
  return t.tiles_h > 1 ? width : height * width;
}

template <class T>
Partials<Accumulator<T>> typed(const PartialsRef& p) {
  using A = Accumulator<T>;
  return {static_cast<A*>(p.mean), static_cast<A*>(p.m2), static_cast<A*>(p.count), int(p.splits)};
}

template <class T>
Norm<Accumulator<T>> typed(const NormArgs& n) {
  using A = Accumulator<T>;
  Norm<A> r;
  r.source = n.source;
  r.scale = static_cast<const A*>(n.scale);
  r.shift = static_cast<const A*>(n.shift);
  r.gamma = n.gamma;
  r.beta = n.beta;
  r.mean = n.mean;
  r.var = n.var;
  r.partials = typed<T>(n.partials);
  r.eps = A(n.eps);
  r.mean_out = static_cast<A*>(n.mean_out);
  r.var_out = static_cast<A*>(n.var_out);
  return r;
}

template <class T>
Activated<Accumulator<T>> typed(const Activation& act, const ParamRef& slopes) {
  using A = Accumulator<T>;
  return {act.act, A(act.slope), slopes};
}

inline Maps maps_of(const Problem& p, const CudaTile& t) {
  Maps m;
  m.n = p.batch;
  m.c = int32_t(p.channels);
  m.in_h = int32_t(p.height);
  m.in_w = int32_t(p.width);
  m.stride = int32_t(p.stride);
  m.m = int32_t(p.intrinsic);
  m.out_channels = int32_t(p.out_channels);
  m.ratio = int32_t(p.ratio);
  m.d = int32_t(p.dw_size);
  m.h = int32_t(p.out_height());
  m.w = int32_t(p.out_width());
  m.by_image = FastDiv(t.tiles_h * t.tiles_w);
  m.by_row = FastDiv(t.tiles_w);
  return m;
}

// Blocks that differ only in their channels are neighbours in the grid: they run at the same time,
// and all but the first read x from L2.
inline dim3 grid_of(const CudaTile& t) {
  return dim3(unsigned(t.channel_blocks), unsigned(t.ghost_blocks), unsigned(t.workers));
}

template <class T>
Primary<T> primary_of(const ForwardArgs& args) {
  const Problem& p = args.problem;
  const CudaTile& t = args.plan.tile;
  Primary<T> r;
  r.x = static_cast<const T*>(args.x);
  r.w1 = static_cast<const T*>(args.w1);
  r.gate = static_cast<const T*>(args.in_gate);
  r.by_image = FastDiv(int(p.height * p.width));
  r.w1_bytes = copy_bytes<T>(args.w1, p.channels);
  if (p.layout == Layout::kNHWC)
    r.x_bytes = copy_bytes<T>(args.x, p.channels);
  else
    // The planes must be aligned too, so that every channel is.
    r.x_bytes = p.stride != 1
                    ? int32_t(sizeof(T))
                    : copy_bytes<T>(args.x, std::gcd(pixel_run(t, p.height, p.width, true),
                                                     p.height * p.width));
  return r;
}

template <class T>
Intrinsic<T> intrinsic_of(const ForwardArgs& args) {
  Intrinsic<T> r;
  r.in = primary_of<T>(args);
  r.norm = typed<T>(args.norm1);
  r.act = typed<T>(args.problem.act1, args.slopes1);
  return r;
}

}  // namespace ghost::cuda
