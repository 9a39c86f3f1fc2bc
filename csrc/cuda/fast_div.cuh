// Division by a number that is known only at run time, as a multiplication and a shift.
#pragma once

#include <cstdint>

#include "cuda/prim.cuh"

namespace ghost::cuda {

// Quotients n / divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31, exact for all of them:
//
//   n / divisor = n * ceil(2^(31 + s) / divisor) >> (31 + s),   s = ceil(log2(divisor))
//
// (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994, theorem 4.2)
struct FastDiv {
  uint32_t factor = 0x80000000u;
  int32_t shift = 31, divisor = 1;

  FastDiv() = default;
  __host__ __device__ __forceinline__ explicit FastDiv(int divisor_) : divisor(divisor_) {
    int s = 0;
    while ((int64_t{1} << s) < divisor) ++s;
    shift = 31 + s;
    factor = uint32_t(((uint64_t{1} << shift) + uint64_t(divisor) - 1) / uint64_t(divisor));
  }
  __device__ __forceinline__ int operator()(int n) const {
    return int((uint64_t(uint32_t(n)) * factor) >> shift);
  }
  // n becomes n % divisor; returns the quotient.
  __device__ __forceinline__ int split(int& n) const {
    const int quotient = (*this)(n);
    n -= quotient * divisor;
    return quotient;
  }
};

}  // namespace ghost::cuda
