// The scheduler of the block emulator: one fiber a CUDA thread, one OS thread a block in flight.

#include "emulator.h"

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
#include "fiber.h"

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
namespace {

// A 16-bit pattern that is NaN as float16, bfloat16, float32 and float64, and as an integer far
// outside every array: -1, which 0xFFFF would give, is a value that tables of offsets use.
constexpr uint16_t kPoison = 0x7fff;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool wanted;
};

void perform(const Copy& copy) {
  if (copy.wanted) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

// A bulk store; `data` is what it read, if it has.
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
  bool waited = false;  // for its reads
};

// State of a barrier in shared memory, whose 8 bytes only hold kMbarrierMark.
struct Mbarrier {
  unsigned arrivals, missing;  // of each phase; of the current one
  int64_t bytes = 0;           // expected in the current phase, less those that have landed
  unsigned phase = 0;
  unsigned thread, fences;  // who initialised it, and the fences of that thread before
  std::vector<Copy> loads;  // not landed yet

  void settle() {
    if (missing != 0 || bytes != 0) return;
    ++phase;
    missing = arrivals;
  }
};
constexpr uint64_t kMbarrierMark = 0x7fff6d6261727fffu;

// The last ordinary write to two bytes of shared memory.
struct LastWrite {
  int thread = -1;
  unsigned fences = 0;  // of that thread before
};

// One CUDA thread.
struct Thread {
  dim3 index;
  unsigned lane = 0, warp = 0;
  bool done = false, waited = false;     // waited: for the kernel before this one
  const unsigned* generation = nullptr;  // what it waits for: until this is not `seen` any more
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

// The shared memory of a block: dirty before each block, watched at its end.
class SharedMemory {
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kWatched = 0;  // the sanitizer watches better
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

thread_local Block* g_block = nullptr;
thread_local Thread* g_thread = nullptr;

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

void wait_for(const unsigned& generation, const Site& site) {
  Thread& self = *g_thread;
  self.generation = &generation;
  self.seen = generation;
  self.site = site;
  Context::switch_to(self.context, g_block->scheduler);
  self.generation = nullptr;
}

// The end of a thread: those that wait for the block wait for one less.
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

void finish_bulk_stores() {
  Thread& self = *g_thread;
  const auto waited = [](const BulkGroup& group) { return group.waited; };
  if (!self.bulk_open.empty() ||
      !std::all_of(self.bulk_groups.begin(), self.bulk_groups.end(), waited)) {
    fault({"kernel end", 0, "bulk_store"}, "a thread ends while its bulk stores read");
  }
  for (const BulkGroup& group : self.bulk_groups) {
    for (const BulkStore& store : group.stores) store.write();
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

// Stacks are kept from launch to launch: fresh ones would be page faults.
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

// Lets each thread of a warp that can go on do so once; tells whether any could.
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

// Lands the loads of the first barrier that a thread waits for; tells whether there were any.
bool land_loads(Block& block) {
  for (auto& entry : block.mbarriers) {
    Mbarrier& barrier = entry.second;
    const auto waits = [&](const Thread& t) { return !t.done && t.generation == &barrier.phase; };
    if (barrier.loads.empty() || std::none_of(block.threads.begin(), block.threads.end(), waits))
      continue;
    for (const Copy& copy : barrier.loads) {
      perform(copy);
      barrier.bytes -= int64_t(copy.bytes);
    }
    barrier.loads.clear();
    barrier.settle();
    return true;
  }
  return false;
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
      // A random draw may have missed the only warp that can go on.
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

// The devices that this process posed as. A device's number is its place here.
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

void copy_async(void* shared, const void* global, size_t bytes, bool wanted, Site site) {
  check_aligned(shared, bytes, site);
  check_aligned(global, bytes, site);
  check_shared(shared, bytes, site);
  check_waited(global, site);
  const Copy copy{shared, global, bytes, wanted};
  if (g_block->schedule & kEagerCopies) perform(copy);
  // Even a copy that is done already has to be waited for.
  g_thread->copies.push_back(copy);
}

void copy_commit() {
  g_thread->group_ends.push_back(g_thread->copies.size());
}

void copy_wait(size_t pending) {
  Thread& self = *g_thread;
  if (self.group_ends.size() <= pending) return;
  const size_t finished = self.group_ends.size() - pending;
  const size_t count = self.group_ends[finished - 1];
  if (!(g_block->schedule & kEagerCopies)) {
    std::for_each(self.copies.begin(), self.copies.begin() + ptrdiff_t(count), perform);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + ptrdiff_t(count));
  self.group_ends.erase(self.group_ends.begin(), self.group_ends.begin() + ptrdiff_t(finished));
  for (size_t& end : self.group_ends) end -= count;
}

namespace {

// The first of the two-byte pieces of shared memory that hold [p, p + bytes), and how many.
std::pair<size_t, size_t> pieces_of(const void* p, size_t bytes) {
  const size_t at = size_t(static_cast<const unsigned char*>(p) -
                           static_cast<const unsigned char*>(g_block->shared.data()));
  return {at / 2, (at + bytes + 1) / 2 - at / 2};
}

Mbarrier& mbarrier_at(void* barrier, const Site& site) {
  const auto found = g_block->mbarriers.find(barrier);
  if (found == g_block->mbarriers.end()) fault(site, "the mbarrier is not initialised");
  if (std::memcmp(barrier, &kMbarrierMark, sizeof kMbarrierMark) != 0)
    fault(site, "the mbarrier was overwritten");
  return found->second;
}

void check_bulk(const void* shared, const void* global, size_t bytes, const Site& site) {
  check_aligned(shared, 16, site);
  check_aligned(global, 16, site);
  if (bytes % 16 != 0) fault(site, std::to_string(bytes) + " bytes are no multiple of 16");
  check_shared(shared, bytes, site);
  if (g_block->last_writes.empty()) return;
  const auto [first, count] = pieces_of(shared, bytes);
  for (size_t i = first; i < first + count; ++i) {
    const LastWrite& last = g_block->last_writes[i];
    if (last.thread >= 0 && g_block->threads[size_t(last.thread)].fences == last.fences)
      fault(site, "thread " + std::to_string(last.thread) +
                      " wrote to the shared memory of a bulk copy, without a fence_async after it");
  }
}

}  // namespace

void note_store(const void* p, size_t bytes) {
  Block& block = *g_block;
  if (block.last_writes.empty() || !block.shared.holds(p, bytes)) return;
  const auto [first, count] = pieces_of(p, bytes);
  const LastWrite last{int(g_thread - block.threads.data()), g_thread->fences};
  std::fill_n(block.last_writes.begin() + ptrdiff_t(first), count, last);
}

void fence_async() {
  ++g_thread->fences;
}

void mbarrier_init(void* barrier, unsigned arrivals, Site site) {
  Block& block = *g_block;
  check_aligned(barrier, 8, site);
  check_shared(barrier, 8, site);
  if (arrivals == 0 || arrivals >= 1u << 20) fault(site, "arrivals out of range");
  std::memcpy(barrier, &kMbarrierMark, sizeof kMbarrierMark);
  Mbarrier fresh{};
  fresh.arrivals = fresh.missing = arrivals;
  fresh.thread = unsigned(g_thread - block.threads.data());
  fresh.fences = g_thread->fences;
  if (!block.mbarriers.emplace(barrier, fresh).second) fault(site, "initialised twice");
  if (block.last_writes.empty()) block.last_writes.resize((block.shared.bytes() + 1) / 2);
}

void mbarrier_arrive_expect(void* barrier, size_t bytes, Site site) {
  Mbarrier& b = mbarrier_at(barrier, site);
  b.bytes += int64_t(bytes);
  if (std::abs(b.bytes) >= 1 << 20) fault(site, "too many bytes for one phase");
  if (b.missing == 0) fault(site, "more arrivals than the phase has");
  --b.missing;
  b.settle();
}

void mbarrier_wait(void* barrier, unsigned parity, Site site) {
  const Mbarrier& b = mbarrier_at(barrier, site);
  if (parity > 1) fault(site, "the parity of a phase is 0 or 1");
  while ((b.phase & 1) == parity) wait_for(b.phase, site);
}

void bulk_load(void* shared, const void* global, size_t bytes, void* barrier, Site site) {
  check_bulk(shared, global, bytes, site);
  Mbarrier& b = mbarrier_at(barrier, site);
  if (g_block->threads[b.thread].fences == b.fences)
    fault(site, "the mbarrier was initialised without a fence_async after it");
  const auto [first, count] = pieces_of(shared, bytes);
  std::fill_n(g_block->last_writes.begin() + ptrdiff_t(first), count, LastWrite{});
  const Copy copy{shared, global, bytes, true};
  if (g_block->schedule & kEagerCopies) {
    perform(copy);
    b.bytes -= int64_t(bytes);
    b.settle();
  } else {
    for (size_t i = 0; i < bytes; i += sizeof kPoison)
      std::memcpy(static_cast<unsigned char*>(shared) + i, &kPoison, sizeof kPoison);
    b.loads.push_back(copy);
  }
}

void bulk_store(void* global, const void* shared, size_t bytes, Site site) {
  check_bulk(shared, global, bytes, site);
  BulkStore store{global, shared, bytes, {}};
  if (g_block->schedule & kEagerCopies) {
    store.read();
    store.write();
  }
  g_thread->bulk_open.push_back(std::move(store));
}

void bulk_commit() {
  Thread& self = *g_thread;
  self.bulk_groups.push_back({std::move(self.bulk_open), false});
  self.bulk_open.clear();
}

void bulk_wait(size_t pending, bool written) {
  std::vector<BulkGroup>& groups = g_thread->bulk_groups;
  if (groups.size() <= pending) return;
  const auto end = groups.end() - ptrdiff_t(pending);
  for (auto group = groups.begin(); group != end; ++group) {
    group->waited = true;
    for (BulkStore& store : group->stores) {
      store.read();
      if (written) store.write();
    }
  }
  if (written) groups.erase(groups.begin(), end);
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
