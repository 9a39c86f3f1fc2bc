#include "cuda/forward_instances.cuh"

GHOST_FORWARD_INSTANCES(DoublePolicy, Layout::kNCHW, GHOST_PLAIN_CASES, GHOST_PLAIN_CASES)
