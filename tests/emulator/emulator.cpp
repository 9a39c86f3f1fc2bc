// The scheduler of the block emulator: one fiber a CUDA thread, one OS thread a block in flight.

#include "emulator_state.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/smem_limit.h"

#if GHOST_EMU_FAST_SWITCH
asm(R"(
.text
.globl ghost_emu_switch
.hidden ghost_emu_switch
.type ghost_emu_switch, @function
ghost_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ghost_emu_switch, .-ghost_emu_switch
)");
#endif

namespace ghost::emu {

thread_local Block* g_block = nullptr;
thread_local Thread* g_thread = nullptr;

void wait_for(const unsigned& generation, const Site& site) {
  Thread& self = *g_thread;
  self.generation = &generation;
  self.seen = generation;
  self.site = site;
  Context::switch_to(self.context, g_block->scheduler);
  self.generation = nullptr;
}

namespace {

std::string name(dim3 index) {
  std::ostringstream out;
  out << '(' << index.x << ", " << index.y << ", " << index.z << ')';
  return out.str();
}

std::string name(const Site& site) {
  const std::string file = site.file;
  return std::string(site.what) + " at " + file.substr(file.rfind('/') + 1) + ":" +
         std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0 && std::strcmp(a.what, b.what) == 0;
}

Fault make_fault(const Block& block, const std::string& what) {
  return Fault("emulated kernel " + std::string(block.kernel) + ", block " + name(block.index) +
               ": " + what);
}

// Ends a thread: a block barrier no longer counts it.
void retire() {
  Block& block = *g_block;
  Thread& self = *g_thread;
  self.done = true;
  ++block.warps[self.warp].exited;
  if (--block.alive > 0 && block.arrived == block.alive) {
    block.arrived = 0;
    ++block.generation;
  }
}

void fiber_main() {
  Block& block = *g_block;
  Context::arrived(g_thread->context, &block.scheduler);
  try {
    block.body(block.argument);
    if (!g_thread->copies.empty()) {
      fault({"kernel end", 0, "cp_async"}, "a thread ends without waiting for its copies");
    }
    finish_bulk_stores();
    if (!g_thread->waited)
      fault({"kernel end", 0, "early launch"}, "a thread ends without waiting for the last kernel");
    retire();
  } catch (...) {
    g_thread->done = true;
    block.failure = std::current_exception();
  }
  for (;;) Context::switch_to(g_thread->context, block.scheduler);
}

// Stacks are reused from launch to launch: new ones would cause page faults.
Stack& stack(size_t i) {
  static thread_local std::vector<std::unique_ptr<Stack>> stacks;
  while (stacks.size() <= i) stacks.push_back(std::make_unique<Stack>());
  return *stacks[i];
}

void prepare(Block& block) {
  block.alive = unsigned(block.threads.size());
  block.arrived = 0;
  block.failure = nullptr;
  block.shared.poison();
  block.mbarriers.clear();
  block.last_writes.clear();
  for (Warp& warp : block.warps) warp.arrived = warp.exited = warp.size = 0;
  for (unsigned i = 0; i < block.threads.size(); ++i) {
    Thread& t = block.threads[i];
    t.index =
        dim3(i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y));
    t.lane = i % 32;
    t.warp = i / 32;
    t.done = false;
    t.waited = !block.early;
    t.generation = nullptr;
    t.copies.clear();
    t.group_ends.clear();
    t.bulk_open.clear();
    t.bulk_groups.clear();
    t.fences = 0;
    t.context.start(stack(i), fiber_main);
    ++block.warps[t.warp].size;
  }
}

// Runs each thread of a warp that can continue, once. Returns whether there was one.
bool run_warp(Block& block, unsigned warp) {
  bool progress = false;
  const unsigned lanes = block.warps[warp].size;
  for (unsigned k = 0; k < lanes; ++k) {
    const unsigned lane = block.schedule & kReverseLanes ? lanes - 1 - k : k;
    Thread& t = block.threads[warp * 32 + lane];
    if (t.done || (t.generation != nullptr && *t.generation == t.seen)) continue;
    g_thread = &t;
    Context::switch_to(block.scheduler, t.context);
    progress = true;
    if (block.failure) std::rethrow_exception(block.failure);
  }
  return progress;
}

[[noreturn]] void report_deadlock(const Block& block) {
  std::string where;
  unsigned waiting = 0;
  const Site* last = nullptr;
  for (const Thread& t : block.threads) {
    if (t.done) continue;
    ++waiting;
    if (last == nullptr || !same(*last, t.site)) {
      where += (last ? "; thread " : " thread ") + name(t.index) + " in " + name(t.site);
    }
    last = &t.site;
  }
  for (const auto& entry : block.mbarriers) {
    const Mbarrier& barrier = entry.second;
    where += "; the mbarrier in phase " + std::to_string(barrier.phase) + " misses " +
             std::to_string(barrier.missing) + " arrivals and " + std::to_string(barrier.bytes) +
             " bytes";
  }
  throw make_fault(block, "deadlock, " + std::to_string(waiting) +
                              " threads wait for others that never come:" + where);
}

void run_block(Block& block) {
  prepare(block);
  g_block = &block;
  const unsigned warps = unsigned(block.warps.size());
  while (block.alive > 0) {
    bool progress = false;
    for (unsigned k = 0; k < warps; ++k) {
      unsigned warp = block.schedule & kReverseWarps ? warps - 1 - k : k;
      if (block.schedule & kRandomWarps) {
        block.random = block.random * 1664525u + 1013904223u;
        warp = (block.random >> 16) % warps;
      }
      bool again = run_warp(block, warp);
      progress |= again;
      while (again && block.schedule & kGreedy) again = run_warp(block, warp);
    }
    if (!progress) {
      // The random draws may have missed the only warp that can continue.
      for (unsigned warp = 0; warp < warps && !progress; ++warp) progress = run_warp(block, warp);
      if (!progress && !land_loads(block)) report_deadlock(block);
    }
  }
  for (const auto& entry : block.mbarriers) {
    if (!entry.second.loads.empty() || entry.second.bytes != 0)
      throw make_fault(block, "ends before its bulk loads have landed");
  }
  if (block.shared.overrun()) {
    throw make_fault(block, "wrote past the " + std::to_string(block.shared.bytes()) +
                                " bytes of its shared memory");
  }
}

// The emulated devices of this process. A device's number is its index.
class Devices {
  std::mutex mutex_;
  std::vector<Device> known_;

  static auto fields(const Device& d) {
    return std::tie(d.major, d.minor, d.multiprocessors, d.shared_per_block,
                    d.shared_per_multiprocessor, d.l2_bytes);
  }

 public:
  int number_of(const Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t i = 0;
    while (i < known_.size() && fields(known_[i]) != fields(device)) ++i;
    if (i == known_.size()) known_.push_back(device);
    return int(i);
  }
  bool find(int number, Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (number < 0 || size_t(number) >= known_.size()) return false;
    device = known_[size_t(number)];
    return true;
  }
};
Devices& devices() {
  static Devices instance;
  return instance;
}

// Limits of dynamic shared memory, of kernels on devices.
class SmemLimits {
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, size_t> set_;

  size_t& limit(const void* kernel) {
    const int device = devices().number_of(settings().device);
    return set_.emplace(std::pair(kernel, device), prim::kDefaultSmemLimit).first->second;
  }

 public:
  size_t get(const void* kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return limit(kernel);
  }
  void set(const void* kernel, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t& now = limit(kernel);
    if (bytes < now && now != prim::kDefaultSmemLimit) {
      throw Fault("the shared memory limit of a kernel is lowered from " + std::to_string(now) +
                  " to " + std::to_string(bytes) + " bytes: another host thread may need it");
    }
    now = bytes;
  }
};
SmemLimits& smem_limits() {
  static SmemLimits instance;
  return instance;
}

}  // namespace

Settings& settings() {
  static Settings instance;
  return instance;
}

Counters& counters() {
  static Counters instance;
  return instance;
}

dim3 thread_index() {
  return g_thread->index;
}
dim3 block_index() {
  return g_block->index;
}
dim3 block_size() {
  return g_block->size;
}
dim3 grid_size() {
  return g_block->grid;
}
void* shared_memory() {
  return g_block->shared.data();
}

void fault(const Site& site, const std::string& what) {
  throw make_fault(*g_block, "thread " + name(g_thread->index) + ", " + name(site) + ": " + what);
}

void check_aligned(const void* p, size_t bytes, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fault(site, "address misaligned for " + std::to_string(bytes) + " bytes");
  }
}

void check_shared(const void* p, size_t bytes, const Site& site) {
  if (!g_block->shared.holds(p, bytes)) {
    fault(site, "address outside the " + std::to_string(g_block->shared.bytes()) +
                    " bytes of shared memory");
  }
}

void wait_for_previous_kernel() {
  g_thread->waited = true;
}

void check_waited(const void* p, const Site& site) {
  if (!g_thread->waited && !g_block->shared.holds(p, 1)) {
    fault(site, "global memory before the wait for the last kernel");
  }
}

void block_barrier(Site site) {
  Block& block = *g_block;
  if (block.arrived == 0) {
    block.barrier = site;
  } else if (!same(block.barrier, site)) {
    fault(site, "divergent barrier, other threads wait in " + name(block.barrier));
  }
  if (++block.arrived == block.alive) {
    block.arrived = 0;
    ++block.generation;
  } else {
    wait_for(block.generation, site);
  }
}

void warp_collective(Site site, WarpFunction function, const void* in, size_t in_bytes, void* out,
                     size_t out_bytes) {
  Warp& warp = g_block->warps[g_thread->warp];
  if (warp.exited != 0 || warp.size != 32) {
    fault(site, "a warp collective needs 32 lanes, " + std::to_string(warp.size - warp.exited) +
                    " are there");
  }
  if (warp.arrived == 0) {
    warp.site = site;
    warp.function = function;
  } else if (warp.function != function || !same(warp.site, site)) {
    fault(site, "divergent warp, other lanes wait in " + name(warp.site));
  }
  const unsigned lane = g_thread->lane;
  if (in_bytes > 0) std::memcpy(&warp.in[lane], in, in_bytes);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    function(warp.in, warp.out);
    ++warp.generation;
  } else {
    wait_for(warp.generation, site);
  }
  if (out_bytes > 0) std::memcpy(out, &warp.out[lane], out_bytes);
}

cudaError_t run_grid(const char* kernel, const void* function, dim3 grid, dim3 block,
                     size_t shared_bytes, void (*body)(const void*), const void* context,
                     bool early) {
  const Settings chosen = settings();
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  // The hardware's limits.
  if (blocks == 0 || threads == 0 || threads > 1024 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > size_t(chosen.device.shared_per_block) ||
      shared_bytes > smem_limits().get(function)) {
    return cudaErrorInvalidValue;
  }
  counters().launches += 1;
  counters().last_kernel = kernel;
  counters().blocks += int64_t(blocks);

  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto worker = [&] {
    try {
      Block state(kernel, grid, block, shared_bytes);
      state.schedule = chosen.schedule;
      state.early = early;
      state.body = body;
      state.argument = context;
      for (uint64_t turn; (turn = next++) < blocks;) {
        const uint64_t i = chosen.schedule & kReverseWarps ? blocks - 1 - turn : turn;
        state.index = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                           unsigned(i / grid.x / grid.y));
        state.random = chosen.seed * 2654435761u + unsigned(i);
        run_block(state);
      }
    } catch (...) {
      next = blocks;
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
    g_block = nullptr;
    g_thread = nullptr;
  };
  std::vector<std::thread> helpers;
  for (int t = 1; t < chosen.threads; ++t) helpers.emplace_back(worker);
  worker();
  for (std::thread& helper : helpers) helper.join();
  if (failure) std::rethrow_exception(failure);
  return cudaSuccess;
}

}  // namespace ghost::emu

cudaError_t cudaGetDevice(int* device) {
  *device = ghost::emu::devices().number_of(ghost::emu::settings().device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ghost::emu::Device emulated;
  if (!ghost::emu::devices().find(device, emulated)) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulated.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = emulated.l2_bytes;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulated.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulated.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emulated.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulated.shared_per_block;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {0, int(ghost::emu::smem_limits().get(kernel)), 90};
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const int most = ghost::emu::settings().device.shared_per_block;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > most) {
    return cudaErrorInvalidValue;
  }
  ghost::emu::smem_limits().set(kernel, size_t(value));
  ghost::emu::counters().limits_set += 1;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unrecognized error code";
}
