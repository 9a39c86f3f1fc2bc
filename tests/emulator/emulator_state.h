// The state of a block and of its threads, shared by the scheduler (emulator.cpp) and the copies
// (emulated_copies.cpp) of the block emulator.
#pragma once

#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <new>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace ghost::emu {

// A 16-bit pattern that is NaN as float16, bfloat16, float32 and float64, and an index far outside
// every array as an integer. 0xFFFF would be -1, which may be a valid table entry.
inline constexpr uint16_t kPoison = 0x7fff;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool wanted;
};

// A bulk store; `data` holds the bytes after it has read them.
struct BulkStore {
  void* to;
  const void* from;
  size_t bytes;
  std::vector<unsigned char> data;

  void read() {
    if (!data.empty()) return;
    const auto* first = static_cast<const unsigned char*>(from);
    data.assign(first, first + bytes);
  }
  void write() const { std::memcpy(to, data.data(), bytes); }
};
struct BulkGroup {
  std::vector<BulkStore> stores;
  bool waited = false;  // a thread has waited for its reads
};

// State of a barrier in shared memory, whose 8 bytes there hold only kMbarrierMark.
struct Mbarrier {
  unsigned arrivals, missing;  // of each phase; of the current one
  int64_t bytes = 0;           // expected in the current phase, less those that have landed
  unsigned phase = 0;
  unsigned thread, fences;  // the thread that initialised it, and its fences before
  std::vector<Copy> loads;  // not landed yet

  void settle() {
    if (missing != 0 || bytes != 0) return;
    ++phase;
    missing = arrivals;
  }
};
inline constexpr uint64_t kMbarrierMark = 0x7fff6d6261727fffu;

// The last ordinary write to two bytes of shared memory.
struct LastWrite {
  int thread = -1;
  unsigned fences = 0;  // fences of that thread before the write
};

// One CUDA thread.
struct Thread {
  dim3 index;
  unsigned lane = 0, warp = 0;
  bool done = false, waited = false;     // waited: for the kernel before this one
  const unsigned* generation = nullptr;  // it waits until this differs from `seen`
  unsigned seen = 0;
  Site site{};
  std::vector<Copy> copies;        // not performed yet, oldest first
  std::vector<size_t> group_ends;  // of the committed groups, as counts of copies
  std::vector<BulkStore> bulk_open;
  std::vector<BulkGroup> bulk_groups;
  unsigned fences = 0;
  Context context;
};

struct Warp {
  unsigned arrived = 0, generation = 0, exited = 0, size = 0;
  Site site{};
  WarpFunction function = nullptr;
  Slot in[32], out[32];
};

// The shared memory of a block: poisoned before each block; the bytes behind it are checked at its
// end.
class SharedMemory {
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kWatched = 0;  // the sanitizer checks accesses
#else
  static constexpr size_t kWatched = 4096;
#endif
  unsigned char* memory_ = nullptr;
  size_t bytes_;

 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) {
    void* p = nullptr;
    if (posix_memalign(&p, 128, bytes + kWatched) != 0) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(p);
  }
  ~SharedMemory() { std::free(memory_); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void* data() const { return memory_; }
  size_t bytes() const { return bytes_; }
  bool holds(const void* p, size_t bytes) const {
    const auto* first = static_cast<const unsigned char*>(p);
    return first >= memory_ && first + bytes <= memory_ + bytes_;
  }
  void poison() {
    for (size_t i = 0; i + 1 < bytes_ + kWatched; i += 2) {
      std::memcpy(memory_ + i, &kPoison, sizeof kPoison);
    }
  }
  bool overrun() const {
    for (size_t i = (bytes_ + 1) / 2 * 2; i + 1 < bytes_ + kWatched; i += 2) {
      if (std::memcmp(memory_ + i, &kPoison, sizeof kPoison) != 0) return true;
    }
    return false;
  }
};

struct Block {
  const char* kernel;
  dim3 index, size, grid;
  unsigned schedule, random;
  bool early = false;
  void (*body)(const void*);
  const void* argument;
  SharedMemory shared;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::map<const void*, Mbarrier> mbarriers;
  std::vector<LastWrite> last_writes;  // empty until there is an mbarrier
  unsigned alive = 0, arrived = 0, generation = 0;
  Site barrier{};
  std::exception_ptr failure;
  Context scheduler;

  Block(const char* kernel_, dim3 grid_, dim3 size_, size_t shared_bytes)
      : kernel(kernel_),
        size(size_),
        grid(grid_),
        shared(shared_bytes),
        threads(size_.x * size_.y * size_.z),
        warps((threads.size() + 31) / 32) {}
};

// The block and the thread that this OS thread runs.
extern thread_local Block* g_block;
extern thread_local Thread* g_thread;

// Lets other threads run until `generation` changes.
void wait_for(const unsigned& generation, const Site& site);

// Lands the loads of the first barrier that a thread waits for. Returns whether there were any.
bool land_loads(Block& block);
// The end of a thread: its bulk stores write, and a fault if one of them may still read.
void finish_bulk_stores();

}  // namespace ghost::emu
