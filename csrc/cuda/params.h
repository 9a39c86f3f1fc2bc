// Per-channel parameters as the launchers pass them on. Plain data, no CUDA.
#pragma once

#include "core/problem.h"

namespace ghost::cuda {

// A vector of parameters [channels] (or taps [channels, d, d]) in whatever dtype it is stored; data
// null: not given.
struct ParamRef {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// Where the scale and shift of a batch norm come from.
//   kReady     scale (null: 1) and shift (null: 0) as they are, in the compute type
//   kGiven     gamma, beta, mean, var (null: 1, 0, 0, 1)
//   kPartials  mean and var are combined from partial statistics first
enum class NormSource : int { kReady, kGiven, kPartials };

}  // namespace ghost::cuda
