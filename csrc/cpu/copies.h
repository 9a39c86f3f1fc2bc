// Copies that change the order of values in memory. Tile map: a thread takes a range of pixels or
// of runs. Binding resource: the memory bus.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace ghost {

// x [C][pixels] -> out [pixels][C].
template <int C, class T>
void planes_to_pixels(const T* x, T* out, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i)
    for (int c = 0; c < C; ++c) out[i * C + c] = x[c * pixels + i];
}

// Copies runs [begin, end) of `bytes` bytes each: adjacent in `from`, `step` bytes apart in `to`.
inline void spread_runs(const char* from, int64_t bytes, char* to, int64_t step, int64_t begin,
                        int64_t end) {
  for (int64_t r = begin; r < end; ++r) std::memcpy(to + r * step, from + r * bytes, size_t(bytes));
}

// Runs of an item of the parallel loop: about 16 KiB of results.
inline int64_t runs_per_item(int64_t bytes) {
  return std::max<int64_t>(int64_t{1 << 14} / std::max<int64_t>(bytes, 1), 1);
}

}  // namespace ghost
