// The four launches of the backward pass (backward.h): from plain data to typed kernel parameters.
#include "cuda/backward.h"

#include <cstdlib>
#include <limits>

#include "cuda/backward_instances.cuh"
#include "cuda/typed.cuh"

namespace ghost::cuda {
namespace {

template <class T>
class BackwardLaunch {
  using A = Accumulator<T>;
  const BackwardArgs& args_;
  const BackwardPlan& plan_;
  const Problem& p_;
  cudaStream_t stream_;
  int64_t height_, width_, pixels_, ghosts_;
  int ghosts_per_map_, dw_size_;
  unsigned char* scratch_;
  // u [pixel][u_pitch_]; rows of da1 are da1_pitch_ elements apart
  const T* u_rows_;
  int64_t u_pitch_, da1_pitch_;

 public:
  BackwardLaunch(const BackwardArgs& args, cudaStream_t stream)
      : args_(args),
        plan_(args.plan),
        p_(args.problem),
        stream_(stream),
        height_(p_.out_height()),
        width_(p_.out_width()),
        pixels_(p_.batch * p_.out_pixels()),
        ghosts_(p_.ghosts()),
        ghosts_per_map_(int(p_.ghosts_per_map())),
        dw_size_(ghosts_per_map_ > 0 ? int(p_.dw_size) : 1),
        scratch_(static_cast<unsigned char*>(args.scratch)),
        u_rows_(plan_.stores_u ? at<T>(plan_.u) : static_cast<const T*>(given_u())),
        u_pitch_(plan_.row_channels),
        da1_pitch_(round_up(p_.intrinsic, 8)) {}

  template <class Sums, class Products>
  cudaError_t run(Sums, Products) {
    if (plan_.runs_sums)
      if (const cudaError_t status = sums<Sums>(); status != cudaSuccess) return status;
    if (plan_.runs_grads)
      if (const cudaError_t status = grads(); status != cudaSuccess) return status;
    if (plan_.primary.blocks() > 0)
      if (const cudaError_t status = primary<Products>(); status != cudaSuccess) return status;
    return finish();
  }

 private:
  bool needs(int what) const { return (plan_.needs & what) != 0; }
  template <class U>
  U* at(int64_t section) const {
    return reinterpret_cast<U*>(scratch_ + section);
  }
  // The caller's u [N, m, Ho, Wo], or null.
  const void* given_u() const { return p_.has_primary ? args_.u : args_.x; }

  // Parameters common to the two depthwise launches (sums, grads).
  CheapParams cheap_params(int channels) const {
    CheapParams c;
    c.batch = int(p_.batch);
    c.height = int(height_);
    c.width = int(width_);
    c.intrinsic = int(p_.intrinsic);
    c.ghosts_per_map = ghosts_per_map_;
    c.out_channels = int(p_.out_channels);
    c.d = dw_size_;
    c.by_vectors = FastDiv(channels / kVector<T>);
    c.by_pairs = FastDiv(channels / 2);
    c.act1 = p_.act1.act;
    c.act2 = p_.act2.act;
    c.slope1 = p_.act1.slope;
    c.slope2 = p_.act2.slope;
    c.slopes1 = args_.slopes1;
    c.slopes2 = args_.slopes2;
    c.norm1 = NormParams(args_.norm1);
    c.norm2 = NormParams(args_.norm2);
    c.w2 = args_.w2;
    c.batch_stats = args_.batch_stats2;
    const int64_t* s = args_.grad_strides;
    c.grad.data = args_.grad_out;
    c.grad.image = s[0];
    c.grad.channel = s[1];
    c.grad.row = s[2];
    c.grad.col = s[3];
    c.grad.pixels_first = std::abs(s[3]) < std::abs(s[1]);
    c.y_grad_bytes = grad_bytes(0);
    // Ghosts of neighbouring channels are neighbours only if there is one ghost per map.
    c.z_grad_bytes = ghosts_per_map_ == 1 ? grad_bytes(p_.intrinsic) : 0;
    return c;
  }

  // Width of aligned copies of neighbouring channels of grad_out, counted from `channel` on; 0 if
  // its channels are not neighbours.
  int grad_bytes(int64_t channel) const {
    const int64_t* s = args_.grad_strides;
    if (s[1] != 1 && p_.out_channels > 1) return 0;
    const auto* base = static_cast<const T*>(args_.grad_out) + channel;
    for (int bytes : {16, 8}) {
      const int64_t elements = bytes / int64_t(sizeof(T));
      if (elements > 0 && reinterpret_cast<uintptr_t>(base) % size_t(bytes) == 0 &&
          (s[0] % elements == 0 || p_.batch == 1) && (s[2] % elements == 0 || height_ == 1) &&
          (s[3] % elements == 0 || width_ == 1))
        return bytes;
    }
    return 0;
  }
  // Elements from pixel to pixel of gradients in shared memory: aligned for 16-byte copies, else an
  // odd number of words, which keeps neighbouring pixels in different banks.
  static int grad_stride(const CheapParams& c, int channels) {
    return channels + (c.y_grad_bytes > 0 || c.z_grad_bytes > 0 ? 0 : 2);
  }

  template <class Sums>
  cudaError_t sums() const {
    const CudaTile& t = plan_.sums.tile;
    ForwardArgs forward;
    forward.problem = p_;
    forward.problem.dw_size = dw_size_;
    forward.plan = plan_.sums;
    forward.x = given_u();
    forward.norm1 = args_.norm1;
    forward.slopes1 = args_.slopes1;
    if (!plan_.sums_ghosts) forward.problem.ratio = forward.problem.dw_size = 1;
    if (p_.has_primary && args_.u == nullptr) {
      forward.x = args_.x;
      forward.w1 = args_.w1;
    } else {
      forward.problem.channels = p_.intrinsic;
      forward.problem.height = height_;
      forward.problem.width = width_;
      forward.problem.stride = 1;
    }
    SumsParams<T> params;
    params.tile = t;
    params.maps = maps_of(forward.problem, t);
    params.intrinsic = intrinsic_of<T>(forward);
    if (plan_.stores_u) {
      params.u_rows = at<T>(plan_.u);
      params.u_pitch = u_pitch_;
    }
    params.by_pitch = FastDiv(t.pitch);
    params.by_image_rows = FastDiv(t.image_rows);
    CheapParams& c = params.cheap = cheap_params(t.channels);
    if (!plan_.sums_ghosts) {
      c.ghosts_per_map = 0;
      c.d = 1;
    }
    c.sums2 = at<A>(plan_.sums2);
    if (needs(kNeedPrelu2)) c.slope_sums2 = at<A>(plan_.slope_sums2);
    c.tile.channels = t.channels;
    c.tile.images = t.images;
    c.tile.rows = t.rows;
    c.tile.cols = t.cols;
    c.v = c.inner = PixelBox(t.images, t.rows, t.cols);
    c.v_strips = PixelBox(t.images, t.rows, (t.cols + kStrip - 1) / kStrip);
    c.y_map = {t.image_rows, t.pitch, t.y_stride};
    c.grad_map = {t.rows, t.cols, grad_stride(c, t.channels)};
    return Sums::run(params, stream_);
  }

  cudaError_t grads() const {
    const GradsTile& t = plan_.grads;
    CheapParams c = cheap_params(t.channels);
    const int pad = dw_size_ / 2, v_rows = t.rows + 2 * t.halo_rows,
              v_cols = t.cols + 2 * t.halo_cols;
    c.tile = t;
    c.y = PixelBox(t.images, v_rows + 2 * pad, v_cols + 2 * pad);
    c.v = PixelBox(t.images, v_rows, v_cols);
    c.v_strips = PixelBox(t.images, v_rows, (v_cols + kStrip - 1) / kStrip);
    c.inner = PixelBox(t.images, t.rows, t.cols);
    c.inner_strips = PixelBox(t.images, t.rows, (t.cols + kStrip - 1) / kStrip);
    const int stride = grad_stride(c, t.channels);
    c.y_map = {c.y.rows, c.y.cols, t.channels};
    c.grad_map = {t.rows + 2 * pad, t.cols + 2 * pad, stride};
    c.dy_map = {t.rows, t.cols, stride};
    c.u = u_rows_;
    c.u_pitch = u_pitch_;
    // Given means are passed as one row of sums of one value.
    c.sums2 = args_.means2 != nullptr ? const_cast<void*>(args_.means2) : at<A>(plan_.sums2);
    c.sums2_rows = args_.means2 != nullptr ? 1 : plan_.sums.tile.workers;
    c.values2 = args_.means2 != nullptr ? 1.0 : double(pixels_);
    if (plan_.primary.blocks() > 0) {
      c.da1 = at<T>(plan_.da1);
      c.da1_pitch = da1_pitch_;
    }
    if (needs(kNeedDy)) c.sums1 = at<A>(plan_.sums1);
    if (needs(kNeedPrelu1)) c.slope_sums1 = at<A>(plan_.slope_sums1);
    if (needs(kNeedDw2)) c.dw2_sums = at<A>(plan_.dw2_sums);
    return BackwardKernels<T>::grads(c, stream_);
  }

  template <class Products>
  cudaError_t primary() const {
    PrimaryParams q;
    q.pixels = int(pixels_);
    q.intrinsic = int(p_.intrinsic);
    q.channels = int(p_.channels);
    q.height = int(p_.height);
    q.width = int(p_.width);
    q.stride = int(p_.stride);
    q.nhwc = p_.layout == Layout::kNHWC;
    q.has_primary = p_.has_primary;
    q.batch_stats = args_.batch_stats1;
    q.by_plane = FastDiv(height_ * width_);
    q.by_width = FastDiv(width_);
    q.da1 = at<T>(plan_.da1);
    q.da1_pitch = da1_pitch_;
    q.u = u_rows_;
    q.u_pitch = u_pitch_;
    q.norm1 = NormParams(args_.norm1);
    q.sums1 = args_.means1 != nullptr ? args_.means1 : at<A>(plan_.sums1);
    q.sums1_rows = args_.means1 != nullptr ? 1 : plan_.grads.workers;
    q.values1 = args_.means1 != nullptr ? 1.0 : double(pixels_);
    q.x = args_.x;
    q.w1 = args_.w1;
    q.dx = args_.dx;
    q.dw1_sums = at<A>(plan_.dw1_sums);
    const int64_t run = q.nhwc ? p_.channels : p_.height * p_.width;
    q.x_bytes = copy_bytes<T>(args_.x, run);
    q.dx_bytes = copy_bytes<T>(args_.dx, run);
    q.w1_bytes = copy_bytes<T>(args_.w1, p_.channels);
    q.plan = plan_.primary;
    if constexpr (sizeof(T) == 2)
      if (q.plan.du.workers > 0) return Products::du(q, stream_);
    return Products::primary(q, stream_);
  }

  cudaError_t finish() const {
    FinishParams f;
    const int64_t m = p_.intrinsic, taps = ghosts_ * dw_size_ * dw_size_, w1 = m * p_.channels;
    const auto add = [&](int64_t section, int64_t offset, int64_t pitch, int64_t count, int rows,
                         void* out, bool narrow) {
      if (out == nullptr) return;
      SumJob job;
      job.part = at<A>(section) + offset;
      job.pitch = pitch;
      job.count = count;
      job.rows = rows;
      job.out = out;
      job.narrow = narrow;
      f.add(job);
    };
    const int sums_workers = plan_.sums.tile.workers, workers = plan_.grads.workers;
    add(plan_.dw1_sums, 0, w1, w1, plan_.primary.dw1_splits, args_.dw1, true);
    add(plan_.dw2_sums, 0, taps, taps, workers, args_.dw2, true);
    add(plan_.sums2, 0, 2 * ghosts_, ghosts_, sums_workers, args_.dbeta2, false);
    add(plan_.sums2, ghosts_, 2 * ghosts_, ghosts_, sums_workers, args_.dgamma2, false);
    add(plan_.slope_sums2, 0, ghosts_, ghosts_, sums_workers, args_.dslopes2, false);
    add(plan_.sums1, 0, 2 * m, m, workers, args_.dbeta1, false);
    add(plan_.sums1, m, 2 * m, m, workers, args_.dgamma1, false);
    add(plan_.slope_sums1, 0, m, m, workers, args_.dslopes1, false);
    return f.count > 0 ? BackwardKernels<T>::finish(f, stream_) : cudaSuccess;
  }
};

template <class P>
cudaError_t launch(const BackwardArgs& args, cudaStream_t stream) {
  BackwardLaunch<typename P::T> backward(args, stream);
  return args.problem.layout == Layout::kNHWC
             ? backward.run(BackwardSums<P, Layout::kNHWC>{}, BackwardProducts<P>{})
             : backward.run(BackwardSums<P, Layout::kNCHW>{}, BackwardProducts<P>{});
}

}  // namespace

cudaError_t launch_ghost_backward(const BackwardArgs& args, cudaStream_t stream) {
  const Problem& p = args.problem;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (p.batch * p.out_pixels() > kMost - kMostDuPixels) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat16:
      return launch<HalfPolicy>(args, stream);
    case DType::kBFloat16:
      return launch<BFloat16Policy>(args, stream);
    case DType::kFloat64:
      return launch<DoublePolicy>(args, stream);
    case DType::kFloat32:
      break;
  }
  return args.plan.tensor_cores ? launch<Tf32Policy>(args, stream)
                                : launch<FloatPolicy>(args, stream);
}

}  // namespace ghost::cuda
