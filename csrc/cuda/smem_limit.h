// The limit of a kernel's dynamic shared memory. Uses only functions of the CUDA runtime that the
// emulator has too: prim.cuh and emulated_prim.h both include this file.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ghost::prim {

// A launch with more dynamic shared memory than this fails unless the kernel's limit was raised.
inline constexpr size_t kDefaultSmemLimit = 48 * 1024;

// The kernels and devices whose limit is raised. Lock-free; no entry is ever removed. The limit of
// a kernel without an entry (a full table), or on a device without a bit, is raised at every
// launch, always to the same value; this only costs time.
class RaisedLimits {
 public:
  // One bit for each of the first kDevices devices; null if the table is full.
  std::atomic<uint64_t>* devices_of(const void* kernel) {
    size_t at = size_t(reinterpret_cast<uintptr_t>(kernel) / 16 % kEntries);
    for (size_t probes = 0; probes < kEntries; ++probes, at = (at + 1) % kEntries) {
      Entry& entry = entries_[at];
      const void* found = entry.kernel.load(std::memory_order_acquire);
      if (found == kernel) return &entry.devices;
      if (found != nullptr) continue;
      // A failed exchange stores the kernel that another host thread put here in `found`.
      if (entry.kernel.compare_exchange_strong(found, kernel) || found == kernel)
        return &entry.devices;
    }
    return nullptr;
  }
  static uint64_t bit(int device) {
    constexpr int kDevices = 64;
    return device < kDevices ? uint64_t(1) << device : 0;
  }

 private:
  static constexpr size_t kEntries = 1024;  // several times the number of kernels
  struct Entry {
    std::atomic<const void*> kernel{nullptr};
    std::atomic<uint64_t> devices{0};
  };
  Entry entries_[kEntries];
};
inline RaisedLimits g_raised_limits;

// Raises the limit to the maximum of a block on the device, not to the bytes of one launch: another
// host thread could set a smaller limit between this call and the launch, and the launch would
// fail.
inline cudaError_t raise_smem_limit(const void* kernel, int device) {
  int most = 0;
  cudaFuncAttributes attributes;
  cudaError_t status =
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - int(attributes.sharedSizeBytes));
  return status;
}

// Must be called before a launch with `bytes` bytes on the current device. Raises the limit at the
// first call on each device; later calls cost a table look-up.
inline cudaError_t allow_dynamic_smem(const void* kernel, size_t bytes) {
  if (bytes <= kDefaultSmemLimit) return cudaSuccess;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    std::atomic<uint64_t>* devices = g_raised_limits.devices_of(kernel);
    const uint64_t bit = RaisedLimits::bit(device);
    if (devices != nullptr && (devices->load(std::memory_order_acquire) & bit) != 0)
      return cudaSuccess;
    status = raise_smem_limit(kernel, device);
    if (status == cudaSuccess && devices != nullptr)
      devices->fetch_or(bit, std::memory_order_release);
  }
  if (status != cudaSuccess) (void)cudaGetLastError();  // reported here, not by the next call too
  return status;
}

}  // namespace ghost::prim
