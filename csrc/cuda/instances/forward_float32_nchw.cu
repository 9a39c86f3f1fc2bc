#include "cuda/forward_instances.cuh"

GHOST_FORWARD_INSTANCES(FloatPolicy, Layout::kNCHW, GHOST_PLAIN_CASES, GHOST_PLAIN_CASES)
