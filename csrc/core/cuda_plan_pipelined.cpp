#include "core/cuda_plan_pipelined.h"

#include <algorithm>
#include <cmath>

#include "core/environment.h"

namespace ghost {
namespace {

// Bulk copies need rows of whole 16-byte vectors; the kernel works on pairs of intrinsic channels.
bool qualifies(const Problem& p, const CudaArch& arch) {
  return arch.sm >= 90 && element_size(p.dtype) == 2 && p.layout == Layout::kNHWC &&
         p.has_primary && p.kernel == 1 && p.padding == 0 && p.stride == 1 && p.ratio >= 2 &&
         (p.dw_size == 3 || p.dw_size == 5) && has_wide_rows(p) && p.out_channels % 8 == 0 &&
         p.intrinsic % 2 == 0 && p.intrinsic <= 2 * kCudaThreads && !p.has_residual &&
         !p.has_in_gate && !p.has_gate() && !p.pooled && p.batch * p.height * p.width > 0;
}

// Lanes 8 k ... 8 k + 7 read 64 bytes of each of two pixels at a time. They hit different banks if
// the two are an odd number of 64 bytes apart.
int32_t pixel_swap(int64_t channels) {
  return channels % 32 == 0 ? 0 : channels % 16 == 0 ? 1 : 2;
}

// The tile of `images` whole images or of `rows` rows; false if it does not fit.
bool lay_out(const Problem& p, const CudaArch& arch, int64_t images, int64_t rows, int64_t stages,
             PipelinedPlan& plan) {
  CudaTile& t = plan.base.tile;
  const int64_t H = p.height, W = p.width, halo = p.pad(), ghosts_per_map = p.ghosts_per_map();
  const int64_t channels = round_up(p.intrinsic, 8), rows16 = round_up(channels, 16);
  const bool whole = rows == H;
  const int64_t source = images * std::min(H, rows + 2 * halo) * W, inner = images * rows * W;
  // Larger tiles do not fit, and might exceed 32 bits below.
  if (source * p.channels + inner * p.out_channels + rows16 * p.channels +
          ghosts_per_map * channels * p.dw_size * p.dw_size >
      std::min<int64_t>(arch.smem_per_block, 1 << 18))
    return false;
  t.instance = kPipelinedChannels;
  t.channels = int32_t(channels);
  t.ghosts = int32_t(ghosts_per_map);
  t.images = int32_t(images);
  t.rows = int32_t(rows);
  t.cols = int32_t(W);
  t.halo = int32_t(halo);
  t.tiles_h = int32_t(ceil_div(H, rows));
  t.tiles = ceil_div(p.batch, images) * t.tiles_h;
  t.window_rows = 2;
  t.slice = int32_t(p.channels);
  t.pitch = int32_t(W + halo);
  t.image_rows = int32_t(whole ? H + halo : rows + 2 * halo);
  const int64_t row_count = images * t.image_rows + (whole ? halo : 0);
  // The last window may reach past the last row by the strip's unused pixels.
  const int64_t positions = row_count * t.pitch + halo + kCudaStrip;
  // Neighbouring pairs of channels, as neighbouring strips of a row, are 7 banks apart.
  plan.pair_stride = int32_t(round_up(positions - kCudaStrip, 32) + kCudaStrip);
  t.positions = int32_t(positions);
  t.max_source = int32_t(source);
  t.max_inner = int32_t(inner);

  int64_t at = 128;  // mbarriers and zeros
  const auto place = [&](int64_t bytes) {
    const int64_t here = at;
    at += round_up(bytes, 128);
    return int32_t(here);
  };
  plan.stages = int32_t(stages);
  plan.pixel_swap = pixel_swap(p.channels);
  // A warp's share of the product may have pixels past the last one.
  const int64_t products = round_up(source, kPipelinedPixels);
  plan.x_stage = int32_t(round_up(products * p.channels * 2, 128));
  // Results of halo pixels go to one extra pixel.
  plan.out_stage = int32_t(round_up((inner + 1) * p.out_channels * 2, 128));
  t.affine_at = place((3 + 3 * ghosts_per_map) * channels * 4);
  t.taps_at = place(ghosts_per_map * p.dw_size * p.dw_size * channels * 4);
  plan.positions_at = place(products * 2);
  t.b_at = place(rows16 * round_up(p.channels, 32) * 2);
  t.y_at = place(p.intrinsic / 2 * plan.pair_stride * 4);
  plan.x_at = place(stages * plan.x_stage);
  plan.out_at = place(2 * int64_t(plan.out_stage));
  t.smem_bytes = int32_t(at);
  // Positions of a tile that fits are numbers of 16 bits.
  return at <= arch.smem_per_block && positions < 1 << 16 && t.tiles < 1 << 30;
}

void estimate(const Problem& p, const CudaArch& arch, PipelinedPlan& plan) {
  CudaPlan& b = plan.base;
  CudaTile& t = b.tile;
  b.tensor_cores = true;
  b.blocks_per_sm = blocks_per_sm(arch, t.smem_bytes);
  const CudaTurns turns(t.tiles, arch.multiprocessors * b.blocks_per_sm);
  b.blocks = turns.blocks;
  t.workers = int32_t(b.blocks);

  const double d = double(p.dw_size), warps = kCudaThreads / 32;
  const int64_t pairs = p.intrinsic / 2, groups = std::max<int64_t>(kCudaThreads / pairs, 1);
  // Instructions of a thread per tile: those outside the loops, and the move of the rows of y that
  // a band shares with the band above.
  const bool carries = t.tiles_h > 1;
  const CudaCosts& costs = kCudaCosts;
  const double row = costs.bulk_row + costs.bulk_row_pixel * double(ceil_div(p.width, groups));
  const double once = costs.bulk_tile + (carries ? 2 * double(t.halo) * row : 0);
  const double fresh = carries ? double(p.height * p.width) / t.tiles_h : double(t.max_source);
  const double tasks =
      std::ceil(fresh / kPipelinedPixels) * double(ceil_div(p.intrinsic, kPipelinedChannels));
  const double task = costs.bulk_task + costs.bulk_block * double(ceil_div(p.channels, 32));
  const int64_t windows = t.images * ceil_div(t.rows, 2) * ceil_div(t.cols, kCudaStrip);
  const int64_t rounds = ceil_div(windows, groups);
  const double window = (d + 1) * (kCudaStrip + d - 1) * costs.bulk_read +
                        d * d * (2 * kCudaStrip * costs.window_tap + 2 * costs.window_tap_load) +
                        costs.bulk_window;
  const double stencil = double(t.ghosts) * window;
  const double window_warps =
      double(windows) / double(groups) * double(ceil_div(groups * pairs, 32));
  const double serial = std::ceil(tasks / warps) * task + double(rounds) * stencil + once;
  const int64_t pixels = p.batch * p.out_pixels(), weights = p.intrinsic * p.channels * 2;
  b.dram_bytes = 2 * pixels * (p.channels + p.out_channels) + weights;
  b.l2_bytes = b.dram_bytes + b.blocks * weights;

  CudaWork work;
  work.blocks = b.blocks;
  work.blocks_per_sm = b.blocks_per_sm;
  work.turns = turns.turns;
  work.issue = (tasks * task + window_warps * stencil + warps * once) / kCudaSchedulers;
  work.alone = costs.bulk_wait + costs.alone_issue * std::max(serial, work.issue);
  work.prologue = costs.bulk_start + costs.prologue_cycles + double(weights) / costs.prologue_bytes;
  work.dram_bytes = double(b.dram_bytes);
  work.l2_bytes = double(b.l2_bytes);
  b.seconds = cuda_seconds(work, arch, costs) + costs.launch_us * 1e-6;
}

}  // namespace

PipelinedPlan plan_pipelined(const Problem& p, const CudaArch& arch) {
  PipelinedPlan best;
  if (!qualifies(p, arch)) return best;
  const auto consider = [&](int64_t images, int64_t rows) {
    for (int64_t stages = 2; stages <= kPipelinedMostStages; ++stages) {
      PipelinedPlan plan;
      if (!lay_out(p, arch, images, rows, stages, plan)) return stages > 2;
      estimate(p, arch, plan);
      // A further stage is taken where it costs nothing.
      const double margin = stages > best.stages && plan.base.tile.tiles == best.base.tile.tiles
                                ? 1
                                : 1 - kCudaCosts.least_gain;
      if (best.base.blocks == 0 || plan.base.seconds <= best.base.seconds * margin) best = plan;
    }
    return true;
  };
  for (int64_t rows = 2 * p.pad(); rows < p.height; ++rows)  // at least the carried rows
    if (!consider(1, rows)) break;
  for (int64_t images = 1; images <= p.batch; ++images)
    if (!consider(images, p.height)) break;
  return best;
}

PipelinedPlan choose_pipelined(const Problem& p, const CudaArch& arch) {
  static const bool wanted = is_switched_on("GHOST_OPS_CUDA_PIPELINE");
  return wanted ? plan_pipelined(p, arch) : PipelinedPlan();
}

}  // namespace ghost
