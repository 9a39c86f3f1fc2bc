// How the CUDA kernels between the Ghost modules of a network are launched: depthwise convolution,
// the gate of a squeeze-and-excitation, and a network's first convolution. Plain data, as in
// cuda_plan.h. The plans use these members of a Problem: the shape of x, stride, dw_size (size of
// the convolution kernel; the padding is dw_size / 2), out_channels, dtype and layout.
#pragma once

#include <cstdint>

#include "core/cuda_plan.h"
#include "core/problem.h"

namespace ghost {

// Pixels of a row that a thread of the NHWC kernel computes: with a row of taps they must fit into
// the registers.
constexpr int depthwise_strip(int64_t dw_size) {
  return dw_size <= 3 ? 4 : dw_size <= 5 ? 2 : 1;
}

// A block takes one image, or a part of its strips, for a block of channels. A thread owns a vector
// of channels and takes strip after strip.
struct DepthwisePlan {
  int32_t windowed = 0;  // the NHWC kernel of constant size and stride; 0: one pixel a thread
  int32_t vec = 1;       // channels a thread owns
  int32_t lanes = 1;     // threads side by side along the channels
  int32_t slots = 1;     // strips that a block works on at a time
  int32_t channel_blocks = 1;
  int32_t per_row = 1, strips = 1;  // of one image
  int32_t splits = 1;               // blocks that share the strips of an image
  int32_t smem_bytes = 0;           // for the sums
  int64_t blocks = 0;
  int64_t dram_bytes = 0;
  double seconds = 0;  // predicted
};

// sums: the kernel also writes sums over the pixels of out. alignment: of x and of out, in bytes.
DepthwisePlan plan_depthwise(const Problem& p, bool sums, int64_t alignment, const CudaArch& arch);

inline constexpr int kStemPixels = 4;     // pixels of a thread
inline constexpr int kStemChannels = 4;   // of x, at most
inline constexpr int kStemOutputs = 512;  // output channels, at most

// A block takes a part of an image's pixels. A thread owns a vector of output channels.
struct StemPlan {
  int32_t vec = 2;               // output channels a thread owns: 2, 4 or 8
  int32_t lanes = 1, slots = 1;  // threads side by side along the channels, and pixels
  int32_t splits = 1;            // blocks an image
  int64_t blocks = 0;
  int64_t dram_bytes = 0;
  double seconds = 0;
};

// out_channels: even, at most kStemOutputs.
StemPlan plan_stem(const Problem& p, const CudaArch& arch);

inline constexpr int kGateThreads = 512;
inline constexpr int kGateImages = 4;  // at most, of a block

//   gate = f(w_expand^T act(w_reduce mean + b_reduce) + b_expand)
//
// Of an image: mean, gate and b_expand [C], b_reduce [R], w_reduce and w_expand [R, C].
//
// A block takes some images. If there are few images, they are cut into parts, which takes two
// launches: in the first a block computes some of the hidden values, in the second some channels of
// the gate.
struct GatePlan {
  int32_t images = 1;      // of a block
  int32_t parts = 1;       // blocks that share the images; more than one: two launches
  int32_t scratch_at = 0;  // in shared memory, behind the means and the hidden values
  int32_t smem_bytes = 0;
  int64_t blocks = 0;
  int64_t dram_bytes = 0;
  double seconds = 0;
};

// has_sums: the sums of x over its pixels are given, in `splits` parts per image. Raises
// std::runtime_error if a block has too little shared memory for one image.
GatePlan plan_gate(int64_t batch, int64_t channels, int64_t reduced, int64_t pixels, bool has_sums,
                   int64_t splits, DType dtype, const CudaArch& arch);

}  // namespace ghost
