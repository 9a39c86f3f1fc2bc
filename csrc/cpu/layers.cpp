#include "cpu/layers.h"

#include "cpu/dispatch.h"

namespace ghost {

const LayerKernels& active_layers() {
  const LayerKernels *avx512 = nullptr, *avx2 = nullptr;
#if defined(GHOST_OPS_HAVE_AVX512)
  avx512 = layers_avx512();
#endif
#if defined(GHOST_OPS_HAVE_AVX2)
  avx2 = layers_avx2();
#endif
  return table_in_use(avx512, avx2, layers_generic());
}

}  // namespace ghost
