// The emulator's options, for ctypes.

#include "emulator.h"

#define GHOST_EXPORT extern "C" __attribute__((visibility("default")))

using ghost::emu::Device;

// schedule: bits of emulator.h; seed: of its random one; threads: OS threads that run blocks.
GHOST_EXPORT void ghost_emu_configure(unsigned schedule, unsigned seed, int threads) {
  auto& settings = ghost::emu::settings();
  settings.schedule = schedule;
  settings.seed = seed;
  settings.threads = threads;
}

// Sets the attributes of the device that the launchers query and plan for.
GHOST_EXPORT void ghost_emu_set_device(int major, int minor, int multiprocessors,
                                       int shared_per_block, int shared_per_multiprocessor,
                                       int l2_bytes) {
  ghost::emu::settings().device =
      Device{major, minor, multiprocessors, shared_per_block, shared_per_multiprocessor, l2_bytes};
}

// Kernels launched in this process so far.
GHOST_EXPORT int64_t ghost_emu_launches() {
  return ghost::emu::counters().launches;
}

// The name of the last of them, "" before the first.
GHOST_EXPORT const char* ghost_emu_last_kernel() {
  return ghost::emu::counters().last_kernel;
}

// Calls in this process that set a kernel's limit of dynamic shared memory.
GHOST_EXPORT int64_t ghost_emu_limits_set() {
  return ghost::emu::counters().limits_set;
}
