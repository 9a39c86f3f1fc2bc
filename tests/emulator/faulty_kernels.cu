// Kernels with one mistake each, which the emulator must report. Never run on a GPU.

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

// The same within each warp, without the warp barrier.
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

// Half a block waits at one barrier, the rest at another.
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

// out = in + 1, 32 words a round for two rounds, through one stage of shared memory by bulk copies.
// Make selects the step that is left out or changed.
struct BulkSteps {
  bool init = true, init_fence = true, load_wait = true, store_fence = true, read_wait = true,
       last_wait = true;
  unsigned parity = 0, expected = 128, bytes = 128;
  int stage = 0;  // its first word
  int mark = -1;  // a word that is overwritten
};
template <class Make>
__global__ void bulk_kernel(Words in, Out out) {
  constexpr BulkSteps kDo = Make{}();
  GHOST_DYN_SHARED(uint32_t, word);
  uint32_t* const stage = word + kDo.stage;
  auto* const barrier = reinterpret_cast<prim::Mbarrier*>(word + kBlock - 4);
  const int i = threadIdx.x;
  if (i == 0 && kDo.init) {
    prim::mbarrier_init(barrier, 1);
    if (kDo.init_fence) prim::fence_async();
  }
  prim::sync_threads();
  for (unsigned round = 0; round < 2; ++round) {
    if (i == 0) {
      prim::mbarrier_arrive_expect(barrier, kDo.expected);
      prim::bulk_load(stage, in + 32 * round, kDo.bytes, barrier);
    }
    prim::sync_threads();  // the copy is under way for all threads
    if (kDo.load_wait || i >= 32) prim::mbarrier_wait(barrier, (round ^ kDo.parity) & 1);
    if (i < 32) prim::store(stage + i, stage[i] + 1);
    if (kDo.mark >= 0) word[kDo.mark] = 0;
    if (kDo.store_fence) prim::fence_async();
    prim::sync_threads();
    if (i == 0) {
      prim::bulk_store(out + 32 * round, stage, kDo.bytes);
      prim::bulk_commit();
      if (round == 0 ? kDo.read_wait : kDo.last_wait) prim::bulk_wait_read<0>();
    }
    prim::sync_threads();
  }
}
#define GHOST_BULK(name, change)             \
  struct name {                              \
    constexpr BulkSteps operator()() const { \
      BulkSteps steps;                       \
      change;                                \
      return steps;                          \
    }                                        \
  }
GHOST_BULK(BulkRight, );
GHOST_BULK(BulkNoInit, steps.init = false);
GHOST_BULK(BulkNoInitFence, steps.init_fence = false);
GHOST_BULK(BulkNoLoadWait, steps.load_wait = false);
GHOST_BULK(BulkWrongParity, steps.parity = 1);
GHOST_BULK(BulkNoStoreFence, steps.store_fence = false);
GHOST_BULK(BulkNoReadWait, steps.read_wait = false);
GHOST_BULK(BulkNoLastWait, steps.last_wait = false);
GHOST_BULK(BulkTooManyExpected, steps.expected = 144);
GHOST_BULK(BulkTooFewExpected, steps.expected = 112);
GHOST_BULK(BulkOddSize, steps.bytes = steps.expected = 120);
GHOST_BULK(BulkMisaligned, steps.stage = 2);
GHOST_BULK(BulkOutOfRange, steps.stage = 36);
GHOST_BULK(BulkBarrierOverwritten, steps.mark = kBlock - 4);
#undef GHOST_BULK

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
    {"bulk", bulk_kernel<BulkRight>},
    {"bulk, no init", bulk_kernel<BulkNoInit>},
    {"bulk, no fence after init", bulk_kernel<BulkNoInitFence>},
    {"bulk, no wait for the load", bulk_kernel<BulkNoLoadWait>},
    {"bulk, wrong parity", bulk_kernel<BulkWrongParity>},
    {"bulk, no fence before the store", bulk_kernel<BulkNoStoreFence>},
    {"bulk, no wait for the read", bulk_kernel<BulkNoReadWait>},
    {"bulk, no last wait", bulk_kernel<BulkNoLastWait>},
    {"bulk, too many bytes expected", bulk_kernel<BulkTooManyExpected>},
    {"bulk, too few bytes expected", bulk_kernel<BulkTooFewExpected>},
    {"bulk, odd size", bulk_kernel<BulkOddSize>},
    {"bulk, misaligned", bulk_kernel<BulkMisaligned>},
    {"bulk, out of range", bulk_kernel<BulkOutOfRange>},
    {"bulk, barrier overwritten", bulk_kernel<BulkBarrierOverwritten>},
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
