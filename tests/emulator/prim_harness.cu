// One kernel for each primitive of csrc/cuda/prim.cuh, on arrays of 32-bit words. Compiled by nvcc
// for a GPU and by g++ for the emulator, both must give the same words.
//
// Every kernel is one block; in and out are flat arrays, described at each kernel.

#include <cstring>
#include <exception>
#include <string>

#include "cuda/fast_div.cuh"
#include "cuda/prim.cuh"

namespace {

namespace prim = ghost::prim;
using prim::bfloat16_t;
using prim::half_t;

constexpr int kBlock = 64;                             // two warps: thread i works on item i
constexpr size_t kSharedBytes = 2 * 16 * kBlock + 16;  // two stages and two mbarriers

using Words = const uint32_t*;
using Out = uint32_t*;

template <class T>
__device__ T from_bits(uint16_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
__device__ uint32_t bits_of(T value) {
  uint16_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- numbers: out[i] = f(in[i]), for any n by a loop of one block

template <class T>
__global__ void from_float_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) {
    out[i] = bits_of(prim::from_float<T>(prim::as_float(in[i])));
  }
}
template <class T>
__global__ void to_float_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) {
    out[i] = prim::as_uint(prim::to_float(from_bits<T>(uint16_t(in[i]))));
  }
}
// in [n, 2] floats -> out [n, 4]: the packed pair, both of its numbers unpacked again, and the pair
// packed with ReLU.
template <class T>
__global__ void pair_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) {
    const float x = prim::as_float(in[2 * i]), y = prim::as_float(in[2 * i + 1]);
    const uint32_t pair = prim::pack_pair<T>(x, y);
    const float2 back = prim::unpack_pair<T>(pair);
    out[4 * i] = pair;
    out[4 * i + 1] = prim::as_uint(back.x);
    out[4 * i + 2] = prim::as_uint(back.y);
    out[4 * i + 3] = prim::pack_pair_relu<T>(x, y);
  }
}
// in [n, 3] packed pairs a, b, c -> out [n, 4]: a + b, a b, a b + c, min(a, b).
template <class T>
__global__ void pair_arithmetic_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) {
    const uint32_t a = in[3 * i], b = in[3 * i + 1];
    out[4 * i] = prim::add_pair<T>(a, b);
    out[4 * i + 1] = prim::mul_pair<T>(a, b);
    out[4 * i + 2] = prim::fma_pair<T>(a, b, in[3 * i + 2]);
    out[4 * i + 3] = prim::min_pair<T>(a, b);
  }
}
__global__ void to_tf32_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock)
    out[i] = prim::to_tf32(prim::as_float(in[prim::opaque(i)]));
}
// in [n, 2] dividend, divisor -> out [n, 2] quotient, remainder.
__global__ void division_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) {
    int rest = int(in[2 * i]);
    out[2 * i] = uint32_t(ghost::cuda::FastDiv(int(in[2 * i + 1])).split(rest));
    out[2 * i + 1] = uint32_t(rest);
  }
}
__global__ void rsqrt_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) {
    out[i] = prim::as_uint(prim::rsqrt(prim::as_float(in[i])));
  }
}
// in [n, 3] floats a, b, c -> out [n, 5]: max, min, fma, and max, min computed as doubles.
__global__ void arithmetic_kernel(Words in, Out out, int n) {
  for (int i = threadIdx.x; i < n; i += kBlock) {
    const float a = prim::as_float(in[3 * i]), b = prim::as_float(in[3 * i + 1]);
    out[5 * i] = prim::as_uint(prim::max_nan(a, b));
    out[5 * i + 1] = prim::as_uint(prim::min_nan(a, b));
    out[5 * i + 2] = prim::as_uint(prim::fma(a, b, prim::as_float(in[3 * i + 2])));
    out[5 * i + 3] = prim::as_uint(float(prim::max_nan(double(a), double(b))));
    out[5 * i + 4] = prim::as_uint(float(prim::min_nan(double(a), double(b))));
  }
}

// ---- order: in [64] -> out [5, 64]

__global__ void shuffle_kernel(Words in, Out out, int) {
  const int i = threadIdx.x;
  const uint32_t v = in[i];
  out[i] = prim::shuffle_xor(v, 5);
  out[kBlock + i] = prim::shuffle_down(v, 3u);
  out[2 * kBlock + i] = prim::shuffle(v, int(31 - prim::lane()));
  const double wide = prim::shuffle_xor(double(v), 16);
  out[3 * kBlock + i] = uint32_t(wide);
  out[4 * kBlock + i] = prim::lane() + 100 * prim::warp();
}
// out[i] = the sum of in, by a tree that takes a barrier for each of its levels.
__global__ void barrier_kernel(Words in, Out out, int) {
  GHOST_DYN_SHARED(uint32_t, sum);
  const int i = threadIdx.x;
  sum[i] = in[i];
  for (int width = kBlock / 2; width > 0; width /= 2) {
    prim::sync_threads();
    if (i < width) sum[i] += sum[i + width];
  }
  prim::sync_threads();
  out[i] = sum[0];
}
// Each warp reverses its own 32 words through shared memory.
__global__ void warp_barrier_kernel(Words in, Out out, int) {
  GHOST_DYN_SHARED(uint32_t, word);
  const int i = threadIdx.x, reversed = int(prim::warp() * 32 + 31 - prim::lane());
  word[i] = in[i];
  prim::sync_warp();
  out[i] = word[reversed];
}

// ---- memory

// in [64, 4] copied by 16, 8, 4 and 2 bytes: out [4, 64, 4]
__global__ void vector_kernel(Words in, Out out, int) {
  const int i = 4 * threadIdx.x;
  prim::store(out + i, prim::load<uint4>(in + i));
  Out second = out + 4 * kBlock + i;
  prim::store(second, prim::load_readonly<uint4>(in + i));
  Out third = second + 4 * kBlock;
  prim::store(third, prim::load<uint2>(in + i));
  prim::store(third + 2, prim::load_readonly<uint2>(in + i + 2));
  auto fourth = reinterpret_cast<uint16_t*>(third + 4 * kBlock);
  for (int k = 0; k < 8; ++k) {
    prim::store(fourth + k,
                prim::load_readonly<uint16_t>(reinterpret_cast<const uint16_t*>(in + i) + k));
  }
}
// in [n, 64, 4] -> out the same: a pipeline of two stages, thread 7 and step 2 masked to zeros.
template <int Bytes>
__global__ void cp_async_kernel(Words in, Out out, int n) {
  GHOST_DYN_SHARED(uint32_t, buffer);  // [2, 64, 4]
  const int i = 4 * threadIdx.x;
  const auto load = [&](int step) {
    uint32_t* to = buffer + step % 2 * 4 * kBlock + i;
    for (int k = 0; k < 16 / Bytes && step < n; ++k) {
      prim::cp_async<Bytes>(to + k * Bytes / 4, in + step * 4 * kBlock + i + k * Bytes / 4,
                            threadIdx.x != 7 && step != 2);
    }
    prim::cp_async_commit();
  };
  load(0);
  for (int step = 0; step < n; ++step) {
    load(step + 1);
    prim::cp_async_wait<1>();
    prim::sync_threads();
    const int mirrored = 4 * (kBlock - 1 - int(threadIdx.x));
    prim::store(out + step * 4 * kBlock + i,
                prim::load<uint4>(buffer + step % 2 * 4 * kBlock + mirrored));
    prim::sync_threads();
  }
}

// ---- bulk copies

// out[i] = the sum of in, by a tree that takes a phase of an mbarrier for each of its levels.
__global__ void mbarrier_kernel(Words in, Out out, int) {
  GHOST_DYN_SHARED(uint32_t, sum);
  auto* const barrier = reinterpret_cast<prim::Mbarrier*>(sum + kBlock);
  const int i = threadIdx.x;
  if (i == 0) {
    prim::mbarrier_init(barrier, kBlock);
    prim::fence_async();
  }
  prim::sync_threads();
  sum[i] = in[i];
  uint32_t phase = 0;
  for (int width = kBlock / 2; width > 0; width /= 2, ++phase) {
    prim::mbarrier_arrive_expect(barrier, 0);
    prim::mbarrier_wait(barrier, phase & 1);
    if (i < width) sum[i] += sum[i + width];
  }
  prim::mbarrier_arrive_expect(barrier, 0);
  prim::mbarrier_wait(barrier, phase & 1);
  out[i] = sum[0];
}
// in [n, 64, 4] -> out the same, each step in reverse: two stages are filled ahead, a step in two
// copies. An mbarrier a stage.
__global__ void bulk_load_kernel(Words in, Out out, int n) {
  GHOST_DYN_SHARED(uint32_t, buffer);  // [2, 64, 4]
  auto* const full = reinterpret_cast<prim::Mbarrier*>(buffer + 2 * 4 * kBlock);
  constexpr uint32_t kBytes = 16 * kBlock, kFirst = 48;
  const auto load = [&](int step) {
    if (threadIdx.x != 0 || step >= n) return;
    uint32_t* const to = buffer + step % 2 * 4 * kBlock;
    const uint32_t* const from = in + step * 4 * kBlock;
    prim::bulk_load(to, from, kFirst, full + step % 2);
    prim::mbarrier_arrive_expect(full + step % 2, kBytes);
    prim::bulk_load(to + kFirst / 4, from + kFirst / 4, kBytes - kFirst, full + step % 2);
  };
  if (threadIdx.x == 0) {
    prim::mbarrier_init(full, 1);
    prim::mbarrier_init(full + 1, 1);
    prim::fence_async();
  }
  prim::sync_threads();
  load(0);
  load(1);
  for (int step = 0; step < n; ++step) {
    prim::mbarrier_wait(full + step % 2, step / 2 % 2);
    const int i = 4 * threadIdx.x, mirrored = 4 * (kBlock - 1 - int(threadIdx.x));
    prim::store(out + step * 4 * kBlock + i,
                prim::load<uint4>(buffer + step % 2 * 4 * kBlock + mirrored));
    prim::sync_threads();
    load(step + 2);
  }
}
// The same with bulk stores, a step in two copies, from two stages. The last step is read again.
__global__ void bulk_store_kernel(Words in, Out out, int n) {
  GHOST_DYN_SHARED(uint32_t, buffer);  // [2, 64, 4]
  constexpr uint32_t kBytes = 16 * kBlock, kFirst = 48;
  const int i = 4 * threadIdx.x, mirrored = 4 * (kBlock - 1 - int(threadIdx.x));
  for (int step = 0; step < n; ++step) {
    uint32_t* const stage = buffer + step % 2 * 4 * kBlock;
    prim::store(stage + mirrored, prim::load<uint4>(in + step * 4 * kBlock + i));
    prim::fence_async();
    if (threadIdx.x == 0) prim::bulk_wait_read<0>();  // of the step before: the next one's stage
    prim::sync_threads();
    if (threadIdx.x != 0) continue;
    uint32_t* const to = out + step * 4 * kBlock;
    prim::bulk_store(to, stage, kFirst);
    prim::bulk_store(to + kFirst / 4, stage + kFirst / 4, kBytes - kFirst);
    prim::bulk_commit();
  }
  if (threadIdx.x != 0) return;
  prim::bulk_wait<0>();
  out[n * 4 * kBlock] = out[n * 4 * kBlock - 1];
}

// ---- tensor cores: one warp

// in: 32 rows of 8 numbers of 16 bits; matrix k has the rows 8k .. 8k + 7, in reverse.
struct X4 {
  __device__ void operator()(uint32_t (&r)[4], const void* p) const { prim::ldmatrix_x4(r, p); }
};
struct X4Trans {
  __device__ void operator()(uint32_t (&r)[4], const void* p) const {
    prim::ldmatrix_x4_trans(r, p);
  }
};
template <class Load>
__global__ void ldmatrix_kernel(Words in, Out out, int) {
  GHOST_DYN_SHARED(uint32_t, row);
  const int lane = int(prim::lane());
  for (int k = 0; k < 4; ++k) row[lane * 4 + k] = in[lane * 4 + k];
  prim::sync_threads();
  uint32_t r[4];
  Load()(r, row + (lane ^ 7) * 4);
  for (int k = 0; k < 4; ++k) out[lane * 4 + k] = r[k];
}

struct Fp16Mma {
  __device__ void operator()(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    prim::mma_m16n8k16<half_t>(c, a, b);
  }
};
struct Bf16Mma {
  __device__ void operator()(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    prim::mma_m16n8k16<bfloat16_t>(c, a, b);
  }
};
struct Tf32Mma {
  __device__ void operator()(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    prim::mma_m16n8k8_tf32(c, a, b);
  }
};
// in [32, 10]: the registers a[4], b[2], c[4] of each lane -> out [32, 4]
template <class Mma>
__global__ void mma_kernel(Words in, Out out, int) {
  const Words own = in + 10 * prim::lane();
  const uint32_t a[4] = {own[0], own[1], own[2], own[3]}, b[2] = {own[4], own[5]};
  float c[4];
  for (int k = 0; k < 4; ++k) c[k] = prim::as_float(own[6 + k]);
  Mma{}(c, a, b);
  for (int k = 0; k < 4; ++k) out[4 * prim::lane() + k] = prim::as_uint(c[k]);
}

struct Entry {
  const char* name;
  void (*kernel)(Words, Out, int);
  unsigned threads;
};

const Entry kEntries[] = {
    {"half_from_float", from_float_kernel<half_t>, kBlock},
    {"bfloat16_from_float", from_float_kernel<bfloat16_t>, kBlock},
    {"half_to_float", to_float_kernel<half_t>, kBlock},
    {"bfloat16_to_float", to_float_kernel<bfloat16_t>, kBlock},
    {"half_pair", pair_kernel<half_t>, kBlock},
    {"bfloat16_pair", pair_kernel<bfloat16_t>, kBlock},
    {"half_pair_arithmetic", pair_arithmetic_kernel<half_t>, kBlock},
    {"bfloat16_pair_arithmetic", pair_arithmetic_kernel<bfloat16_t>, kBlock},
    {"to_tf32", to_tf32_kernel, kBlock},
    {"division", division_kernel, kBlock},
    {"rsqrt", rsqrt_kernel, kBlock},
    {"arithmetic", arithmetic_kernel, kBlock},
    {"shuffle", shuffle_kernel, kBlock},
    {"barrier", barrier_kernel, kBlock},
    {"warp_barrier", warp_barrier_kernel, kBlock},
    {"vector", vector_kernel, kBlock},
    {"cp_async_16", cp_async_kernel<16>, kBlock},
    {"cp_async_8", cp_async_kernel<8>, kBlock},
    {"cp_async_4", cp_async_kernel<4>, kBlock},
    {"mbarrier", mbarrier_kernel, kBlock},
    {"bulk_load", bulk_load_kernel, kBlock},
    {"bulk_store", bulk_store_kernel, kBlock},
    {"ldmatrix_x4", ldmatrix_kernel<X4>, 32},
    {"ldmatrix_x4_trans", ldmatrix_kernel<X4Trans>, 32},
    {"mma_half", mma_kernel<Fp16Mma>, 32},
    {"mma_bfloat16", mma_kernel<Bf16Mma>, 32},
    {"mma_tf32", mma_kernel<Tf32Mma>, 32},
};

}  // namespace

// Runs the named kernel on arrays of the device (of the host, under the emulator). Returns nullptr,
// or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* ghost_prim_run(const char* name,
                                                                             const void* in,
                                                                             void* out, int n) {
  static thread_local std::string message;
  try {
    for (const Entry& entry : kEntries) {
      if (std::strcmp(entry.name, name) != 0) continue;
      const cudaError_t status =
          GHOST_LAUNCH(entry.kernel, dim3(1), dim3(entry.threads), kSharedBytes,
                       cudaStream_t(nullptr), static_cast<Words>(in), static_cast<Out>(out), n);
      return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
    }
    message = std::string("there is no primitive named ") + name;
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// The index-th name, nullptr past the last.
extern "C" __attribute__((visibility("default"))) const char* ghost_prim_name(int index) {
  return index < int(sizeof kEntries / sizeof *kEntries) ? kEntries[index].name : nullptr;
}
