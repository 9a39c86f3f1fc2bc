#include "cuda/backward_instances.cuh"

GHOST_BACKWARD_TYPE_INSTANCES(prim::half_t)
GHOST_BACKWARD_PRODUCT_INSTANCES(HalfPolicy)
