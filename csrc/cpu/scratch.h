// Scratch memory of the calling thread, aligned to a page: one buffer that grows and is kept, so
// that a call causes no page faults. A call of thread_scratch ends the life of the one before.
#pragma once

#include <cstddef>

namespace ghost {
void* thread_scratch(std::size_t bytes);
}
