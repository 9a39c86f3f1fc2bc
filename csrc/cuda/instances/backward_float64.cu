#include "cuda/backward_instances.cuh"

GHOST_BACKWARD_TYPE_INSTANCES(double)
GHOST_BACKWARD_PRODUCT_INSTANCES(DoublePolicy)
