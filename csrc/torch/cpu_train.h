// Shared by the two directions of training on the CPU, cpu_train.cpp and cpu_backward.cpp. Names as
// in core/problem.h; P is the number of pixels of u.
#pragma once

#include "torch/cpu_common.h"

namespace ghost {

// A Ghost module in training: its problem, and its parameters in the compute type.
struct TrainModule {
  // The caller sets p.out_channels, norm1 and norm2.
  TrainModule(const Tensor& x, const OptionalTensor& w1, const Tensor& w2, int64_t stride,
              int64_t act1, double slope1, int64_t act2, double slope2);

  // n: channels of the argument `name`, which is named in messages.
  void set_out_channels(int64_t n, const char* name);
  // which: 1 or 2. means: of the norm's gradients, see NormArgs.
  void set_norm(int which, double eps, const OptionalTensor& gamma, const OptionalTensor& beta,
                const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& slopes,
                const OptionalTensor& means);
  // The arguments of the kernels, without the pointers to results.
  TrainArgs args(bool batch_stats1, bool batch_stats2) const;

  Image in;
  Problem p;
  int64_t m, g, d;

 private:
  Param taps_;
  NormParams norm1_, norm2_;
};

// w1 [m, C, 1, 1] must fit x.
void check_primary(const Tensor& w1, const Image& x);
// Packed parameters that pass n channels through unchanged: n ones and n zeros.
Tensor identity(int64_t n, DType dtype);

// A 1x1 convolution through the kernels of ghost_apply (ratio 1: no ghosts).
Problem plain_conv(const Image& x, int64_t out_channels, int64_t stride);
// Its packed weights: w1 [m, C] for x -> u, or w1 transposed for du -> dx.
Tensor packed_conv(const Tensor& w1, DType dtype, bool transposed);

// u = w1 * x, or x without w1, as [m, N, P] of the compute type with channel_stride(N * P).
void compute_u(const Tensor& x, const Image& in, const OptionalTensor& w1, int64_t m,
               int64_t stride, void* u);
// Stores u, as compute_u writes it, of shape `u_shape` into dst [N, m, H, W] of the element type in
// `layout`.
void store_u(const void* u, const Image& u_shape, Tensor& dst, Layout layout);

// out [N, H, W, n] of the compute type in NHWC = packed_conv * x [N, H, W, C].
void lane_conv(const Image& x, const void* data, const Tensor& packed, int64_t n, void* out);

// The passes of one direction over maps in NHWC with channels along the lanes.
class LanePasses {
 public:
  LaneTrainArgs args{};

  explicit LanePasses(const TrainArgs& common);
  void pass(LaneStep step) const;
  void pass(LaneStep step, LaneStep merge) const;
  void forward();
  // Leaves du in args.g1 if need_du.
  void backward(bool need_du) const;

 private:
  Tensor sums_;
};

}  // namespace ghost
