#include "cuda/forward_instances.cuh"

GHOST_FORWARD_INSTANCES(BFloat16Policy, Layout::kNHWC, GHOST_DIRECT_CASES, GHOST_TENSOR_CASES)
