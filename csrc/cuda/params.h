// Per-channel parameters of the launchers. Plain data, no CUDA.
#pragma once

#include "core/problem.h"

namespace ghost::cuda {

// A vector of parameters [channels] (or taps [channels, d, d]) of any floating dtype. data null:
// not given.
struct ParamRef {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// The source of the scale and shift of a batch norm.
//   kReady     scale (null: 1) and shift (null: 0), in the compute type
//   kGiven     gamma, beta, mean, var (null: 1, 0, 0, 1)
//   kPartials  mean and var are combined from partial statistics first
enum class NormSource : int { kReady, kGiven, kPartials };

}  // namespace ghost::cuda
