#define GHOST_ISA generic
#define GHOST_TABLE kernels_generic
#define GHOST_STRING_(x) #x
#define GHOST_STRING(x) GHOST_STRING_(x)
#include "cpu/kernels.inc"
