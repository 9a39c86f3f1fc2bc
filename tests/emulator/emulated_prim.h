// The software twins of csrc/cuda/prim.cuh: same names, arguments and results, run by emulator.h.
// The functions are documented there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cuda/smem_limit.h"
#include "emulated_numbers.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::ghost::emu::thread_index())
#define blockIdx (::ghost::emu::block_index())
#define blockDim (::ghost::emu::block_size())
#define gridDim (::ghost::emu::grid_size())

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define GHOST_DYN_SHARED(T, name) T* name = static_cast<T*>(::ghost::emu::shared_memory())
#define GHOST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ghost::prim::launch<false>(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define GHOST_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, ...) \
  ::ghost::prim::launch<true>(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
// Default arguments with the file and line of the caller.
#define GHOST_EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace ghost::prim {

// ------------------------------------------------------------------------------------ numbers

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

inline float to_float(float v) {
  return v;
}
inline double to_float(double v) {
  return v;
}

template <class T>
inline T from_float(Accumulator<T> v) {
  if constexpr (std::is_same_v<T, half_t>) {
    return half_from_float(v);
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    return bfloat16_from_float(v);
  } else {
    return v;
  }
}

template <class T>
inline float2 unpack_pair(uint32_t bits) {
  return {to_float(T{uint16_t(bits)}), to_float(T{uint16_t(bits >> 16)})};
}
template <class T>
inline uint32_t pack_pair(float x, float y) {
  return from_float<T>(x).bits | uint32_t(from_float<T>(y).bits) << 16;
}

// Applies f to both numbers of each operand, in double, where sums and products of 16-bit numbers
// are exact or nearly so, and rounds once.
template <class T, class F, class... Words>
inline uint32_t map_pairs(F&& f, Words... words) {
  uint32_t r = 0;
  for (int shift : {0, 16}) {
    const double v = f(double(to_float(T{uint16_t(words >> shift)}))...);
    r |= uint32_t(from_float<T>(round_to_odd(v)).bits) << shift;
  }
  return r;
}
template <class T>
inline uint32_t pack_pair_relu(float x, float y) {
  const auto relu = [](float v) { return v > 0 || v != v ? v : 0.0f; };
  return pack_pair<T>(relu(x), relu(y));
}
template <class T>
inline uint32_t min_pair(uint32_t a, uint32_t b) {
  return map_pairs<T>([](double x, double y) { return x < y || x != x ? x : y; }, a, b);
}
template <class T>
inline uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  return map_pairs<T>([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
template <class T>
inline uint32_t add_pair(uint32_t a, uint32_t b) {
  return map_pairs<T>([](double x, double y) { return x + y; }, a, b);
}
template <class T>
inline uint32_t mul_pair(uint32_t a, uint32_t b) {
  return map_pairs<T>([](double x, double y) { return x * y; }, a, b);
}

inline int opaque(int v) {
  return v;
}

inline uint32_t to_tf32(float v) {
  const uint32_t bits = as_uint(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return v != v ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

inline float max_nan(float a, float b) {
  return a > b || a != a ? a : b;
}
inline float min_nan(float a, float b) {
  return a < b || a != a ? a : b;
}
inline double max_nan(double a, double b) {
  return a > b || a != a ? a : b;
}
inline double min_nan(double a, double b) {
  return a < b || a != a ? a : b;
}

// Not std::fma, which is a slow library call on processors without the instruction.
inline float fma(float a, float b, float c) {
  return a * b + c;
}
inline double fma(double a, double b, double c) {
  return a * b + c;
}
inline float rsqrt(float v) {
  return 1.0f / std::sqrt(v);
}
inline double rsqrt(double v) {
  return 1.0 / std::sqrt(v);
}

// ------------------------------------------------------------------------- position and order

inline unsigned lane() {
  return threadIdx.x & 31u;
}
inline unsigned warp() {
  return threadIdx.x >> 5;
}

inline void sync_threads(GHOST_EMU_SITE) {
  emu::block_barrier({file, line, "sync_threads"});
}
inline void sync_warp(GHOST_EMU_SITE) {
  emu::warp_collective(
      {file, line, "sync_warp"}, [](const emu::Slot(&)[32], emu::Slot(&)[32]) {}, nullptr, 0,
      nullptr, 0);
}

inline void wait_for_previous_kernel() {
  emu::wait_for_previous_kernel();
}

// Each lane passes its value and the index of its source lane.
template <class T>
inline T shuffle_from(T v, int source, const emu::Site& site) {
  struct Message {
    T value;
    int source;
  };
  static_assert(sizeof(Message) <= emu::kSlotBytes);
  const Message message{v, source};
  T result;
  emu::warp_collective(
      site,
      [](const emu::Slot(&in)[32], emu::Slot(&out)[32]) {
        for (int l = 0; l < 32; ++l) {
          Message own, theirs;
          std::memcpy(&own, &in[l], sizeof own);
          std::memcpy(&theirs, &in[own.source & 31], sizeof theirs);
          std::memcpy(&out[l], &theirs.value, sizeof(T));
        }
      },
      &message, sizeof message, &result, sizeof result);
  return result;
}
template <class T>
inline T shuffle_xor(T v, int mask, GHOST_EMU_SITE) {
  return shuffle_from(v, int(lane()) ^ mask, {file, line, "shuffle_xor"});
}
template <class T>
inline T shuffle_down(T v, unsigned delta, GHOST_EMU_SITE) {
  const int source = int(lane() + delta);
  return shuffle_from(v, source < 32 ? source : int(lane()), {file, line, "shuffle_down"});
}
template <class T>
inline T shuffle(T v, int source_lane, GHOST_EMU_SITE) {
  return shuffle_from(v, source_lane, {file, line, "shuffle"});
}

// ------------------------------------------------------------------------------------- memory

template <class Vector>
inline Vector load(const void* p, GHOST_EMU_SITE) {
  emu::check_aligned(p, sizeof(Vector), {file, line, "load"});
  emu::check_waited(p, {file, line, "load"});
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline const void* zeros() {
  static const uint4 words = {0, 0, 0, 0};
  return &words;
}
template <class Vector>
inline Vector load_readonly(const void* p, GHOST_EMU_SITE) {
  return load<Vector>(p, file, line);
}
template <class Vector>
inline void store(void* p, Vector v, GHOST_EMU_SITE) {
  emu::check_aligned(p, sizeof(Vector), {file, line, "store"});
  emu::check_waited(p, {file, line, "store"});
  std::memcpy(p, &v, sizeof v);
  emu::note_store(p, sizeof v);
}

template <int Bytes>
inline void cp_async(void* shared, const void* global, bool wanted, GHOST_EMU_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  emu::copy_async(shared, global, Bytes, wanted, {file, line, "cp_async"});
}
inline void cp_async_commit() {
  emu::copy_commit();
}
template <int Pending>
inline void cp_async_wait() {
  emu::copy_wait(Pending);
}

// ------------------------------------------------------------------------- bulk copies, sm_90

inline constexpr bool kBulkCopies = true;

using Mbarrier = uint64_t;

inline void mbarrier_init(Mbarrier* barrier, uint32_t arrivals, GHOST_EMU_SITE) {
  emu::mbarrier_init(barrier, arrivals, {file, line, "mbarrier_init"});
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, uint32_t bytes, GHOST_EMU_SITE) {
  emu::mbarrier_arrive_expect(barrier, bytes, {file, line, "mbarrier_arrive_expect"});
}
inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity, GHOST_EMU_SITE) {
  emu::mbarrier_wait(barrier, parity, {file, line, "mbarrier_wait"});
}
inline void fence_async() {
  emu::fence_async();
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* barrier,
                      GHOST_EMU_SITE) {
  emu::bulk_load(shared, global, bytes, barrier, {file, line, "bulk_load"});
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes, GHOST_EMU_SITE) {
  emu::bulk_store(global, shared, bytes, {file, line, "bulk_store"});
}
inline void bulk_commit() {
  emu::bulk_commit();
}
template <int Pending>
inline void bulk_wait_read() {
  emu::bulk_wait(Pending, false);
}
template <int Pending>
inline void bulk_wait() {
  emu::bulk_wait(Pending, true);
}
inline void trap(GHOST_EMU_SITE) {
  emu::fault({file, line, "trap"}, "code that must not run");
}

// -------------------------------------------------------------------------------- tensor cores

template <bool Transposed>
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, const emu::Site& site) {
  emu::check_aligned(shared, 16, site);
  emu::check_shared(shared, 16, site);
  emu::warp_collective(
      site,
      [](const emu::Slot(&in)[32], emu::Slot(&out)[32]) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          uint16_t element[8][8];
          for (int row = 0; row < 8; ++row) {
            const void* address;
            std::memcpy(&address, &in[matrix * 8 + row], sizeof address);
            std::memcpy(element[row], address, 16);
          }
          for (int l = 0; l < 32; ++l) {
            const int g = l / 4, t = l % 4 * 2;
            const uint16_t pair[2] = {Transposed ? element[t][g] : element[g][t],
                                      Transposed ? element[t + 1][g] : element[g][t + 1]};
            std::memcpy(out[l].bytes + 4 * matrix, pair, 4);
          }
        }
      },
      &shared, sizeof shared, r, sizeof r);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, GHOST_EMU_SITE) {
  ldmatrix_x4<false>(r, shared, {file, line, "ldmatrix_x4"});
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, GHOST_EMU_SITE) {
  ldmatrix_x4<true>(r, shared, {file, line, "ldmatrix_x4_trans"});
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

// The product of a whole warp: [16, K] by [K, 8], with K = 8 * PerRegister. In emulated_mma.cpp.
template <class T, int PerRegister>
void mma(const emu::Slot (&in)[32], emu::Slot (&out)[32]);

template <class T, int PerRegister>
inline void run_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const emu::Site& site) {
  MmaOperands own;
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  float product[4];
  emu::warp_collective(site, &mma<T, PerRegister>, &own, sizeof own, product, sizeof product);
  for (int i = 0; i < 4; ++i) c[i] += product[i];
}
template <class T>
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         GHOST_EMU_SITE) {
  run_mma<T, 2>(c, a, b, {file, line, "mma_m16n8k16"});
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             GHOST_EMU_SITE) {
  run_mma<float, 1>(c, a, b, {file, line, "mma_m16n8k8_tf32"});
}

// ------------------------------------------------------------------------------------- launches

template <class T>
struct Unchanged {
  using type = T;
};

template <bool kEarly, class... Params>
inline cudaError_t launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                          size_t shared_bytes, cudaStream_t,
                          typename Unchanged<Params>::type... args) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  const cudaError_t status = allow_dynamic_smem(function, shared_bytes);
  if (status != cudaSuccess) return status;
  const auto call = std::make_tuple(kernel, args...);
  const auto body = [](const void* context) {
    const auto run = [](auto function, const auto&... arguments) { function(arguments...); };
    std::apply(run, *static_cast<const decltype(call)*>(context));
  };
  return emu::run_grid(name, function, grid, block, shared_bytes, body, &call, kEarly);
}

}  // namespace ghost::prim
