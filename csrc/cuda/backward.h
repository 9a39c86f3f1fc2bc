// Backward of a Ghost module on the GPU, in at most four launches. Depends on CUDA, not on torch.
//
//   u = w1 * x,  y = act1(bn1(u)),  v = w2 (*) y,  z = act2(bn2(v))
//   out = concat(y, z)[:, :out_channels]
//
//   1. sums      u again (unless it is given), y, v
//                da2 = dz act2'(bn2(v))
//                the sums of da2 and of da2 * vhat: dbeta2 and dgamma2
//   2. grads     dv  = bn2'(da2)
//                dw2 = dv correlated with y
//                da1 = (dy + w2 backwards on dv) act1'(bn1(u))
//                the sums of da1 and of da1 * uhat: dbeta1 and dgamma1
//   3. primary   du  = bn1'(da1), never stored
//                dx  = du w1
//                dw1 = du^T x, in slices of the pixels
//                dx and dw1 by the same blocks if dw1 fits into registers
//   4. finish    adds up the partial sums of dw1, dw2, dgamma, dbeta and dslopes
//
// uhat, vhat: the normalised inputs of bn1 and bn2. N images, m intrinsic channels, g ghosts.
// Every sum is made of partial sums in a fixed order: the same input gives the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/cuda_plan_backward.h"
#include "core/problem.h"
#include "cuda/forward.h"

namespace ghost::cuda {

struct BackwardArgs {
  Problem problem;  // height and width are those of x
  BackwardPlan plan;
  const void* grad_out = nullptr;  // [N, out_channels, Ho, Wo]
  int64_t grad_strides[4] = {};    // in elements, of n, c, h, w; 0 where expanded
  const void* x = nullptr;         // [N, C, H, W], dense in problem.layout
  const void* u = nullptr;         // [N, m, Ho, Wo], dense in problem.layout, or null
  const void* w1 = nullptr;        // [m, C], or null without a primary convolution
  ParamRef w2;                     // [g, d, d]
  NormArgs norm1, norm2;           // kGiven, of m and of g channels
  ParamRef slopes1, slopes2;       // of a PReLU, [m] and [g]
  // batch_stats: mean and var are functions of x. means1 [2, m] and means2 [2, g], of the compute
  // type, are the means of da and of da * uhat over all values (of several processes); they replace
  // the sums of this batch. Null: not given.
  bool batch_stats1 = true, batch_stats2 = true;
  const void *means1 = nullptr, *means2 = nullptr;
  // The gradients that plan.needs names, the others null. Vectors in the compute type.
  void* dx = nullptr;                                               // like x
  void* dw1 = nullptr;                                              // like w1
  void *dgamma1 = nullptr, *dbeta1 = nullptr, *dslopes1 = nullptr;  // [m]
  void* dw2 = nullptr;                                              // like w2
  void *dgamma2 = nullptr, *dbeta2 = nullptr, *dslopes2 = nullptr;  // [g]
  void* scratch = nullptr;  // plan.scratch_bytes, aligned to 256 bytes
};

// Whether the kernels can read a given u [N, m, Ho, Wo], dense in problem.layout, without a copy:
// it is pixel-major, and its rows begin at multiples of 16 bytes.
inline bool is_pixel_rows(const Problem& problem, const void* u) {
  return u != nullptr && problem.layout == Layout::kNHWC &&
         problem.intrinsic * element_size(problem.dtype) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(u) % 16 == 0;
}

// The batch must not be empty.
cudaError_t launch_ghost_backward(const BackwardArgs& args, cudaStream_t stream);

}  // namespace ghost::cuda
