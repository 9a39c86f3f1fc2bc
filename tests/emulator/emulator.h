// Runs CUDA thread blocks on a CPU, for tests of the kernel sources where there is no GPU.
//
// A CUDA thread is a fiber; a block is one OS thread that switches between its fibers where they
// wait for each other. How mistakes of a kernel are found:
//   - Shared memory initially holds NaN (a huge number as an integer), as do the tests' outputs.
//   - cp.async is late: depending on the schedule the bytes arrive at the wait or at once.
//   - A bulk load fills its destination with NaN, and lands when no thread can continue without it,
//     or at once; a bulk store reads shared memory at the wait, or at once.
//   - Several schedules: a missing barrier that one order of warps and threads hides shows in
//     another.
//   - Misaligned and out-of-range shared memory addresses, barriers and collectives that not every
//     thread reaches, and copies without a wait are faults: C++ exceptions that end the launch.
// Not checked: bank conflicts, speed, the PTX text and the hardware's register layouts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

namespace ghost::emu {

// A fault of a kernel.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Bits of Settings::schedule.
enum : unsigned {
  kReverseWarps = 1,  // the last warp, and the last block, goes first
  kReverseLanes = 2,  // the last lane goes first
  kGreedy = 4,        // a warp runs until all of its threads wait for the block
  kEagerCopies = 8,   // cp.async and bulk copies are done when issued, not when waited for
  kRandomWarps = 16,  // the next warp is drawn at random each time
};

struct Device {
  int major = 9, minor = 0;
  int multiprocessors = 132;
  int shared_per_block = 227 * 1024, shared_per_multiprocessor = 228 * 1024;
  int l2_bytes = 50 << 20;
};

struct Settings {
  unsigned schedule = 0;
  unsigned seed = 0;  // of kRandomWarps
  int threads = 1;    // OS threads, each with one block at a time
  Device device;
};
Settings& settings();

// How many kernels were launched in this process, how many blocks they had, and how often a
// kernel's shared memory limit was set. Several host threads may launch at the same time.
struct Counters {
  std::atomic<int64_t> launches{0}, blocks{0}, limits_set{0};
  std::atomic<const char*> last_kernel{""};
};
Counters& counters();

// The place in the kernel sources where a thread waits.
struct Site {
  const char* file;
  int line;
  const char* what;
};

// -------------------------------------------------------------- functions for running threads

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void* shared_memory();

void block_barrier(Site site);

// A warp collective: each lane passes up to 32 bytes, the last lane computes the results of all.
constexpr size_t kSlotBytes = 32;
struct alignas(16) Slot {
  unsigned char bytes[kSlotBytes];
};
using WarpFunction = void (*)(const Slot (&in)[32], Slot (&out)[32]);
void warp_collective(Site site, WarpFunction function, const void* in, size_t in_bytes, void* out,
                     size_t out_bytes);

void copy_async(void* shared, const void* global, size_t bytes, bool wanted, Site site);
void copy_commit();
void copy_wait(size_t pending);

// A bulk copy of shared memory that a thread wrote (note_store) without a later fence_async is a
// fault. Writes of kernels that initialise no mbarrier are not recorded.
void note_store(const void* p, size_t bytes);
void fence_async();
void mbarrier_init(void* barrier, unsigned arrivals, Site site);
void mbarrier_arrive_expect(void* barrier, size_t bytes, Site site);
void mbarrier_wait(void* barrier, unsigned parity, Site site);
void bulk_load(void* shared, const void* global, size_t bytes, void* barrier, Site site);
void bulk_store(void* global, const void* shared, size_t bytes, Site site);
void bulk_commit();
void bulk_wait(size_t pending, bool written);
// In a grid that is launched early: until a thread has waited, an access to anything but shared
// memory is a fault, and so is its end.
void wait_for_previous_kernel();
void check_waited(const void* p, const Site& site);

[[noreturn]] void fault(const Site& site, const std::string& what);
void check_aligned(const void* p, size_t bytes, const Site& site);
void check_shared(const void* p, size_t bytes, const Site& site);

// ------------------------------------------------------------------------------- launches

// Runs body(context) once for each thread of the grid; returns when all have ended. function: the
// kernel's address, as for cudaFuncSetAttribute. early: the kernel before it may not have ended.
cudaError_t run_grid(const char* kernel, const void* function, dim3 grid, dim3 block,
                     size_t shared_bytes, void (*body)(const void*), const void* context,
                     bool early = false);

}  // namespace ghost::emu
