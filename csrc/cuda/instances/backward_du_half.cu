#include "cuda/backward_instances.cuh"

GHOST_BACKWARD_DU_INSTANCES(HalfPolicy)
