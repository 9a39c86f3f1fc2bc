#include "cuda/layers_instances.cuh"

GHOST_LAYER_INSTANCES(double)
