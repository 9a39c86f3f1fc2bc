// Last launch of the backward pass, from partial sums to gradients:
//
//   out[i] = sum over r < rows of part[r * pitch + i]
//
// Tile map: a block owns up to 32 numbers of one gradient, eight threads each.
// Binding resource: launch latency, and the reads of the partial sums, which the launches before
// keep to a few megabytes.
#pragma once

#include "cuda/backward_common.cuh"

namespace ghost::cuda {

// out[i] = sum over r < rows of part[r * pitch + i], i < count.
struct SumJob {
  const void* part = nullptr;  // accumulator type
  int64_t pitch = 0, count = 0;
  int rows = 0;
  void* out = nullptr;
  bool narrow = false;  // out is of x's type, else of the accumulator's
  int first_block = 0;
};
inline constexpr int kMaxSumJobs = 8;
inline constexpr int kSumsPerBlock = 32;

struct FinishParams {
  SumJob jobs[kMaxSumJobs];
  int count = 0;

  int blocks = 0;  // of the jobs added so far
  void add(SumJob job) {
    if (job.count == 0) return;
    job.first_block = blocks;
    blocks += static_cast<int>((job.count + kSumsPerBlock - 1) / kSumsPerBlock);
    jobs[count++] = job;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) ghost_backward_finish_kernel(FinishParams p) {
  using A = Accumulator<T>;
  GHOST_DYN_SHARED(A, shared);
  int which = 0;
  const int block = static_cast<int>(blockIdx.x);
#pragma unroll
  for (int i = 1; i < kMaxSumJobs; ++i)
    if (i < p.count && block >= p.jobs[i].first_block) which = i;
  SumJob job = p.jobs[0];
#pragma unroll
  for (int i = 1; i < kMaxSumJobs; ++i)
    if (i == which) job = p.jobs[i];
  const int64_t first = int64_t{block - job.first_block} * kSumsPerBlock;
  const int64_t left = job.count - first;
  sum_rows(static_cast<const A*>(job.part) + first, job.rows, job.pitch,
           static_cast<int>(left < kSumsPerBlock ? left : kSumsPerBlock), shared,
           [&](int i, A sum) {
             if (job.narrow)
               static_cast<T*>(job.out)[first + i] = prim::from_float<T>(sum);
             else
               static_cast<A*>(job.out)[first + i] = sum;
           });
}

}  // namespace ghost::cuda
