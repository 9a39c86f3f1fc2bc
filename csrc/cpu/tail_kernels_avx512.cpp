#define GHOST_ISA avx512
#define GHOST_TABLE tail_avx512
#define GHOST_STRING_(x) #x
#define GHOST_STRING(x) GHOST_STRING_(x)
#include "cpu/tail_kernels.inc"
