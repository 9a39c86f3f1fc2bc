// Launchers of the forward passes, one launch each. They depend on CUDA, not on torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/cuda_plan.h"
#include "core/cuda_plan_pipelined.h"
#include "core/problem.h"
#include "cuda/params.h"

namespace ghost::cuda {

// Partial statistics in the compute type: split s has count[s] values of every channel.
struct PartialsRef {
  void* mean = nullptr;   // [channels, splits]
  void* m2 = nullptr;     // [channels, splits], sums of squared deviations
  void* count = nullptr;  // [splits]
  int64_t splits = 0;
};

struct NormArgs {
  NormSource source = NormSource::kReady;
  const void* scale = nullptr;  // compute type, as shift
  const void* shift = nullptr;
  ParamRef gamma, beta, mean, var;
  PartialsRef partials;
  double eps = 0;
  void* mean_out = nullptr;  // kPartials: the combined statistics [channels], compute type
  void* var_out = nullptr;
};

struct ForwardArgs {
  Problem problem;
  CudaPlan plan;                  // of the kernel that is launched
  PipelinedPlan pipelined;        // of ghost_apply_pipelined, which is tried first if it has blocks
  const void* x = nullptr;        // [N, C, H, W] dense in problem.layout; u if w1 is null
  const void* w1 = nullptr;       // [m, C]
  const void* in_gate = nullptr;  // [N, C] of x's dtype, multiplied to x, or null
  NormArgs norm1, norm2;          // of m and of g channels
  ParamRef w2;                    // [g, d, d]
  ParamRef slopes1, slopes2;      // of a PReLU, [m] and [g]
  const void* residual = nullptr;  // like out
  const void* gate = nullptr;      // [N, out_channels, gate_height, gate_width], or null
  void* out = nullptr;             // apply: [N, out_channels, Ho, Wo]; primary stats: u or null
  PartialsRef partials;            // statistics: splits = plan.tile.workers
};

cudaError_t launch_ghost_apply(const ForwardArgs& args, cudaStream_t stream);
// cudaErrorNotSupported: launch_ghost_apply launches ghost_apply_kernel instead.
cudaError_t launch_pipelined_half(const ForwardArgs& args, cudaStream_t stream);
cudaError_t launch_pipelined_bfloat16(const ForwardArgs& args, cudaStream_t stream);
cudaError_t launch_ghost_cheap_stats(const ForwardArgs& args, cudaStream_t stream);
cudaError_t launch_ghost_primary_stats(const ForwardArgs& args, cudaStream_t stream);

// mean and biased variance [channels] from partial statistics; zeros without splits.
cudaError_t launch_combine_stats(const PartialsRef& partials, DType dtype, int64_t channels,
                                 void* mean, void* var, cudaStream_t stream);

struct PackArgs {
  DType dtype = DType::kFloat32;
  int64_t channels = 0, intrinsic = 0, ghosts = 0, dw_size = 3;
  const void* w1 = nullptr;  // [m, C] of dtype, or null
  NormArgs norm1, norm2;     // kGiven
  ParamRef w2;
  ParamRef prelu1, prelu2;  // slopes [m] and [g] behind the rest, or none
  void* packed = nullptr;
  int64_t packed_bytes = 0;  // bytes past CudaPackedLayout::bytes are cleared
};
cudaError_t launch_ghost_pack(const PackArgs& args, cudaStream_t stream);

}  // namespace ghost::cuda
