#include "cpu/tail_kernels.h"

#include "cpu/dispatch.h"

namespace ghost {

const TailKernels& active_tail() {
  const TailKernels *avx512 = nullptr, *avx2 = nullptr;
#if defined(GHOST_OPS_HAVE_AVX512)
  avx512 = tail_avx512();
#endif
#if defined(GHOST_OPS_HAVE_AVX2)
  avx2 = tail_avx2();
#endif
  return table_in_use(avx512, avx2, tail_generic());
}

}  // namespace ghost
