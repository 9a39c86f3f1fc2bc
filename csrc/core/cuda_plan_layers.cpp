#include "core/cuda_plan_layers.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace ghost {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Bytes at the memory's speed, less where few blocks leave multiprocessors idle, and a launch.
double streaming_seconds(int64_t bytes, int64_t blocks, const CudaArch& arch) {
  const double filled = std::min(1.0, double(blocks) / double(arch.multiprocessors));
  return double(bytes) / (arch.dram_gb_s * 0.92e9 * filled) + 2e-6;
}

}  // namespace

DepthwisePlan plan_depthwise(const LayerProblem& p, const CudaArch& arch, int64_t vec) {
  DepthwisePlan plan;
  plan.windowed = p.layout == Layout::kNHWC && p.dw_size > 1 && element_size(p.dtype) < 8;
  const int64_t widest = depthwise_bytes(p.dw_size) / element_size(p.dtype);
  plan.vec = plan.windowed ? int32_t(std::min(vec, widest)) : 1;
  const int64_t ho = p.out_height(), wo = p.out_width();
  plan.per_row = int32_t(ceil_div(wo, plan.windowed ? kDepthwiseStrip : 1));
  plan.strips = int32_t(ho * plan.per_row);
  const int64_t vecs = p.channels / plan.vec;
  // NHWC: a warp reads neighbouring vectors of channels. NCHW: it reads neighbouring pixels.
  const int64_t most = p.layout == Layout::kNHWC
                           ? 32
                           : std::max<int64_t>(1, kCudaThreads / round_up(plan.strips, 32));
  plan.channel_blocks = int32_t(ceil_div(vecs, most));
  plan.lanes = int32_t(ceil_div(vecs, plan.channel_blocks));
  plan.channel_blocks = int32_t(ceil_div(vecs, plan.lanes));
  plan.slots = kCudaThreads / plan.lanes;
  const int64_t wanted = 4 * arch.multiprocessors, whole = p.batch * plan.channel_blocks;
  const int64_t rounds = ceil_div(plan.strips, plan.slots);
  plan.splits = int32_t(std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(whole, 1)), 1,
                                            std::max<int64_t>(rounds, 1)));
  plan.blocks = whole * plan.splits;
  const int64_t e = element_size(p.dtype), a = compute_size(p.dtype);
  plan.dram_bytes = p.batch * p.channels * (p.height * p.width + ho * wo) * e +
                    p.channels * (p.dw_size * p.dw_size + 1) * a +
                    (p.sums ? p.batch * plan.splits * p.channels * a : 0);
  plan.seconds = streaming_seconds(plan.dram_bytes, plan.blocks, arch);
  return plan;
}

GatePlan plan_gate(int64_t batch, int64_t channels, int64_t reduced, int64_t pixels, bool has_sums,
                   int64_t splits, DType dtype, const CudaArch& arch) {
  GatePlan plan;
  const int64_t e = element_size(dtype), a = compute_size(dtype);
  // Partial sums of the mean: a vector of at most 16 bytes a thread. Of the expansion: all channels
  // of the block's images, in as many parts as threads share a channel.
  const int64_t vec = 16 / e, vecs = ceil_div(channels, vec);
  const auto bytes = [&](int64_t images) {
    const int64_t own = round_up(images * (channels + reduced) * a, 128);
    const int64_t parts = std::max<int64_t>(1, kGateThreads / vecs);
    // Widths below 16 bytes have more threads a pixel, and fewer parts.
    return own + std::max<int64_t>(kGateThreads * vec * a, parts * images * channels * a);
  };
  int64_t images = std::clamp<int64_t>(ceil_div(batch, arch.multiprocessors), 1, kGateImages);
  while (images > 1 && bytes(images) > arch.smem_per_block) --images;
  if (bytes(images) > arch.smem_per_block)
    throw std::runtime_error(
        "a gate over " + std::to_string(channels) + " channels does not fit into the " +
        std::to_string(arch.smem_per_block) + " bytes of shared memory that a block may have");
  plan.images = int32_t(images);
  plan.scratch_at = int32_t(round_up(images * (channels + reduced) * a, 128));
  plan.smem_bytes = int32_t(bytes(images));
  plan.blocks = ceil_div(batch, images);
  const int64_t weights = 2 * channels * reduced * e;
  plan.dram_bytes = (has_sums ? batch * channels * splits * a : batch * channels * pixels * e) +
                    weights + (channels + reduced) * a + batch * channels * e;
  // Every block reads all weights from L2, at most 64 bytes a clock of a multiprocessor.
  const double waves = double(ceil_div(plan.blocks, arch.multiprocessors));
  plan.seconds = streaming_seconds(plan.dram_bytes, plan.blocks, arch) +
                 waves * double(weights) / (64 * arch.clock_ghz * 1e9);
  return plan;
}

}  // namespace ghost
