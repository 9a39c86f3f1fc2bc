#include "cuda/forward_instances.cuh"

GHOST_FORWARD_INSTANCES(DoublePolicy, Layout::kNHWC, GHOST_PLAIN_CASES, GHOST_PLAIN_CASES)
