#define GHOST_ISA generic
#define GHOST_TABLE layers_generic
#define GHOST_STRING_(x) #x
#define GHOST_STRING(x) GHOST_STRING_(x)
#include "cpu/layers.inc"
