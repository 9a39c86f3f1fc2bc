// Partial statistics: mean and sum of squared deviations of a block's share, per channel. Sums of
// squares minus squares of sums would lose digits, so groups of values are joined by Chan's formula
// and the block's threads in a fixed order: the same input gives the same bits.
#pragma once

#include "cuda/tile.cuh"

namespace ghost::cuda {

// Joins `count` > 0 of the N values v to (n, mean, m2); n is the number of values before and
// share = count / (n + count).
template <class A, int N>
__device__ __forceinline__ void add_values(const A (&v)[N], int count, A n, A share, A& mean,
                                           A& m2) {
  A sum = A(0);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += i < count ? v[i] : A(0);
  const A center = sum / A(count);
  A squares = A(0);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A d = v[i] - center;
    squares += i < count ? d * d : A(0);
  }
  const A d = center - mean;
  mean += d * share;
  m2 += squares + d * d * n * share;
}

// The statistics of a block from those of its slots, in shared memory: slot s saw n[s] values, with
// mean[s * stride + c] and m2[s * stride + c] for channel c. Writes split `split` of the partials
// of channel first + c * step, c < valid. All threads call it, after a sync_threads.
template <class A>
__device__ __forceinline__ void write_partials(const Partials<A>& out, int split, int64_t first,
                                               int step, int valid, bool writes_count, int slots,
                                               const A* n, const A* mean, const A* m2, int stride) {
#pragma unroll 1
  for (int c = int(threadIdx.x); c < valid; c += kThreads) {
    A total = A(0), sum = A(0);
#pragma unroll 2
    for (int s = 0; s < slots; ++s) {
      total += n[s];
      sum += n[s] > A(0) ? n[s] * mean[s * stride + c] : A(0);
    }
    const A center = total > A(0) ? sum / total : A(0);
    A squares = A(0);
#pragma unroll 2
    for (int s = 0; s < slots; ++s) {
      if (!(n[s] > A(0))) continue;
      const A d = mean[s * stride + c] - center;
      squares += m2[s * stride + c] + n[s] * d * d;
    }
    const int64_t at = (first + int64_t(c) * step) * out.splits + split;
    out.mean[at] = center;
    out.m2[at] = squares;
    if (writes_count && c == 0) out.count[split] = total;
  }
}

}  // namespace ghost::cuda
