// One growing, cache-line aligned buffer a thread: tiles live in it and die with the call, without
// page faults every time.
#pragma once

#include <cstddef>

namespace ghost {
void* thread_scratch(std::size_t bytes);
}
