#define GHOST_ISA generic
#define GHOST_TABLE tail_generic
#define GHOST_STRING_(x) #x
#define GHOST_STRING(x) GHOST_STRING_(x)
#include "cpu/tail_kernels.inc"
