#include "cpu/tail_kernels.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace ghost {

const TailKernels& active_tail() {
  const char* name = active_kernels().name;
#if defined(GHOST_OPS_HAVE_AVX512)
  if (std::strcmp(name, "avx512") == 0) return *tail_avx512();
#endif
#if defined(GHOST_OPS_HAVE_AVX2)
  if (std::strcmp(name, "avx2") == 0) return *tail_avx2();
#endif
  (void)name;
  return *tail_generic();
}

}  // namespace ghost
