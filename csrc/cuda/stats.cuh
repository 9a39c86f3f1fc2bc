// Partial statistics: mean and sum of squared deviations of a block's values, per channel.
//
//   sum = sum of (v - k),  squares = sum of (v - k)^2         k: the shift
//   mean = k + sum / n,    m2 = squares - sum^2 / n
//
// The shift k is a thread's first value and, from the second tile on, the mean of its first tile:
// sums about 0 would lose the digits of a variance that is small beside the mean. Slots (threads or
// lanes of a channel) and blocks are joined in a fixed order: the same input gives the same bits.
// Tile map: a thread joins the slots of every 256th channel of its block.
// Binding resource: reads of shared memory, once per block.
#pragma once

#include "cuda/tile.cuh"

namespace ghost::cuda {

// Of some values of a channel: the sums of v - shift and of its square.
template <class A>
struct ShiftedSums {
  A shift = A(0), sum = A(0), squares = A(0);

  __device__ __forceinline__ void add(A v) {
    const A d = v - shift;
    sum += d;
    squares = prim::fma(d, d, squares);
  }
  // Moves the shift to the mean of the n values.
  __device__ __forceinline__ void center(A n) {
    const A mean = n > A(0) ? shift + sum / n : shift, d = mean - shift, rest = sum - n * d;
    squares -= d * (sum + rest);
    sum = rest;
    shift = mean;
  }
};

// The statistics of a block from those of its slots, in shared memory: slot s has n[s] values, with
// the sums at s * stride + c for channel c. Slot 0 has values if any slot has. Writes split `split`
// of the partials of channel first + c * step, c < valid. All threads call it, after a
// sync_threads.
template <class A>
__device__ __forceinline__ void write_partials(const Partials<A>& out, int split, int64_t first,
                                               int step, int valid, bool writes_count, int slots,
                                               const A* n, const A* shift, const A* sum,
                                               const A* squares, int stride) {
#pragma unroll 1
  for (int c = int(threadIdx.x); c < valid; c += kThreads) {
    const A base = shift[c];
    A total = A(0), from_base = A(0);
#pragma unroll 2
    for (int s = 0; s < slots; ++s) {
      const int at = s * stride + c;
      total += n[s];
      from_base += n[s] > A(0) ? sum[at] + n[s] * (shift[at] - base) : A(0);
    }
    from_base = total > A(0) ? from_base / total : A(0);
    A m2 = A(0);
#pragma unroll 2
    for (int s = 0; s < slots; ++s) {
      const int at = s * stride + c;
      if (!(n[s] > A(0))) continue;
      const A d = shift[at] - base - from_base;
      m2 += squares[at] + d * (A(2) * sum[at] + n[s] * d);
    }
    // The mean is rounded. When the splits are joined, m2 gains the squares of the rounding errors
    // of their means, less the square of the mean error: on average the share 1 - 1 / splits, which
    // is subtracted here.
    const A mean = base + from_base, error = mean - base - from_base;
    m2 -= total * error * error * (A(1) - A(1) / A(out.splits));
    const int64_t at = (first + int64_t(c) * step) * out.splits + split;
    out.mean[at] = mean;
    out.m2[at] = m2 < A(0) ? A(0) : m2;  // NaN stays NaN
    if (writes_count && c == 0) out.count[split] = total;
  }
}

}  // namespace ghost::cuda
