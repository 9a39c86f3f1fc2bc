#include "cuda/forward_instances.cuh"

GHOST_FORWARD_INSTANCES(BFloat16Policy, Layout::kNCHW, GHOST_TENSOR_CASES, GHOST_TENSOR_CASES)
