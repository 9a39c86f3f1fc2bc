#define GHOST_ISA avx2
#define GHOST_TABLE tail_avx2
#define GHOST_STRING_(x) #x
#define GHOST_STRING(x) GHOST_STRING_(x)
#include "cpu/tail_kernels.inc"
