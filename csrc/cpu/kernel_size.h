// The sizes of a depthwise kernel, 1, 3, 5 and 7, as compile-time constants.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace ghost {
namespace GHOST_ISA {

// Calls f with std::integral_constant<int, size>.
template <class F>
GHOST_INLINE void with_kernel_size(int64_t size, F&& f) {
  switch (size) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 7:
      return f(std::integral_constant<int, 7>{});
  }
}

}  // namespace GHOST_ISA
}  // namespace ghost
