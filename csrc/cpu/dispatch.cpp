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
// Defined in cpu/isa/, once for each instruction set.
#define GHOST_DECLARE_TABLES(isa)          \
  namespace isa {                          \
  extern const Kernels kKernels;           \
  extern const LayerKernels kLayerKernels; \
  extern const TailKernels kTailKernels;   \
  }
GHOST_DECLARE_TABLES(generic)
GHOST_DECLARE_TABLES(avx2)
GHOST_DECLARE_TABLES(avx512)
#define GHOST_TABLES(isa) isa::kKernels, isa::kLayerKernels, isa::kTailKernels

namespace {

#if defined(GHOST_OPS_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}

// Whether the processor multiplies tiles of bfloat16 and Linux lets this process use them. The
// process must request permission, because the tiles add 8 KiB to its saved state.
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
const Isa kIsas[] = {
#if defined(GHOST_OPS_HAVE_AVX512)
    {"avx512_amx", GHOST_TABLES(avx512),
     [] { return has_avx512() && has_amx() && avx512::kKernels.has_tiles; }, true},
    {"avx512", GHOST_TABLES(avx512), has_avx512},
#endif
#if defined(GHOST_OPS_HAVE_AVX2)
    {"avx2", GHOST_TABLES(avx2),
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"generic", GHOST_TABLES(generic), [] { return true; }},
    // The instructions of AMX in software.
    {"generic_amx", GHOST_TABLES(generic), [] { return generic::kKernels.has_tiles; }, true, true},
};

const Isa& find(const std::string& name) {
  for (const Isa& isa : kIsas)
    if (name == isa.name && isa.supported()) return isa;
  std::string all;
  for (const std::string& s : available_isas()) all += (all.empty() ? "" : ", ") + s;
  throw std::invalid_argument("GHOST_OPS_CPU_ISA: \"" + name +
                              "\" is not available on this machine; allowed: " + all);
}

std::atomic<const Isa*> g_active{nullptr};
std::atomic<int64_t> g_l1_bytes{0}, g_l2_bytes{0}, g_cores{0};  // of force_machine; 0: unset

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
  for (const Isa& isa : kIsas)
    if (!isa.for_tests && isa.supported()) out.push_back(isa.name);
  return out;
}

const Isa& active_isa() {
  const Isa* isa = g_active.load(std::memory_order_acquire);
  if (isa == nullptr) {
    const char* forced = std::getenv("GHOST_OPS_CPU_ISA");
    const std::string name = forced == nullptr ? "" : forced;
    isa = &find(name.empty() || name == "auto" ? available_isas().front() : name);
    g_active.store(isa, std::memory_order_release);
  }
  return *isa;
}

void set_isa(const std::string& name) {
  g_active.store(&find(name), std::memory_order_release);
}

CpuMachine cpu_machine(int64_t threads) {
#if defined(__linux__)
  static const int64_t l1 = cache_bytes(_SC_LEVEL1_DCACHE_SIZE, 32 << 10),
                       l2 = cache_bytes(_SC_LEVEL2_CACHE_SIZE, 1 << 20);
#else
  static const int64_t l1 = 32 << 10, l2 = 1 << 20;
#endif
  const Isa& isa = active_isa();
  const auto forced_or = [](const std::atomic<int64_t>& forced, int64_t value) {
    const int64_t f = forced.load(std::memory_order_relaxed);
    return f > 0 ? f : value;
  };
  CpuMachine machine;
  machine.lanes = isa.ghost.lanes;
  machine.registers = isa.ghost.registers;
  machine.amx = isa.amx;
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

}  // namespace ghost
