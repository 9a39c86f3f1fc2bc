#include "cuda/forward_instances.cuh"

GHOST_FORWARD_INSTANCES(HalfPolicy, Layout::kNHWC, GHOST_APPLY_CASES, GHOST_DIRECT_CASES)
