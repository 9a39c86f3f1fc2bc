#include "core/cuda_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace ghost {
namespace {

// Whether the kernel also sums the gradients of a PReLU's slopes.
bool sums_slopes(const Problem& p, CudaKernel kernel) {
  return kernel == CudaKernel::kBackwardSums && p.act2.act == Act::kPReLU;
}

// How a warp's results of the direct product are cut into tiles of 8 pixels x 16 channels:
// DirectGrid in product.cuh, with the widths of ghost_apply and of the other kernels.
struct DirectTiles {
  int64_t warps_n, n, m;
  DirectTiles(int64_t instance, CudaKernel kernel)
      : warps_n(instance >= 128 ? 2 : 1),
        n(instance / 16 / warps_n),
        m(direct_tiles(instance, kernel) / n) {}
  int64_t rows() const { return 8 * m * (kCudaThreads / 32 / warps_n); }
};

// Elements between rows of a map tile in shared memory. NHWC: rows are aligned to 16 bytes and an
// odd number of 16-byte (32-byte for float32) groups apart, so that the lanes of an mma fragment
// hit different banks. NCHW: rows are an odd number of pairs apart, because the stores read
// columns.
int64_t padded_stride(int64_t channels, Layout layout, int64_t element) {
  if (layout == Layout::kNCHW) return channels + 2;
  return element < 8 && channels / 8 % 2 == 0 ? channels + 8 : channels;
}

constexpr int64_t kDirectSlice = 64;  // bytes of a pixel that the direct product takes at a time

class Planner {
 public:
  Planner(const Problem& p, CudaKernel kernel, const CudaArch& arch, bool allow_tf32,
          const CudaCosts& costs)
      : p_(p),
        kernel_(kernel),
        arch_(arch),
        costs_(costs),
        element_(element_size(p.dtype)),
        compute_(compute_size(p.dtype)),
        tensor_(element_ == 2 || (p.dtype == DType::kFloat32 && allow_tf32)),
        direct_(element_ == 2 && p.layout == Layout::kNHWC && p.has_primary && has_wide_rows(p)),
        halo_(kernel_primary() ? 0 : p.pad()),
        ghosts_per_map_(kernel_primary() ? 0 : p.ghosts_per_map()),
        H_(p.out_height()),
        W_(p.out_width()) {}

  // The plan with the rank-th least time, or the last one if there are fewer.
  CudaPlan best(int rank) {
    std::vector<CudaChoice> better;
    std::optional<CudaPlan> found = search(better), next = found;
    for (; next && rank > 1; --rank) {
      better.push_back(choice_of(next->tile));
      next = search(better);
      if (next) found = next;
    }
    return *found;
  }

  std::optional<CudaPlan> plan_of(const CudaChoice& c) const {
    CudaPlan plan;
    plan.tensor_cores = tensor_;
    if (!lay_out(c, plan.tile)) return {};
    estimate(plan);
    return plan;
  }

 private:
  // The best plan that is not in `better`; nullopt if there is no other.
  std::optional<CudaPlan> search(const std::vector<CudaChoice>& better) const {
    std::optional<CudaPlan> found;
    bool any = false;
    const auto consider = [&](const CudaChoice& c) {
      const std::optional<CudaPlan> plan = plan_of(c);
      if (!plan) return;
      any = true;
      if (std::find(better.begin(), better.end(), choice_of(plan->tile)) != better.end()) return;
      if (!found || plan->seconds < found->seconds * (1 - costs_.least_gain)) found = plan;
    };
    std::vector<int64_t> instances = {32};
    if (tensor_) instances = {32, 64, 128};
    if (element_ == 2 && p_.layout == Layout::kNHWC && !direct_) instances = {32, 64};
    if (direct_ && kernel_ == CudaKernel::kApply) instances.insert(instances.begin(), 16);
    if (backward()) instances.resize(element_ == 2 ? 2 : 1);
    for (int64_t instance : instances) {
      const int64_t least = ceil_div(p_.intrinsic, instance);
      for (int64_t ghost_blocks = 1; ghost_blocks <= std::max<int64_t>(ghosts_per_map_, 1);
           ++ghost_blocks) {
        for (int64_t slice_bytes : {32, 64, 128}) {
          const int64_t slice = slice_bytes / element_;
          if (!direct_ && slice_bytes > 32 && slice / 2 >= p_.channels) continue;
          if (!p_.has_primary && slice_bytes > 32) continue;
          if (direct_ && slice_bytes != kDirectSlice) continue;
          for (bool resident : {true, false}) {
            if (!p_.has_primary && !resident) continue;
            // Narrow instances have no ring, and w1 of at most two stages stays resident.
            if (direct_ && !resident && (instance <= 32 || p_.channels <= 2 * kCudaRing)) continue;
            // Blocks narrower than the instance: more blocks for a small batch.
            for (int64_t blocks : {least, 2 * least, 4 * least})
              if (blocks == least || p_.intrinsic > 8 * (blocks / 2))
                tile_shapes({instance, blocks, ghost_blocks, 1, H_, W_, slice, resident}, consider);
          }
        }
        if (any) break;  // the ghosts of a map are split only if a block lacks shared memory
      }
    }
    if (!any)
      throw std::runtime_error("no tile of this Ghost module fits into the " +
                               std::to_string(arch_.smem_per_block) +
                               " bytes of shared memory that a block may have");
    return found;
  }

  bool kernel_primary() const {
    return kernel_ == CudaKernel::kPrimaryStats || kernel_ == CudaKernel::kPrimaryStatsKeep;
  }
  bool backward() const { return kernel_ == CudaKernel::kBackwardSums; }
  bool keeps() const { return kernel_ == CudaKernel::kPrimaryStatsKeep; }
  // Pixels of a chunk of the product, by kernel instance; staged: as in WarpGrid of gemm.cuh.
  int64_t chunk_rows(int64_t instance) const {
    if (direct_) return DirectTiles(instance, kernel_).rows();
    return instance >= 128 ? 64 : 128;
  }
  // Whether the register bound of an instance lets a multiprocessor hold three blocks of it, not
  // two: min_blocks in gemm.cuh.
  bool three_blocks(int64_t instance) const {
    const bool sums = kernel_primary() || kernel_ == CudaKernel::kCheapStats;  // need registers
    return !sums && tensor_ && element_ == 4 && instance <= 32 && p_.layout == Layout::kNHWC;
  }

  template <class F>
  void tile_shapes(CudaChoice c, const F& consider) const {
    constexpr int64_t kMost = 2048;  // pixels of a tile
    for (int64_t images = 1; images <= p_.batch && images * H_ * W_ <= kMost; ++images) {
      if (images > 8 && images % 4 != 0) continue;
      const int64_t in = p_.channels * p_.height * p_.width, out = p_.out_channels * H_ * W_;
      const int64_t gate = p_.out_channels * p_.gate_height * p_.gate_width;
      if (images > 1 && images * std::max({in, out, gate}) >= int64_t(1) << 31) break;
      c.images = images;
      consider(c);
    }
    if (p_.pooled) return;
    c.images = 1;
    int64_t last_cols = 0;
    for (int64_t parts_w = 1; parts_w <= ceil_div(W_, 7); parts_w *= 2) {
      c.cols = parts_w == 1 ? W_ : std::min(W_, round_up(ceil_div(W_, parts_w), kCudaStrip));
      if (c.cols == last_cols) continue;
      last_cols = c.cols;
      int64_t last_rows = 0;
      for (int64_t parts_h = 1; parts_h <= H_; parts_h += std::max<int64_t>(1, parts_h / 4)) {
        c.rows = ceil_div(H_, parts_h);
        if (c.rows == last_rows || c.rows * c.cols > kMost) continue;
        last_rows = c.rows;
        if (c.rows == H_ && c.cols == W_) continue;  // whole images were considered above
        consider(c);
      }
    }
  }

  // The tile of a choice with its layout of shared memory; false if it does not fit.
  bool lay_out(const CudaChoice& c, CudaTile& t) const {
    const int64_t e = element_, a = compute_;
    const int64_t channels = round_up(ceil_div(p_.intrinsic, c.channel_blocks), 8);
    const int64_t ghosts = ceil_div(ghosts_per_map_, c.ghost_blocks),
                  taps = p_.dw_size * p_.dw_size;
    if (channels > c.instance) return false;
    if (direct_ && c.resident && c.instance > 32 && 2 * channels < c.instance) return false;
    t.instance = int32_t(c.instance);
    t.direct = direct_;
    t.channels = int32_t(channels);
    t.channel_blocks = int32_t(ceil_div(p_.intrinsic, channels));
    t.ghosts = int32_t(ghosts);
    t.ghost_blocks = int32_t(ghosts == 0 ? 1 : ceil_div(ghosts_per_map_, ghosts));
    t.images = int32_t(c.images);
    t.rows = int32_t(c.rows);
    t.cols = int32_t(c.cols);
    t.halo = int32_t(halo_);
    const bool all_rows = c.rows == H_, all_cols = c.cols == W_;
    t.tiles_h = int32_t(ceil_div(H_, c.rows));
    t.tiles_w = int32_t(ceil_div(W_, c.cols));
    t.tiles = ceil_div(p_.batch, c.images) * t.tiles_h * t.tiles_w;
    t.pitch = int32_t(all_cols ? W_ + halo_ : c.cols + 2 * halo_);
    t.image_rows = int32_t(all_rows ? H_ + halo_ : c.rows + 2 * halo_);
    const int64_t row_count = c.images * t.image_rows + (all_rows ? halo_ : 0);
    // The last window may reach past the last row by the strip's unused pixels.
    const int64_t positions = row_count * t.pitch + halo_ + kCudaStrip;
    t.y_stride = int32_t(padded_stride(channels, p_.layout, e));
    t.z_stride = int32_t(padded_stride(channels * std::max<int64_t>(ghosts, 1), p_.layout, e));
    const int64_t source =
        c.images * std::min(H_, c.rows + 2 * halo_) * std::min(W_, c.cols + 2 * halo_);
    const int64_t inner = c.images * c.rows * c.cols;
    t.window_rows = !kernel_primary() && !backward() && e == 2 ? 2 : 1;
    t.slice = int32_t(c.slice);
    t.slice_log2 = 0;
    while (1 << t.slice_log2 < t.slice) ++t.slice_log2;
    t.resident = c.resident;
    const int64_t rows16 = round_up(channels, 16), padded_c = round_up(p_.channels, c.slice);
    const int64_t pad = direct_ ? 0 : 16 / e, rows = chunk_rows(c.instance);
    t.b_stride = int32_t((c.resident ? padded_c : c.slice) + pad);
    if (p_.has_primary && !direct_) {
      t.a_stride = int32_t(p_.layout == Layout::kNHWC ? c.slice + pad : rows + 8);
      t.a_stage =
          int32_t(round_up((p_.layout == Layout::kNHWC ? rows : c.slice) * t.a_stride * e, 128));
      if (!c.resident) t.b_stage = int32_t(round_up(rows16 * t.b_stride * e, 128));
    }

    const bool stores = kernel_ == CudaKernel::kApply || keeps();
    const bool has_y = !kernel_primary() || keeps() || !p_.has_primary;
    int64_t stage = kCudaStages * (int64_t(t.a_stage) + t.b_stage);
    if (kernel_ == CudaKernel::kApply && ghosts > 0)
      stage = std::max(stage, inner * t.z_stride * e);
    int64_t at = 0;
    const auto place = [&](int64_t bytes) {
      const int64_t here = at;
      at += round_up(bytes, 128);
      return int32_t(here);
    };
    if (positions * t.y_stride * e >= int64_t(1) << 30 || stage >= int64_t(1) << 30) return false;
    t.max_source = int32_t(source);
    t.max_inner = int32_t(inner);
    t.positions = int32_t(positions);
    t.source_at = place(8 * (source + kCudaSpareRows));
    t.inner_at = place(stores ? 8 * inner : 0);
    t.gate_at = place(p_.has_gate() ? 4 * inner : 0);
    t.in_gate_stride = p_.has_in_gate ? int32_t(round_up(p_.channels, kCudaGatePad)) : 0;
    t.in_gate_at = place(c.images * t.in_gate_stride * e);
    t.affine_at = place(kernel_primary() ? 0 : (3 + 3 * ghosts) * channels * a);
    t.taps_at = place(ghosts * taps * channels * a);
    const bool sums = kernel_ == CudaKernel::kCheapStats || backward();
    const int64_t kinds = backward() && !sums_slopes(p_, kernel_) ? 4 : 6;
    t.moments_at = place(sums ? (ghosts * kinds + 1) * kCudaThreads * a : 0);
    t.norm2_at = place(backward() ? ghosts * 6 * channels * a : 0);
    // The gradient of z, and the unused pixels of its last strip.
    const int64_t grads = backward() && ghosts > 0 ? inner + kCudaStrip : 0;
    t.grad_at = place(grads * (channels + 2) * e);
    const int64_t ring = direct_ ? 2 * kCudaRing : 0;
    t.b_at = place(p_.has_primary ? rows16 * (c.resident ? t.b_stride : ring) * e : 0);
    t.y_at = place(has_y ? positions * t.y_stride * e : 0);
    t.stage_at = place(stage);
    // The sums of a block's slots, after its last tile: ghost_primary_stats_kernel.
    if (kernel_primary()) at = std::max(at, t.b_at + (kCudaThreads + 3 * 2048) * a);
    t.smem_bytes = int32_t(at);
    return at <= arch_.smem_per_block;
  }

  // The time of the tiles, from their bytes and instructions and the rates of a multiprocessor;
  // also chooses the number of workers.
  void estimate(CudaPlan& plan) const {
    CudaTile& t = plan.tile;
    const double e = double(element_), parts = double(t.channel_blocks) * t.ghost_blocks;
    const bool three = three_blocks(t.instance);
    plan.blocks_per_sm = blocks_per_sm(arch_, t.smem_bytes, compute_ == 8 ? 1 : three ? 3 : 2);
    int64_t most = arch_.multiprocessors * plan.blocks_per_sm / int64_t(parts);
    if (kernel_ != CudaKernel::kApply)  // every block of the next pass reads all partials
      most = std::min(most, int64_t(costs_.most_partials) / t.channels);
    const CudaTurns turns(t.tiles, most);
    t.workers = int32_t(turns.blocks);
    plan.blocks = int64_t(t.workers) * int64_t(parts);

    const double source = t.max_source, inner = t.max_inner, channels = t.channels;
    const double c = double(p_.channels), d = double(p_.dw_size);
    CudaWork work;
    double latency = 0;  // cycles that a warp waits for x
    double tile_l2 = 0;
    // Bytes of the widest copy for runs of `count` elements: a narrow copy costs as much as a wide
    // one.
    const auto width = [&](int64_t count) {
      int64_t bytes = 16;
      while (bytes > element_ && count * element_ % bytes != 0) bytes /= 2;
      return double(bytes);
    };
    const bool nhwc = p_.layout == Layout::kNHWC;
    const bool whole = t.tiles_w == 1 && p_.stride == 1;
    const int64_t run = t.tiles_h == 1 ? H_ * W_ : W_;
    const double x_width = nhwc ? width(p_.channels) : whole ? width(run) : e;
    const double out_width = nhwc             ? width(std::gcd(p_.intrinsic, p_.out_channels))
                             : t.tiles_w == 1 ? width(run)
                                              : width(t.cols);
    if (p_.has_primary) {
      const double mac = double(round_up(int64_t(source), 16)) * double(round_up(t.channels, 16)) *
                         std::ceil(c * e / 32) * 32 / e;
      const double plain = p_.dtype == DType::kFloat64 ? costs_.fma_clock_double : costs_.fma_clock;
      const double rate =
          tensor_ ? double(arch_.tensor_flops_clock) / 2 / (e / 2) * costs_.product_share
                  : plain * costs_.plain_share;
      const double chunks = std::ceil(source / double(chunk_rows(t.instance)));
      work.product = mac / rate;
      tile_l2 += source * c * e;
      if (!t.resident) tile_l2 += chunks * channels * c * e;
      if (direct_)
        direct_product(t, chunks, work, latency);
      else
        staged_product(t, x_width, chunks, work);
    } else {
      tile_l2 += source * channels * e;
      work.issue +=
          source * channels * (e / x_width * costs_.copy_vector + costs_.copy_element) / kCudaLanes;
    }
    work.issue += source * costs_.pixel_table / kCudaLanes + costs_.tile_cycles;
    double serial = 0;  // instructions of the busiest thread, if few threads have work
    if (!kernel_primary()) serial = windows(t, work);
    double out_bytes = 0;
    if (kernel_ == CudaKernel::kApply && !p_.pooled)
      out_bytes = inner * channels * (1 + t.ghosts) * e * (1 + p_.has_residual + p_.has_gate());
    if (keeps()) out_bytes = inner * channels * e;
    if (backward()) out_bytes = inner * channels * (1 + t.ghosts) * e;
    work.issue += out_bytes / out_width * (nhwc ? costs_.out_nhwc : costs_.out_nchw) / kCudaLanes;
    tile_l2 += out_bytes;
    work.pipe += out_bytes / 128 * costs_.out_pipe;

    const double weights = t.resident && p_.has_primary ? channels * c * e : 0;
    const double total_tiles = double(t.tiles) * parts;
    plan.l2_bytes = int64_t(total_tiles * tile_l2 + double(plan.blocks) * weights);
    const double px = double(p_.batch) * double(H_ * W_);
    const double x_bytes = double(p_.batch) * c * double(p_.height * p_.width) * e;
    // x is counted once: neighbouring tiles (halo) and other channel blocks hit L2. Evictions are
    // neglected.
    plan.dram_bytes = int64_t(
        x_bytes +
        (kernel_ == CudaKernel::kApply ? (p_.pooled ? double(p_.batch) : px) * p_.out_channels * e
                                       : 0) +
        (keeps() ? px * p_.intrinsic * e : 0) + (p_.has_residual ? px * p_.out_channels * e : 0) +
        double(p_.batch * p_.out_channels * p_.gate_height * p_.gate_width) * e +
        double(p_.intrinsic) * c * e);
    work.blocks = plan.blocks;
    work.blocks_per_sm = plan.blocks_per_sm;
    work.turns = turns.turns;
    work.alone = costs_.alone_cycles + std::max(work.issue, serial) * costs_.alone_issue +
                 std::max(work.product + work.pipe * costs_.alone_pipe_share, latency);
    work.prologue = costs_.prologue_cycles + weights / costs_.prologue_bytes +
                    channels * t.ghosts * d * d / costs_.prologue_taps;
    const double lost = total_tiles * runs(t) * costs_.run_bytes;
    work.dram_bytes = double(plan.dram_bytes) + lost;
    work.l2_bytes = double(plan.l2_bytes) + lost;
    plan.seconds = cuda_seconds(work, arch_, costs_) + costs_.launch_us * 1e-6;
  }

  // The number of runs of consecutive addresses that a tile of ghost_apply reads and writes in
  // NHWC.
  double runs(const CudaTile& t) const {
    if (p_.layout != Layout::kNHWC || kernel_ != CudaKernel::kApply) return 0;
    const bool rows = t.tiles_w > 1, parts = t.channel_blocks * t.ghost_blocks > 1;
    const double in =
        rows ? double(t.max_source) / std::min<double>(double(W_), t.cols + 2.0 * t.halo) : 1;
    const double out = parts  ? double(t.max_inner) * (1 + t.ghosts)
                       : rows ? double(t.images) * t.rows
                              : 1;
    return in + out;
  }

  // Adds the depthwise windows of a tile. Groups of threads take the windows in rounds; a warp
  // costs the same for any number of active lanes. Returns the instructions of the busiest thread.
  double windows(const CudaTile& t, CudaWork& work) const {
    const double d = double(p_.dw_size), width = kCudaStrip + d - 1;
    const int64_t pairs = ceil_div(std::min<int64_t>(t.channels, p_.intrinsic), 2);
    const int64_t groups = kCudaThreads / pairs;
    const int64_t windows =
        t.images * ceil_div(t.rows, t.window_rows) * ceil_div(t.cols, kCudaStrip);
    const int64_t rounds = windows / groups, rest = windows % groups;
    const int64_t warps = rounds * ceil_div(groups * pairs, 32) + ceil_div(rest * pairs, 32);
    const double rows = d + t.window_rows - 1;
    const double window =
        rows * width * (element_ == 2 ? costs_.window_read_half : costs_.window_read) +
        d * d * (costs_.window_tap * kCudaStrip * t.window_rows + costs_.window_tap_load) +
        (kernel_ == CudaKernel::kCheapStats
             ? costs_.window_stats + costs_.window_stats_row * t.window_rows
             : costs_.window_setup + costs_.window_row * t.window_rows);
    work.issue += double(warps) * t.ghosts * window / kCudaSchedulers;
    work.pipe += double(warps) * t.ghosts *
                 (rows * width * costs_.window_pipe_read + d * d * costs_.window_pipe_tap +
                  t.window_rows * kCudaStrip * costs_.window_pipe_store);
    return double(rounds + (rest > 0)) * t.ghosts * window;
  }

  // Adds the staged product of a tile. Both warps of a scheduler take every slice and chunk.
  void staged_product(const CudaTile& t, double x_width, double chunks, CudaWork& work) const {
    const double c = double(p_.channels), e = double(element_);
    const double results = double(t.instance * chunk_rows(t.instance)) / kCudaThreads;
    const double slices = double(ceil_div(p_.channels, t.slice));
    work.issue += t.max_source * c * e / x_width * costs_.staged_copy / kCudaLanes;
    if (!t.resident)
      work.issue += chunks * t.channels * c * e / 16 * costs_.staged_weights / kCudaLanes;
    const double warps = kCudaThreads / 32 / kCudaSchedulers;
    work.issue +=
        chunks * warps *
        (slices * costs_.staged_slice + costs_.staged_chunk + results * costs_.staged_result);
  }
  // Adds the direct product of a tile, and the cycles that its warps wait for x and w1.
  void direct_product(const CudaTile& t, double chunks, CudaWork& work, double& latency) const {
    const DirectTiles tiles(t.instance, kernel_);
    const double m = double(tiles.m), n = double(tiles.n);
    const double active = double(ceil_div(t.channels, 16)) / double(tiles.warps_n);
    const double blocks = double(ceil_div(p_.channels, 32));
    const double ahead = m * n > 8 ? 1 : std::min(8 / m, 4.0);
    const double row = costs_.direct_row + (p_.has_in_gate ? costs_.direct_row_gate : 0);
    const double block = costs_.direct_block + m * row +
                         active * (costs_.direct_weights + costs_.direct_products * m);
    const double results = kernel_primary()
                               ? active * (costs_.direct_weights + costs_.direct_sums * m) +
                                     m * n * (keeps() ? costs_.direct_kept : costs_.direct_masked)
                               : active * (costs_.direct_affine_load + costs_.direct_affine * m);
    const double chunk =
        costs_.direct_chunk + m * (costs_.direct_positions + costs_.direct_results * n) + results;
    const double warp_chunks = double(ceil_div(t.max_source, 8 * tiles.m) * tiles.warps_n);
    work.issue += warp_chunks * (blocks * block + chunk) / kCudaSchedulers;
    work.pipe +=
        warp_chunks * (blocks * (costs_.direct_pipe_x * m + costs_.direct_pipe_weights * active) +
                       costs_.direct_pipe_positions * m +
                       active * (costs_.direct_pipe_affine + costs_.direct_pipe_results * m));
    latency = chunks * std::ceil(blocks / ahead) * costs_.latency_x;
    if (!t.resident) {
      const double bytes = double(t.channels) * double(p_.channels) * double(element_);
      const double stages = double(ceil_div(p_.channels, kCudaRing));
      work.issue +=
          chunks * (bytes / 16 * costs_.ring_copy / kCudaLanes + stages * costs_.ring_stage);
      latency += chunks * stages * costs_.latency_weights;
    }
  }

  const Problem& p_;
  CudaKernel kernel_;
  const CudaArch& arch_;
  const CudaCosts& costs_;
  int64_t element_, compute_;
  bool tensor_, direct_;  // CudaTile::direct
  int64_t halo_, ghosts_per_map_, H_, W_;
};

using Key = std::tuple<int, bool, int, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int, int, bool, bool, bool, bool, bool, int64_t,
                       int64_t, int64_t, int64_t, int>;

Key key_of(const Problem& p, CudaKernel kernel, const CudaArch& arch, bool allow_tf32, int rank) {
  return {int(kernel),
          p.aligned,
          arch.sm,
          allow_tf32,
          p.batch,
          p.channels,
          p.height,
          p.width,
          p.stride,
          p.intrinsic,
          p.out_channels,
          p.ratio,
          p.dw_size,
          int(p.dtype),
          int(p.layout),
          p.has_primary,
          p.has_residual,
          p.has_in_gate,
          p.pooled,
          sums_slopes(p, kernel),
          p.gate_height,
          p.gate_width,
          arch.multiprocessors,
          arch.smem_per_block,
          rank};
}

}  // namespace

int64_t direct_tiles(int64_t instance, CudaKernel kernel) {
  if (kernel == CudaKernel::kApply) return instance == 64 ? 16 : 8;
  return kernel == CudaKernel::kCheapStats ? 8 : 4;
}

bool operator==(const CudaChoice& a, const CudaChoice& b) {
  const auto all = [](const CudaChoice& c) {
    return std::tie(c.instance, c.channel_blocks, c.ghost_blocks, c.images, c.rows, c.cols, c.slice,
                    c.resident);
  };
  return all(a) == all(b);
}

CudaChoice choice_of(const CudaTile& t) {
  return {t.instance, t.channel_blocks, t.ghost_blocks, t.images,
          t.rows,     t.cols,           t.slice,        t.resident != 0};
}

std::optional<CudaPlan> plan_cuda_choice(const Problem& p, CudaKernel kernel, const CudaArch& arch,
                                         bool allow_tf32, const CudaChoice& choice,
                                         const CudaCosts& costs) {
  return Planner(p, kernel, arch, allow_tf32, costs).plan_of(choice);
}

int cuda_plan_rank() {
  static const int rank = [] {
    const char* text = std::getenv("GHOST_OPS_CUDA_PLAN");
    const std::string value = text == nullptr || *text == '\0' ? "1" : text;
    if (value != "1" && value != "2" && value != "3")
      throw std::runtime_error("environment variable GHOST_OPS_CUDA_PLAN='" + value +
                               "': expected one of '1', '2', '3'");
    return value[0] - '0';
  }();
  return rank;
}

CudaPlan plan_cuda(const Problem& p, CudaKernel kernel, const CudaArch& arch, bool allow_tf32,
                   int rank) {
  static std::mutex mutex;
  static std::map<Key, CudaPlan> known;
  constexpr size_t kMostPlans = 4096;
  const Key key = key_of(p, kernel, arch, allow_tf32, rank);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  const CudaPlan plan = Planner(p, kernel, arch, allow_tf32, kCudaCosts).best(rank);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= kMostPlans) known.clear();  // bounds the cache if shapes never repeat
  known.emplace(key, plan);
  return plan;
}

bool cuda_stashes_u(const Problem& p) {
  // x read three times, against x read once, u written once and read twice.
  return p.has_primary && 3 * p.channels * p.height * p.width >
                              p.channels * p.height * p.width + 3 * p.intrinsic * p.out_pixels();
}

CudaTraining cuda_training(const Problem& p, bool keep_u, bool batch1) {
  CudaTraining t;
  t.writes_u = keep_u || (batch1 && cuda_stashes_u(p));
  t.primary = t.cheap = t.apply = p;
  t.primary.act1 = t.primary.act2 = {};
  t.primary.ratio = t.primary.dw_size = 1;
  t.primary.out_channels = p.intrinsic;
  t.primary.has_residual = false;
  if (t.writes_u && p.has_primary) {
    t.apply.channels = p.intrinsic;
    t.apply.height = p.out_height();
    t.apply.width = p.out_width();
    t.apply.stride = 1;
    t.apply.has_primary = false;
  }
  t.cheap = t.apply;
  t.cheap.act2 = {};
  t.cheap.out_channels = p.intrinsic * p.ratio;
  t.cheap.has_residual = false;
  return t;
}

CudaPackedLayout::CudaPackedLayout(DType dtype, int64_t channels, int64_t intrinsic, int64_t ghosts,
                                   int64_t dw_size, bool has_primary, bool prelu1, bool prelu2) {
  const int64_t e = element_size(dtype), a = compute_size(dtype);
  folded = has_primary && (e == a || channels == 1);
  scale1 = has_primary ? round_up(intrinsic * channels * e, a) : 0;
  shift1 = scale1 + (folded ? 0 : intrinsic * a);
  w2 = shift1 + intrinsic * a;
  shift2 = w2 + ghosts * dw_size * dw_size * a;
  slopes1 = shift2 + ghosts * a;
  slopes2 = slopes1 + (prelu1 ? intrinsic * a : 0);
  bytes = slopes2 + (prelu2 ? ghosts * a : 0);
}

}  // namespace ghost
