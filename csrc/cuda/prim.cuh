// The parts of the kernels that are specific to nvcc: PTX, intrinsics, launches.
//
// The kernel sources are compiled twice. nvcc takes the first half of this file. A plain C++
// compiler with GHOST_OPS_EMULATOR defined takes tests/emulator/emulated_prim.h instead, which has
// the same functions in software, run by a scheduler of emulated thread blocks. Each function here
// has a twin there with the same name, arguments and result.
//
// Kernels may also use the names that the emulator defines: __global__, __device__, __host__,
// __forceinline__, __launch_bounds__, threadIdx, blockIdx, blockDim, gridDim, dim3,
// uint2, uint4, float2, float4 and "#pragma unroll". All other uses of CUDA go through this file.
//
// Collectives (ldmatrix, mma, shuffles, sync_warp) are executed by all 32 lanes of a warp together,
// sync_threads by all threads of the block that have not returned. There are no atomics: a
// reduction has a fixed order, so that the same input gives the same bits.
#pragma once

#ifdef GHOST_OPS_EMULATOR
#include "emulated_prim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/environment.h"
#include "cuda/smem_limit.h"

// T* name: the block's dynamic shared memory, aligned to 128 bytes.
#define GHOST_DYN_SHARED(T, name)                                    \
  extern __shared__ __align__(128) unsigned char ghost_shared_raw[]; \
  T* name = reinterpret_cast<T*>(ghost_shared_raw)

// Launches a kernel and returns a cudaError_t. A template kernel with commas stands in parentheses.
// Arguments are converted to the kernel's parameter types.
#define GHOST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ghost::prim::launch<false>(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
// GHOST_LAUNCH for a kernel whose threads all begin with wait_for_previous_kernel. It may start
// before the previous kernel of the stream has ended (see starts_early).
#define GHOST_LAUNCH_EARLY(kernel, grid, block, shared_bytes, stream, ...) \
  ::ghost::prim::launch<true>(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace ghost::prim {

using half_t = __half;
using bfloat16_t = __nv_bfloat16;

// ------------------------------------------------------------------------------------ numbers

// The type that T is computed and accumulated in: double for double, float for all others.
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

__device__ __forceinline__ float to_float(half_t v) {
  return __half2float(v);
}
__device__ __forceinline__ float to_float(bfloat16_t v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ double to_float(double v) {
  return v;
}

// Rounds to nearest even; NaN stays NaN.
template <class T>
__device__ __forceinline__ T from_float(Accumulator<T> v) {
  return v;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float v) {
  return __float2bfloat16_rn(v);
}

// Two neighbouring 16-bit numbers in one register; x is the one at the lower address.
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack_pair<half_t>(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
template <>
__device__ __forceinline__ float2 unpack_pair<bfloat16_t>(uint32_t bits) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&bits));
}
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack_pair<half_t>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<bfloat16_t>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// pack_pair of max(x, 0), max(y, 0); NaN stays NaN.
template <class T>
__device__ __forceinline__ uint32_t pack_pair_relu(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack_pair_relu<half_t>(float x, float y) {
  uint32_t r;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack_pair_relu<bfloat16_t>(float x, float y) {
  uint32_t r;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
  return r;
}

// Arithmetic on two neighbouring 16-bit numbers at once. One rounding each, to nearest even; the
// minimum is NaN if either is. (bfloat16 sums and products are fused ones: sm_80 has no others.)
template <class T>
__device__ __forceinline__ uint32_t min_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t min_pair<half_t>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t min_pair<bfloat16_t>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <class T>
__device__ __forceinline__ uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);
template <>
__device__ __forceinline__ uint32_t fma_pair<half_t>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <>
__device__ __forceinline__ uint32_t fma_pair<bfloat16_t>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <class T>
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t add_pair<half_t>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t add_pair<bfloat16_t>(uint32_t a, uint32_t b) {
  return fma_pair<bfloat16_t>(a, 0x3f803f80u, b);
}
template <class T>
__device__ __forceinline__ uint32_t mul_pair(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t mul_pair<half_t>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t mul_pair<bfloat16_t>(uint32_t a, uint32_t b) {
  return fma_pair<bfloat16_t>(a, b, 0x80008000u);
}

// v, with its origin hidden from the compiler, which therefore can neither hoist computations with
// v out of a loop nor keep their results in registers from one phase of a kernel to the next.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ uint32_t as_uint(float v) {
  return __float_as_uint(v);
}
__device__ __forceinline__ float as_float(uint32_t v) {
  return __uint_as_float(v);
}

// float32 rounded to the 10 mantissa bits of TF32, ties away from zero, as a register for
// mma_m16n8k8_tf32, which ignores the lower 13 bits.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// NaN if either is NaN, unlike fmaxf and fminf.
__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
__device__ __forceinline__ double max_nan(double a, double b) {
  return a > b || a != a ? a : b;
}
__device__ __forceinline__ double min_nan(double a, double b) {
  return a < b || a != a ? a : b;
}

__device__ __forceinline__ float fma(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
__device__ __forceinline__ double fma(double a, double b, double c) {
  return ::fma(a, b, c);
}
__device__ __forceinline__ float rsqrt(float v) {
  return ::rsqrtf(v);
}
__device__ __forceinline__ double rsqrt(double v) {
  return ::rsqrt(v);
}

// ------------------------------------------------------------------------- position and order

__device__ __forceinline__ unsigned lane() {
  return threadIdx.x & 31u;
}
__device__ __forceinline__ unsigned warp() {
  return threadIdx.x >> 5;
}

__device__ __forceinline__ void sync_threads() {
  __syncthreads();
}
__device__ __forceinline__ void sync_warp() {
  __syncwarp();
}

// Waits until the kernels before this one in the stream have ended and their writes are visible.
// Comes before every access to global memory in a kernel that is launched early. The next such
// kernel may be launched from here on: it finds room where blocks of this one end, and waits there.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The value of v in lane ^ mask; in lane + delta (its own value past lane 31); in source_lane.
template <class T>
__device__ __forceinline__ T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T v, unsigned delta) {
  return __shfl_down_sync(0xffffffffu, v, delta);
}
template <class T>
__device__ __forceinline__ T shuffle(T v, int source_lane) {
  return __shfl_sync(0xffffffffu, v, source_lane);
}

// ------------------------------------------------------------------------------------- memory

// Vector is uint4, uint2, uint32_t, uint16_t, float4, ...; the pointer is aligned to its size.
template <class Vector>
__device__ __forceinline__ Vector load(const void* p) {
  return *static_cast<const Vector*>(p);
}
// From global memory that no thread writes during the kernel.
template <class Vector>
__device__ __forceinline__ Vector load_readonly(const void* p) {
  return __ldg(static_cast<const Vector*>(p));
}
template <class Vector>
__device__ __forceinline__ void store(void* p, Vector v) {
  *static_cast<Vector*>(p) = v;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes of zeros in global memory.
static __device__ const uint4 kZeros = {0, 0, 0, 0};
__device__ __forceinline__ const void* zeros() {
  return &kZeros;
}

// Copies Bytes bytes from global to shared memory in the background. wanted = false: writes Bytes
// zeros and does not read global, which must still be aligned.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool wanted) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int source_bytes = wanted ? Bytes : 0;
  if constexpr (Bytes == 16) {  // bypasses L1: nothing else reads the data
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
        "l"(global), "r"(source_bytes));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(source_bytes));
  }
}
// Closes a group of this thread's copies; empty groups count.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most Pending of the youngest groups of this thread are under way. A sync_threads
// then makes the copies visible to the other threads.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ------------------------------------------------------------------------- bulk copies, sm_90

// Code for architectures older than sm_90 has traps instead of these functions. setup.py
// compiles the sources named *_sm90.cu for the architectures from sm_90 on; all others come from
// the oldest architecture's intermediate code.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kBulkCopies = true;
#define GHOST_SM90_ASM(...) asm volatile(__VA_ARGS__)
#else
inline constexpr bool kBulkCopies = false;
#define GHOST_SM90_ASM(...) __trap()
#endif

// A barrier in shared memory, opaque. A phase completes when all arrivals have come and as many
// bytes have landed as were expected; the next phase begins at once. The first phase is phase 0.
using Mbarrier = uint64_t;

// To be called by one thread, then fence_async by the same thread, then sync_threads.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, uint32_t arrivals) {
  GHOST_SM90_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals) : "memory");
}
// Adds `bytes` to the bytes that the current phase expects, then arrives once.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, uint32_t bytes) {
  GHOST_SM90_ASM(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes) : "memory");
}
// Waits while the current phase has this parity, until that phase completes. The data that arrived
// in the phase are visible afterwards.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  uint32_t done = 1;
  do {
    GHOST_SM90_ASM(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(barrier)),
        "r"(parity) : "memory");
  } while (done == 0);
}
// Makes the earlier writes of this thread to shared memory visible to bulk copies.
__device__ __forceinline__ void fence_async() {
  GHOST_SM90_ASM("fence.proxy.async.shared::cta;" :: : "memory");
}
// Copies bytes to shared memory in the background; they land in the current phase of the barrier.
// Both addresses are aligned to 16 bytes, bytes is a multiple of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          Mbarrier* barrier) {
  GHOST_SM90_ASM(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
// Copies bytes from shared memory in the background, with the same rules.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  GHOST_SM90_ASM("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes) : "memory");
}
// Closes a group of this thread's bulk stores; empty groups count.
__device__ __forceinline__ void bulk_commit() {
  GHOST_SM90_ASM("cp.async.bulk.commit_group;" :: : "memory");
}
// Waits until at most Pending of the youngest groups of this thread still read shared memory. A
// thread must wait for all of them before it ends.
template <int Pending>
__device__ __forceinline__ void bulk_wait_read() {
  GHOST_SM90_ASM("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// Waits until at most Pending of these groups are under way; the data of the others are visible.
template <int Pending>
__device__ __forceinline__ void bulk_wait() {
  GHOST_SM90_ASM("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}
#undef GHOST_SM90_ASM
__device__ __forceinline__ void trap() {
  __trap();
}

// -------------------------------------------------------------------------------- tensor cores

// Four 8x8 matrices of 16-bit numbers from shared memory. Lane l passes the address,
// 16-byte aligned, of row l % 8 of matrix l / 8, and receives of each matrix the elements
//   (row l / 4, columns 2 * (l % 4) and 2 * (l % 4) + 1)
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
// The same with each matrix transposed: the lane receives
//   (rows 2 * (l % 4) and 2 * (l % 4) + 1, column l / 4)
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// c += a b with a [16, 16], b [16, 8], c [16, 8] spread over the warp. With g = lane / 4 and
// t = 2 * (lane % 4), the pair (k, k + 1) in one register:
//   a: (g, t) (g + 8, t) (g, t + 8) (g + 8, t + 8)    b: (t, g) (t + 8, g), the pair along k
//   c: (g, t) (g, t + 1) (g + 8, t) (g + 8, t + 1)
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<half_t>(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16_t>(float (&c)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// c += a b with a [16, 8], b [8, 8] in TF32. With g = lane / 4 and t = lane % 4:
//   a: (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)    b: (t, g) (t + 4, g)    c: as above
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ------------------------------------------------------------------------------------- launches

template <class T>
struct Unchanged {
  using type = T;
};

// Whether GHOST_LAUNCH_EARLY launches early on the current device: GHOST_OPS_CUDA_PDL=1, and the
// code for the device has the wait. All kernels are compiled for the same architectures.
inline bool starts_early(const void* kernel) {
  static const bool wanted = is_switched_on("GHOST_OPS_CUDA_PDL");
  if (!wanted) return false;
  enum : int { kUnknown, kNo, kYes };
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = kDevices;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == kUnknown) {
    cudaFuncAttributes attributes;
    const bool has_wait =
        cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    answer = has_wait ? kYes : kNo;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
}

template <bool kEarly, class... Params>
inline cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, typename Unchanged<Params>::type... args) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  const cudaError_t status = allow_dynamic_smem(function, shared_bytes);
  if (status != cudaSuccess) return status;
  if (kEarly && starts_early(function)) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    (void)cudaLaunchKernelEx(&config, kernel, args...);
    return cudaGetLastError();
  }
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace ghost::prim

#endif  // GHOST_OPS_EMULATOR
