#include "cuda/backward_instances.cuh"

GHOST_BACKWARD_TYPE_INSTANCES(prim::bfloat16_t)
GHOST_BACKWARD_PRODUCT_INSTANCES(BFloat16Policy)
