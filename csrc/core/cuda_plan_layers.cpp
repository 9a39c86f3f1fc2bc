#include "core/cuda_plan_layers.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace ghost {
namespace {

// The time to move `bytes` at the bandwidth of the memory, plus that of a launch.
double streaming_seconds(int64_t bytes, int64_t blocks, const CudaArch& arch) {
  return dram_seconds(double(bytes), blocks, arch, kCudaCosts) + kCudaCosts.launch_us * 1e-6;
}

}  // namespace

DepthwisePlan plan_depthwise(const Problem& p, bool sums, int64_t alignment, const CudaArch& arch) {
  DepthwisePlan plan;
  plan.windowed = p.layout == Layout::kNHWC && p.dw_size > 1 && element_size(p.dtype) < 8;
  const int64_t e = element_size(p.dtype), a = compute_size(p.dtype);
  plan.vec = plan.windowed ? int32_t(std::min<int64_t>(alignment, 16) / e) : 1;
  while (p.channels % plan.vec != 0) plan.vec /= 2;
  const int64_t ho = p.out_height(), wo = p.out_width();
  plan.per_row = int32_t(ceil_div(wo, plan.windowed ? depthwise_strip(p.dw_size) : 1));
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
  plan.smem_bytes = sums ? int32_t(plan.slots * plan.lanes * plan.vec * a) : 0;
  plan.dram_bytes = p.batch * p.channels * (p.height * p.width + ho * wo) * e +
                    p.channels * (p.dw_size * p.dw_size + 1) * a +
                    (sums ? p.batch * plan.splits * p.channels * a : 0);
  plan.seconds = streaming_seconds(plan.dram_bytes, plan.blocks, arch);
  return plan;
}

StemPlan plan_stem(const Problem& p, const CudaArch& arch) {
  StemPlan plan;
  const int64_t e = element_size(p.dtype), a = compute_size(p.dtype);
  plan.vec = int32_t(16 / e);
  while (p.out_channels % plan.vec != 0) plan.vec /= 2;
  plan.lanes = int32_t(p.out_channels / plan.vec);
  plan.slots = kCudaThreads / plan.lanes;
  const int64_t pixels = p.out_height() * p.out_width();
  plan.splits = int32_t(ceil_div(pixels, int64_t(plan.slots) * kStemPixels));
  plan.blocks = p.batch * plan.splits;
  const int64_t taps = p.dw_size * p.dw_size * p.channels;
  plan.dram_bytes = p.batch * (p.channels * p.height * p.width + p.out_channels * pixels) * e +
                    (taps + 1) * p.out_channels * a;
  const double sums = double(p.batch * p.out_channels * pixels * taps);
  const double rate = (a == 8 ? kCudaCosts.fma_clock_double : kCudaCosts.fma_clock) *
                      double(arch.multiprocessors) * arch.clock_ghz * 1e9;
  plan.seconds =
      std::max(streaming_seconds(plan.dram_bytes, plan.blocks, arch),
               sums * (1 + kCudaCosts.stem_address) / rate + kCudaCosts.launch_us * 1e-6);
  return plan;
}

GatePlan plan_gate(int64_t batch, int64_t channels, int64_t reduced, int64_t pixels, bool has_sums,
                   int64_t splits, DType dtype, const CudaArch& arch) {
  GatePlan plan;
  const int64_t e = element_size(dtype), a = compute_size(dtype);
  // Partial sums of an image: a vector of at most 16 bytes per thread, or one number per channel if
  // there are more channels than numbers in these vectors.
  const auto own = [&](int64_t images) { return round_up(images * (channels + reduced) * a, 128); };
  const auto bytes = [&](int64_t images) {
    return own(images) + images * std::max<int64_t>(kGateThreads * (16 / e), channels) * a;
  };
  int64_t images = std::clamp<int64_t>(ceil_div(batch, arch.multiprocessors), 1, kGateImages);
  while (images > 1 && bytes(images) > arch.smem_per_block) --images;
  if (bytes(images) > arch.smem_per_block)
    throw std::runtime_error(
        "a gate over " + std::to_string(channels) + " channels does not fit into the " +
        std::to_string(arch.smem_per_block) + " bytes of shared memory that a block may have");
  plan.images = int32_t(images);
  plan.scratch_at = int32_t(own(images));
  plan.smem_bytes = int32_t(bytes(images));
  plan.blocks = ceil_div(batch, images);
  const int64_t weights = 2 * channels * reduced * e;
  plan.dram_bytes = (has_sums ? batch * channels * splits * a : batch * channels * pixels * e) +
                    weights + (channels + reduced) * a + batch * channels * e;
  // Every block reads its weights from L2.
  const double source =
      double(images) * double(has_sums ? channels * splits * a : channels * pixels * e);
  const double dram = dram_seconds(double(plan.dram_bytes), arch.multiprocessors, arch, kCudaCosts);
  const auto seconds = [&](int64_t parts) {
    const double waves = double(ceil_div(plan.blocks * parts, arch.multiprocessors));
    const double block = waves * (source + double(weights) / double(parts));
    const double launches = parts > 1 ? 2 : 1;
    return std::max(dram, block / (kCudaCosts.l2_clock * arch.clock_ghz * 1e9)) +
           (kCudaCosts.launch_us * launches + kCudaCosts.gate_phases_us) * 1e-6;
  };
  for (int64_t parts : {2, 4, 8, 16})
    if (seconds(parts) < seconds(plan.parts)) plan.parts = int32_t(parts);
  plan.seconds = seconds(plan.parts);
  plan.blocks *= plan.parts;
  return plan;
}

}  // namespace ghost
