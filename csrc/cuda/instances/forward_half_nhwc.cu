#include "cuda/forward_instances.cuh"

GHOST_FORWARD_INSTANCES(HalfPolicy, Layout::kNHWC, GHOST_TENSOR_CASES)
