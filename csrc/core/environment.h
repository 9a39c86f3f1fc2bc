// Environment variables that only the native libraries read. ghost_ops/environment.py lists and
// checks them.
#pragma once

#include <cstdlib>
#include <cstring>

namespace ghost {

// Whether the variable is "1".
inline bool is_switched_on(const char* variable) {
  const char* const value = std::getenv(variable);
  return value != nullptr && std::strcmp(value, "1") == 0;
}

}  // namespace ghost
