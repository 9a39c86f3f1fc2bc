// One page-aligned buffer for each thread, which only grows: tiles live in it during a call, and
// the next call finds its pages mapped.
#pragma once

#include <cstddef>

namespace ghost {
void* thread_scratch(std::size_t bytes);
}
