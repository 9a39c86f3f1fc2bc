// Kernels with one mistake each, to see that the emulator reports it. Never run on a GPU.

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "cuda/prim.cuh"

namespace {

namespace prim = ghost::prim;

constexpr int kBlock = 64;

using Words = const uint32_t*;
using Out = uint32_t*;

// out[i] = in[63 - i], through shared memory; right only with the barrier.
template <bool Barrier>
__global__ void exchange_kernel(Words in, Out out) {
  GHOST_DYN_SHARED(uint32_t, word);
  const int i = threadIdx.x;
  word[i] = in[i];
  if (Barrier) prim::sync_threads();
  out[i] = word[kBlock - 1 - i];
}

// The same for each warp on its own, without the warp barrier.
__global__ void warp_exchange_kernel(Words in, Out out) {
  GHOST_DYN_SHARED(uint32_t, word);
  const int i = threadIdx.x;
  word[i] = in[i];
  out[i] = word[i ^ 31];
}

// Reads what cp.async copies, one wait too early.
__global__ void early_read_kernel(Words in, Out out) {
  GHOST_DYN_SHARED(uint32_t, word);
  const int i = threadIdx.x;
  prim::cp_async<4>(word + i, in + i, true);
  prim::cp_async_commit();
  prim::cp_async_wait<1>();
  out[i] = word[i];
  prim::cp_async_wait<0>();
}

// Lets cp.async overwrite what another thread has not read yet.
__global__ void early_overwrite_kernel(Words in, Out out) {
  GHOST_DYN_SHARED(uint32_t, word);
  const int i = threadIdx.x;
  word[i] = in[i];
  prim::sync_threads();
  prim::cp_async<4>(word + i, in, true);
  prim::cp_async_commit();
  out[i] = word[kBlock - 1 - i];
  prim::sync_threads();
  prim::cp_async_wait<0>();
}

__global__ void no_wait_kernel(Words in, Out out) {
  GHOST_DYN_SHARED(uint32_t, word);
  prim::cp_async<4>(word + threadIdx.x, in + threadIdx.x, true);
  prim::cp_async_commit();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void misaligned_copy_kernel(Words in, Out) {
  GHOST_DYN_SHARED(uint32_t, word);
  prim::cp_async<16>(word, in + 1, true);
  prim::cp_async_wait<0>();
}

__global__ void misaligned_load_kernel(Words in, Out out) {
  prim::store(out, prim::load<uint4>(in + 2));
}

__global__ void copy_out_of_range_kernel(Words in, Out) {
  GHOST_DYN_SHARED(uint32_t, word);
  prim::cp_async<4>(word + kBlock, in, true);
  prim::cp_async_wait<0>();
}

__global__ void ldmatrix_out_of_range_kernel(Words, Out out) {
  GHOST_DYN_SHARED(uint32_t, word);
  uint32_t r[4];
  prim::ldmatrix_x4(r, word + 4 * prim::lane());
  out[threadIdx.x] = r[0];
}

__global__ void write_past_the_end_kernel(Words in, Out) {
  GHOST_DYN_SHARED(uint32_t, word);
  word[threadIdx.x + 1] = in[threadIdx.x];
}

// Half a block waits for the rest, which waits for something else.
__global__ void deadlock_kernel(Words, Out) {
  if (prim::warp() == 0) {
    prim::sync_threads();
  } else if (prim::lane() < 16) {
    prim::sync_warp();
  } else {
    prim::sync_threads();
  }
}

__global__ void divergent_barrier_kernel(Words, Out) {
  if (prim::warp() == 0) {
    prim::sync_threads();
  } else {
    prim::sync_threads();
  }
}

__global__ void divergent_warp_kernel(Words, Out out) {
  if (prim::lane() < 16) {
    out[0] = prim::shuffle_xor(1u, 1);
  } else {
    out[1] = prim::shuffle_down(1u, 1);
  }
}

__global__ void returned_lane_kernel(Words, Out out) {
  if (prim::lane() == 31) return;
  out[0] = prim::shuffle_xor(1u, 1);
}

// Every block reads what block 0 writes in the same launch.
__global__ void between_blocks_kernel(Words in, Out out) {
  if (blockIdx.x == 0) out[threadIdx.x] = in[threadIdx.x];
  if (blockIdx.x == 1) out[kBlock + threadIdx.x] = out[threadIdx.x];
}

// Launched early: waits for the kernel before it at the first line, after a read, and never.
__global__ void early_kernel(Words in, Out out) {
  prim::wait_for_previous_kernel();
  prim::store(out + threadIdx.x, prim::load<uint32_t>(in + threadIdx.x));
}
__global__ void early_load_kernel(Words in, Out out) {
  const uint32_t word = prim::load_readonly<uint32_t>(in + threadIdx.x);
  prim::wait_for_previous_kernel();
  out[threadIdx.x] = word;
}
__global__ void early_copy_kernel(Words in, Out) {
  GHOST_DYN_SHARED(uint32_t, word);
  prim::cp_async<4>(word + threadIdx.x, in + threadIdx.x, true);
  prim::wait_for_previous_kernel();
  prim::cp_async_wait<0>();
}
__global__ void never_waiting_kernel(Words in, Out out) {
  if (prim::warp() > 0) prim::wait_for_previous_kernel();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void nothing_kernel(int) {}

struct Entry {
  const char* name;
  void (*kernel)(Words, Out);
  bool early = false;
};

const Entry kEntries[] = {
    {"nothing wrong", exchange_kernel<true>},
    {"no barrier", exchange_kernel<false>},
    {"no warp barrier", warp_exchange_kernel},
    {"early read", early_read_kernel},
    {"early overwrite", early_overwrite_kernel},
    {"no wait", no_wait_kernel},
    {"misaligned copy", misaligned_copy_kernel},
    {"misaligned load", misaligned_load_kernel},
    {"copy out of range", copy_out_of_range_kernel},
    {"ldmatrix out of range", ldmatrix_out_of_range_kernel},
    {"write past the end", write_past_the_end_kernel},
    {"deadlock", deadlock_kernel},
    {"divergent barrier", divergent_barrier_kernel},
    {"divergent warp", divergent_warp_kernel},
    {"returned lane", returned_lane_kernel},
    {"between blocks", between_blocks_kernel},
    {"early", early_kernel, true},
    {"early load", early_load_kernel, true},
    {"early copy", early_copy_kernel, true},
    {"never waiting", never_waiting_kernel, true},
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* ghost_faulty_run(const char* name,
                                                                               const void* in,
                                                                               void* out,
                                                                               int shared_bytes) {
  static thread_local std::string message;
  try {
    for (const Entry& entry : kEntries) {
      if (std::strcmp(entry.name, name) != 0) continue;
      const auto start = [&](auto launch) {
        return launch(dim3(2), dim3(kBlock), size_t(shared_bytes), static_cast<Words>(in),
                      static_cast<Out>(out));
      };
      const cudaError_t status =
          entry.early ? start([&](auto grid, auto block, size_t bytes, auto... arguments) {
            return GHOST_LAUNCH_EARLY(entry.kernel, grid, block, bytes, nullptr, arguments...);
          })
                      : start([&](auto grid, auto block, size_t bytes, auto... arguments) {
                          return GHOST_LAUNCH(entry.kernel, grid, block, bytes, nullptr,
                                              arguments...);
                        });
      return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
    }
    message = std::string("there is no kernel named ") + name;
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// Launches a kernel after setting its limit of shared memory "never" or, to the bytes of this
// launch, at "each launch".
extern "C" __attribute__((visibility("default"))) const char* ghost_faulty_limit(const char* when,
                                                                                 const void*, void*,
                                                                                 int shared_bytes) {
  static thread_local std::string message;
  const auto function = reinterpret_cast<const void*>(&nothing_kernel);
  try {
    cudaError_t status = cudaSuccess;
    if (std::strcmp(when, "each launch") == 0)
      status =
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    const auto body = [](const void*) { nothing_kernel(0); };
    if (status == cudaSuccess)
      status = ghost::emu::run_grid("nothing_kernel", function, dim3(1), dim3(1),
                                    size_t(shared_bytes), body, nullptr);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

// Launches a grid of "x y z" blocks of one thread.
extern "C" __attribute__((visibility("default"))) const char* ghost_faulty_grid(const char* size,
                                                                                const void*, void*,
                                                                                int) {
  dim3 grid;
  if (std::sscanf(size, "%u %u %u", &grid.x, &grid.y, &grid.z) != 3) return "no grid";
  const cudaError_t status = GHOST_LAUNCH(nothing_kernel, grid, dim3(1), 0, nullptr, 0);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
