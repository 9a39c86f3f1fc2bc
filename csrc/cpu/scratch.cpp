#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace ghost {
namespace {
struct Buffer {
  void* data = nullptr;
  std::size_t size = 0;
  ~Buffer() { std::free(data); }
};
}  // namespace

void* thread_scratch(std::size_t bytes) {
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    std::free(buffer.data);
    buffer = Buffer{};
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    if (posix_memalign(&buffer.data, 4096, rounded) != 0) {
      buffer.data = nullptr;
      throw std::bad_alloc();
    }
    buffer.size = rounded;
  }
  return buffer.data;
}

}  // namespace ghost
