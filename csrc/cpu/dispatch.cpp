#include "cpu/dispatch.h"

#include <unistd.h>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ghost {
namespace {

struct Entry {
  const char* name;
  const Kernels* (*table)(bool amx);
  bool (*supported)();
  bool amx = false, for_tests = false;
};

#if defined(GHOST_OPS_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

// Whether the processor multiplies tiles of bfloat16, and Linux lets this process use them: their
// registers make its saved state 8 KiB larger, so that it has to ask.
bool has_amx() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;
  static const bool found = [] {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kBFloat16) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
#else
  return false;
#endif
}
#endif

// Best first.
const Entry kEntries[] = {
#if defined(GHOST_OPS_HAVE_AVX512)
    {"avx512_amx", kernels_avx512,
     [] { return has_avx512() && has_amx() && kernels_avx512(true) != nullptr; }, true},
    {"avx512", kernels_avx512, has_avx512},
#endif
#if defined(GHOST_OPS_HAVE_AVX2)
    {"avx2", kernels_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"generic", kernels_generic, [] { return true; }},
    // For tests: the instructions of AMX in software.
    {"generic_amx", kernels_generic, [] { return kernels_generic(true) != nullptr; }, true, true},
};

const Kernels* find(const std::string& name) {
  for (const Entry& e : kEntries)
    if (name == e.name && e.supported()) return e.table(e.amx);
  std::string all;
  for (const std::string& s : available_isas()) all += (all.empty() ? "" : ", ") + s;
  throw std::invalid_argument("GHOST_OPS_CPU_ISA: \"" + name +
                              "\" is not available on this machine; allowed: " + all);
}

std::atomic<const Kernels*> g_active{nullptr};
std::atomic<int64_t> g_l1_bytes{0}, g_l2_bytes{0}, g_cores{0};  // forced; 0: not

int64_t cache_bytes(int name, int64_t fallback) {
#if defined(__linux__)
  const long v = sysconf(name);
  if (v > 0) return v;
#endif
  (void)name;
  return fallback;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> out;
  for (const Entry& e : kEntries)
    if (!e.for_tests && e.supported()) out.push_back(e.name);
  return out;
}

const Kernels& active_kernels() {
  const Kernels* k = g_active.load(std::memory_order_acquire);
  if (k == nullptr) {
    const char* forced = std::getenv("GHOST_OPS_CPU_ISA");
    const std::string name = forced == nullptr ? "" : forced;
    k = find(name.empty() || name == "auto" ? available_isas().front() : name);
    g_active.store(k, std::memory_order_release);
  }
  return *k;
}

void set_isa(const std::string& name) {
  g_active.store(find(name), std::memory_order_release);
}

CpuMachine cpu_machine(int64_t threads) {
#if defined(__linux__)
  static const int64_t l1 = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10),
                       l2 = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
#else
  static const int64_t l1 = 32 << 10, l2 = 1 << 20;
#endif
  const Kernels& k = active_kernels();
  const auto forced_or = [](const std::atomic<int64_t>& forced, int64_t value) {
    const int64_t f = forced.load(std::memory_order_relaxed);
    return f > 0 ? f : value;
  };
  CpuMachine machine;
  machine.lanes = k.lanes;
  machine.registers = k.registers;
  machine.amx = k.amx;
  machine.l1_bytes = forced_or(g_l1_bytes, std::max<int64_t>(l1, 16 << 10));
  machine.l2_bytes = forced_or(g_l2_bytes, std::clamp<int64_t>(l2, 256 << 10, 4 << 20));
  machine.cores = forced_or(g_cores, threads);
  return machine;
}

void force_machine(int64_t l1_bytes, int64_t l2_bytes, int64_t cores) {
  g_l1_bytes.store(l1_bytes, std::memory_order_relaxed);
  g_l2_bytes.store(l2_bytes, std::memory_order_relaxed);
  g_cores.store(cores, std::memory_order_relaxed);
}

int64_t channel_block(const Problem& p) {
  return p.layout == Layout::kNHWC ? 16 : 1;
}
int64_t channel_items(const Problem& p) {
  return (p.intrinsic + channel_block(p) - 1) / channel_block(p);
}
LaneItems lane_items(const Problem& p, const CpuMachine& cpu) {
  LaneItems items;
  const int64_t row = p.width * p.intrinsic * compute_size(p.dtype), map = p.height * row;
  // Three maps of a chunk, with their halo, take a part of L2. Items do not depend on threads.
  const int64_t budget = cpu.l2_bytes / 6, halo = 2 * p.pad() * 2;
  items.images = std::clamp<int64_t>((256 << 10) / std::max<int64_t>(map, 1), 1,
                                     std::max<int64_t>(p.batch / 8, 1));
  items.count = (p.batch + items.images - 1) / items.images;
  items.band = p.height;
  items.chunk_images = std::clamp<int64_t>(budget / std::max<int64_t>(map, 1), 1, items.images);
  if (map > budget)
    items.band = std::clamp<int64_t>(budget / row - halo, std::min<int64_t>(p.height, 4), p.height);
  return items;
}
int64_t weight_grad_items(const Problem& p) {
  return (p.intrinsic + kGradRowsPerItem - 1) / kGradRowsPerItem;
}

}  // namespace ghost
