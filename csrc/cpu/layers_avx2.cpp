#define GHOST_ISA avx2
#define GHOST_TABLE layers_avx2
#define GHOST_STRING_(x) #x
#define GHOST_STRING(x) GHOST_STRING_(x)
#include "cpu/layers.inc"
