#include "cpu/layers.h"

#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace ghost {

const LayerKernels& active_layers() {
  const char* name = active_kernels().name;
#if defined(GHOST_OPS_HAVE_AVX512)
  if (std::strncmp(name, "avx512", 6) == 0) return *layers_avx512();
#endif
#if defined(GHOST_OPS_HAVE_AVX2)
  if (std::strcmp(name, "avx2") == 0) return *layers_avx2();
#endif
  (void)name;
  return *layers_generic();
}

}  // namespace ghost
