#include "core/cuda_plan_backward.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace ghost {
namespace {

constexpr int64_t kAlign = 128;  // bytes; of each section of shared memory

// Places aligned sections one after the other in a piece of memory.
class Sections {
 public:
  explicit Sections(int64_t align, int64_t start = 0) : align_(align), end_(start) {}
  int64_t place(int64_t bytes) {
    const int64_t here = end_;
    end_ += round_up(bytes, align_);
    return here;
  }
  int64_t end() const { return end_; }

 private:
  int64_t align_, end_;
};

[[noreturn]] void fail_for_memory(const CudaArch& arch) {
  throw std::runtime_error("no tile of this Ghost module's backward fits into the " +
                           std::to_string(arch.smem_per_block) +
                           " bytes of shared memory that a block may have");
}

// ----------------------------------------------------------------------------- second launch

class GradsPlanner {
 public:
  GradsPlanner(const Problem& p, const CudaArch& arch)
      : p_(p),
        arch_(arch),
        H_(p.out_height()),
        W_(p.out_width()),
        e_(element_size(p.dtype)),
        a_(compute_size(p.dtype)),
        ghosts_per_map_(p.ghosts_per_map()),
        pad_(p.pad()) {}

  // The tile with the rank-th least time, or the last one if there are fewer.
  GradsTile best(int rank) {
    for (; rank > 0 && find_next(); --rank) better_.push_back(best_);
    if (better_.empty()) fail_for_memory(arch_);
    return better_.back();
  }

 private:
  // Finds the best tile that is not in better_; false if there is no other.
  bool find_next() {
    any_ = false;
    search(std::max<int64_t>(ghosts_per_map_, 1));
    if (!any_ && ghosts_per_map_ > 1) search(1);
    return any_;
  }
  bool is_better(const GradsTile& t) const {
    const auto all = [](const GradsTile& c) {
      return std::tie(c.channels, c.ghosts, c.images, c.rows, c.cols);
    };
    return std::any_of(better_.begin(), better_.end(),
                       [&](const GradsTile& other) { return all(t) == all(other); });
  }
  // Considers all tiles that keep the parameters of this many ghosts of a channel.
  void search(int64_t ghosts) {
    kept_ghosts_ = ghosts;
    const int64_t most_channels = std::min<int64_t>(round_up(p_.intrinsic, 8), 64);
    int64_t last = 0;
    for (int64_t blocks = 1; blocks <= ceil_div(p_.intrinsic, 8); ++blocks) {
      const int64_t channels = round_up(ceil_div(p_.intrinsic, blocks), 8);
      if (channels > most_channels || channels == last) continue;
      last = channels;
      for (int64_t images = 1; images <= std::min<int64_t>(p_.batch, 16); images *= 2)
        consider(channels, images, H_, W_);
      for (int64_t parts_w = 1; parts_w <= ceil_div(W_, 7); parts_w *= 2) {
        const int64_t cols =
            parts_w == 1 ? W_ : std::min(W_, round_up(ceil_div(W_, parts_w), kCudaStrip));
        int64_t last_rows = 0;
        for (int64_t parts_h = 1; parts_h <= H_; parts_h += std::max<int64_t>(1, parts_h / 4)) {
          const int64_t rows = ceil_div(H_, parts_h);
          if (rows != last_rows) consider(channels, 1, rows, cols);
          last_rows = rows;
        }
      }
    }
  }

  void consider(int64_t channels, int64_t images, int64_t rows, int64_t cols) {
    constexpr int64_t kMost = 2048;  // pixels of a tile
    if (images * rows * cols > kMost) return;
    GradsTile t;
    t.channels = int32_t(channels);
    t.channel_blocks = int32_t(ceil_div(p_.intrinsic, channels));
    t.images = int32_t(images);
    t.rows = int32_t(rows);
    t.cols = int32_t(cols);
    t.halo_rows = int32_t(rows == H_ ? 0 : pad_);
    t.halo_cols = int32_t(cols == W_ ? 0 : pad_);
    t.tiles_n = int32_t(ceil_div(p_.batch, images));
    t.tiles_h = int32_t(ceil_div(H_, rows));
    t.tiles_w = int32_t(ceil_div(W_, cols));
    t.tiles = int64_t{t.tiles_n} * t.tiles_h * t.tiles_w;
    t.ghosts = int32_t(kept_ghosts_);
    // Every row of taps needs a thread.
    if (kCudaThreads / (channels / 2) < p_.dw_size || is_better(t) || !lay_out(t)) return;
    const double seconds = estimate(t);
    if (any_ && seconds >= seconds_ * (1 - costs_.least_gain)) return;
    any_ = true;
    seconds_ = seconds;
    best_ = t;
  }

  bool lay_out(GradsTile& t) const {
    const int64_t channels = t.channels, ld = channels + 2, d = p_.dw_size;
    const int64_t groups = kCudaThreads / (channels / 2);
    const int64_t ghosts = ghosts_per_map_ > 0 ? kept_ghosts_ : 0;  // whose parameters are kept
    const int64_t y =
        t.images * (t.rows + 2 * (t.halo_rows + pad_)) * (t.cols + 2 * (t.halo_cols + pad_));
    const int64_t dv = t.images * (t.rows + 2 * pad_) * (t.cols + 2 * pad_);
    Sections memory(kAlign);
    // The last strip of a row may reach past its end, into pixels whose results are not used.
    t.y_at = int32_t(memory.place((y + kCudaStrip) * channels * e_));
    t.grad_at = int32_t(memory.place(ghosts_per_map_ > 0 ? (dv + kCudaStrip) * ld * e_ : 0));
    t.dy_at = int32_t(memory.place(int64_t{t.images} * t.rows * t.cols * ld * e_));
    t.norm1_at = int32_t(memory.place(4 * channels * a_));
    t.norm2_at = int32_t(memory.place(ghosts * 6 * channels * a_));
    t.taps_at = int32_t(memory.place(ghosts * d * d * channels * a_));
    // More threads sum a weight gradient faster, but each needs a slot for every tap.
    constexpr int64_t kSlots = 24 << 10;
    const auto slot_bytes = [&] { return ghosts * d * d * t.tap_splits * channels * a_; };
    t.tap_splits = int32_t(groups / d);
    while (t.tap_splits > 1 && slot_bytes() > kSlots) --t.tap_splits;
    t.slots_at = int32_t(memory.place(std::max<int64_t>(slot_bytes(), 2 * groups * channels * a_)));
    t.combine_at = int32_t(memory.place(kCudaThreads * a_));
    t.slopes_at = int32_t(memory.place(p_.act1.act == Act::kPReLU ? groups * channels * a_ : 0));
    t.smem_bytes = int32_t(memory.end());
    return memory.end() <= arch_.smem_per_block;
  }

  // Bytes and instructions of the tiles, and how evenly they fill the multiprocessors. Chooses the
  // number of workers.
  double estimate(GradsTile& t) const {
    CudaWork work;
    work.blocks_per_sm = blocks_per_sm(arch_, t.smem_bytes);
    // Every block of the next launch adds up all workers' sums.
    const CudaTurns turns(t.tiles,
                          std::min(arch_.multiprocessors * work.blocks_per_sm / t.channel_blocks,
                                   int64_t(costs_.most_sums) / p_.intrinsic));
    t.workers = int32_t(turns.blocks);
    work.turns = turns.turns;
    work.blocks = turns.blocks * t.channel_blocks;

    const double d = double(p_.dw_size), ghosts_per_map = double(ghosts_per_map_),
                 channels = t.channels;
    const double v_rows = double(std::min<int64_t>(t.rows + 2 * t.halo_rows, H_));
    const double v_cols = double(std::min<int64_t>(t.cols + 2 * t.halo_cols, W_));
    const double y_pixels = double(t.images) *
                            double(std::min<int64_t>(t.rows + 2 * (t.halo_rows + pad_), H_)) *
                            double(std::min<int64_t>(t.cols + 2 * (t.halo_cols + pad_), W_));
    const double inner = double(t.images) * t.rows * t.cols;
    // Memory is read in sectors of 32 bytes: blocks narrower than a pixel also read bytes of
    // others.
    const int64_t row = t.channels * e_;
    const bool shares = p_.layout == Layout::kNHWC && t.channel_blocks > 1;
    const double tile_bytes = double(shares ? round_up(row, 32) : row) *
                              (y_pixels + t.images * v_rows * v_cols * ghosts_per_map + 3 * inner);
    const double strip = d * ((kCudaStrip + d - 1) * costs_.grads_read +
                              d * (costs_.window_tap_load + costs_.window_tap * kCudaStrip)) +
                         costs_.grads_result * kCudaStrip + costs_.grads_strip;
    const double strips =
        t.images * ghosts_per_map *
        ((t.rows + 2 * t.halo_rows) * double(ceil_div(t.cols + 2 * t.halo_cols, kCudaStrip)) +
         t.rows * double(ceil_div(t.cols, kCudaStrip)));
    const int64_t groups = kCudaThreads / (t.channels / 2);
    const double idle = double(groups) / (double(t.tap_splits) * d);
    const double taps = inner * ghosts_per_map * d *
                        (costs_.grads_weight_pixel + costs_.grads_weight_tap * d) * idle;
    work.issue =
        (channels / 2 * (strips * strip + taps) + y_pixels * channels * costs_.grads_element +
         tile_bytes / 16 * costs_.grads_copy) /
            kCudaLanes +
        costs_.grads_tile_cycles;
    work.alone = work.issue * costs_.grads_alone_issue;
    work.l2_bytes = tile_bytes * double(t.tiles) * t.channel_blocks;
    const double pixels = double(p_.batch) * double(H_ * W_);
    work.dram_bytes = pixels * double(p_.intrinsic) * double(e_) * (3 + ghosts_per_map);
    return cuda_seconds(work, arch_, costs_);
  }

  const Problem& p_;
  const CudaArch& arch_;
  const CudaCosts& costs_ = kCudaCosts;
  int64_t H_, W_, e_, a_, ghosts_per_map_, pad_;
  int64_t kept_ghosts_ = 1;
  GradsTile best_;
  std::vector<GradsTile> better_;
  double seconds_ = 0;
  bool any_ = false;
};

// ------------------------------------------------------------------------------ third launch

int32_t log2_up(int64_t n) {
  int32_t shift = 0;
  while (int64_t{1} << shift < n) ++shift;
  return shift;
}

// Both products from one tile of du; a plan without workers if dw1 or a tile does not fit.
PrimaryGradPlan plan_du(const Problem& p, const CudaArch& arch, bool need_dw1) {
  const int64_t m = p.intrinsic, c = p.channels, pixels = p.batch * p.out_pixels(), vector = 8;
  PrimaryGradPlan plan;
  const DuInstance* chosen = nullptr;
  int64_t slices = 0;
  for (const DuInstance& one : kDuInstances) {  // the fewest slices; of these, the first
    if (m > one.intrinsic || (chosen != nullptr && ceil_div(c, one.channels) >= slices)) continue;
    chosen = &one;
    slices = ceil_div(c, one.channels);
  }
  if (chosen == nullptr) return plan;
  DuTile t;
  t.instance = int32_t(chosen - kDuInstances);
  t.channels = int32_t(round_up(ceil_div(c, slices), vector));
  t.slices = int32_t(ceil_div(c, t.channels));
  // Computing u costs one product and saves the bytes of u: not worth it if u is a small part of
  // all bytes.
  t.makes_u = t.slices == 1 && c <= 4 * m;
  t.padded_m = int32_t(round_up(m, 16));
  t.padded_c = int32_t(round_up(t.channels, 16));
  t.m_shift = log2_up(t.padded_m / vector);
  t.c_shift = log2_up(t.padded_c / vector);
  Sections memory(kAlign);
  memory.place(int64_t{t.padded_m} * (t.padded_c + vector) * 2);
  t.coefficients_at = int32_t(memory.place(4 * int64_t{t.padded_m} * 4));
  t.combine_at = int32_t(memory.place(kCudaThreads * 4));
  t.stages_at = int32_t(memory.end());
  const int64_t sums = chosen->warp_groups > 1 ? int64_t{chosen->sums()} * 4 : 0;
  const int64_t step = std::max(16 * chosen->warp_groups, chosen->unit_rows());
  const int64_t limit = std::min(arch.smem_per_block, arch.smem_per_sm / 2 - 1024);
  int64_t least = 0;
  for (int64_t n = step; n <= std::max<int64_t>(step, kMostDuPixels); n += step) {
    const int64_t stage = round_up(
        n * ((t.makes_u ? 1 : 2) * (t.padded_m + vector) + t.padded_c + vector) * 2, kAlign);
    const int64_t bytes = t.stages_at + std::max(2 * stage, sums);
    if (bytes > limit) break;
    const int64_t tiles = ceil_div(pixels, n);
    const int64_t workers = std::min(
        tiles, std::max<int64_t>(1, arch.multiprocessors * blocks_per_sm(arch, bytes) / t.slices));
    const int64_t turns = ceil_div(tiles, workers),
                  cost = turns * (n + int64_t(kCudaCosts.du_tile_pixels));
    if (t.workers > 0 && cost >= least) continue;
    least = cost;
    t.pixels = int32_t(n);
    t.tiles = int32_t(tiles);
    t.workers = int32_t(ceil_div(tiles, turns));
    t.stage_bytes = int32_t(stage);
    plan.smem_bytes = int32_t(bytes);
  }
  plan.du = t;
  plan.dw1_splits = need_dw1 ? t.workers : 0;
  return plan;
}

PrimaryGradPlan plan_primary(const Problem& p, const CudaArch& arch, bool need_dx, bool need_dw1) {
  const int64_t e = element_size(p.dtype), a = compute_size(p.dtype), vector = 16 / e;
  const int64_t m = p.intrinsic, padded_m = round_up(m, 16);
  const int64_t pixels = p.batch * p.out_pixels(),
                cols = e == 8 ? kProductCols<8> : kProductCols<4>;
  PrimaryGradPlan plan;
  plan.dx_depth = int32_t(std::min<int64_t>(product_depth(e), padded_m));
  int64_t left = 0, right = 0;
  if (need_dx) {
    left = kProductRows * (plan.dx_depth + vector) * e;
    if (p.has_primary)
      right = std::max(plan.dx_depth * (cols + 8), kProductRows * (cols + vector)) * e;
  }
  const int64_t tile_m = std::min<int64_t>(padded_m, kProductRows),
                tile_c = std::min(round_up(p.channels, 16), cols);
  if (need_dw1) {
    const auto du_bytes = [&](int64_t n) { return n * (tile_m + 8) * e; };
    const auto x_bytes = [&](int64_t n) {
      return (p.layout == Layout::kNHWC ? n * (tile_c + 8) : tile_c * (n + vector)) * e;
    };
    constexpr int64_t kSlice = 40 << 10;  // enough bytes in flight, and room for a second block
    plan.dw1_pixels = 256;
    while (plan.dw1_pixels > 16 && (du_bytes(plan.dw1_pixels) + x_bytes(plan.dw1_pixels) > kSlice ||
                                    plan.dw1_pixels / 2 >= pixels))
      plan.dw1_pixels /= 2;
    left = std::max(left, du_bytes(plan.dw1_pixels));
    right = std::max(right, x_bytes(plan.dw1_pixels));
  }
  const auto lay_out = [&](int64_t coefficients) {
    Sections memory(kAlign);
    memory.place(4 * std::max(coefficients, need_dw1 ? tile_m : 0) * a);
    plan.dx_coefficients = int32_t(coefficients);
    plan.left_at = int32_t(memory.place(left));
    plan.right_at = int32_t(memory.place(right));
    plan.combine_at = int32_t(memory.place(kCudaThreads * a));
    plan.smem_bytes = int32_t(memory.end());
    return memory.end();
  };
  // All coefficients, unless they leave no shared memory for a second block.
  const int64_t least = lay_out(need_dx ? plan.dx_depth : 0);
  if (least > arch.smem_per_block) fail_for_memory(arch);
  const int64_t blocks = blocks_per_sm(arch, least);
  if (need_dx &&
      (lay_out(padded_m) > arch.smem_per_block || blocks_per_sm(arch, plan.smem_bytes) < blocks))
    lay_out(plan.dx_depth);

  const int64_t room = arch.multiprocessors * blocks_per_sm(arch, plan.smem_bytes);
  if (need_dx) {
    const int64_t share = need_dw1 ? ceil_div(room, 2) : room;
    const int64_t tiles = ceil_div(pixels, kProductRows);
    const int64_t parts =
        p.has_primary ? ceil_div(p.channels, cols) : ceil_div(m, int64_t{plan.dx_depth});
    plan.dx_groups = int32_t(std::clamp<int64_t>(share / tiles, 1, parts));
    plan.dx_items = tiles * plan.dx_groups;
    const int64_t turns = ceil_div(plan.dx_items, share);
    plan.dx_blocks = int32_t(ceil_div(plan.dx_items, turns));
  }
  if (need_dw1) {
    plan.dw1_tiles_m = int32_t(ceil_div(m, kProductRows));
    plan.dw1_tiles_n = int32_t(ceil_div(p.channels, cols));
    const int64_t tiles = int64_t{plan.dw1_tiles_m} * plan.dw1_tiles_n;
    const int64_t slices = ceil_div(pixels, plan.dw1_pixels);
    plan.dw1_splits = int32_t(std::clamp<int64_t>(
        (room - std::min(room - 1, int64_t{plan.dx_blocks})) / tiles, 1, slices));
  }
  return plan;
}

BackwardPlan make_plan(const Problem& problem, const CudaArch& arch, bool allow_tf32,
                       const BackwardTask& task) {
  Problem p = problem;
  p.has_residual = false;
  if (p.ratio <= 1) p.dw_size = 1;  // no ghosts, no halo
  const int64_t e = element_size(p.dtype), a = compute_size(p.dtype);
  const int64_t m = p.intrinsic, ghosts = p.ghosts(), pixels = p.batch * p.out_pixels();
  BackwardPlan plan;
  plan.tensor_cores = e == 2 || (p.dtype == DType::kFloat32 && allow_tf32);
  plan.needs = backward_needs(p, task.needs);
  const auto needs = [&](int what) { return (plan.needs & what) != 0; };
  plan.row_channels = task.u_rows ? m : round_up(m, 8);
  plan.runs_grads = needs(kNeedDy | kNeedDw2);
  plan.stores_u = plan.runs_grads && !task.u_rows;
  plan.sums_ghosts =
      ghosts > 0 && (needs(kNeedNorm2 | kNeedPrelu2) || (plan.runs_grads && task.reads_sums2));
  plan.runs_sums = plan.stores_u || plan.sums_ghosts;
  if (plan.runs_sums) {
    Problem first = p;
    if (!plan.sums_ghosts) first.ratio = first.dw_size = 1;
    if (task.u_given && p.has_primary) {  // the given u replaces x as the input
      first.channels = m;
      first.height = p.out_height();
      first.width = p.out_width();
      first.stride = 1;
      first.has_primary = false;
    }
    plan.sums = plan_cuda(first, CudaKernel::kBackwardSums, arch, allow_tf32);
  }
  if (plan.runs_grads) plan.grads = GradsPlanner(p, arch).best(cuda_plan_rank());
  const bool need_dx = needs(kNeedDx), need_dw1 = needs(kNeedDw1);
  if (need_dx || need_dw1) {
    if (e == 2 && p.layout == Layout::kNHWC && p.has_primary && p.stride == 1 && has_wide_rows(p))
      plan.primary = plan_du(p, arch, need_dw1);
    if (plan.primary.du.workers == 0) plan.primary = plan_primary(p, arch, need_dx, need_dw1);
  }
  const bool product = need_dx || need_dw1, finishes = needs(kNeedAll & ~kNeedDx);
  plan.launches = int(plan.runs_sums) + int(plan.runs_grads) + int(product) + int(finishes);

  Sections memory(256);
  const int64_t row_bytes = round_up(m, 8) * e;
  plan.u = memory.place(plan.stores_u ? pixels * row_bytes : 0);
  plan.da1 = memory.place(product ? pixels * row_bytes : 0);
  // One row of partial sums for each worker.
  const int64_t sums_workers = plan.sums_ghosts ? plan.sums.tile.workers : 0;
  const int64_t workers = plan.runs_grads ? plan.grads.workers : 0;
  plan.sums2 = memory.place(sums_workers * 2 * ghosts * a);
  plan.sums1 = memory.place(needs(kNeedDy) ? workers * 2 * m * a : 0);
  plan.dw2_sums = memory.place(needs(kNeedDw2) ? workers * ghosts * p.dw_size * p.dw_size * a : 0);
  plan.dw1_sums = memory.place(int64_t{plan.primary.dw1_splits} * m * p.channels * a);
  plan.slope_sums2 = memory.place(needs(kNeedPrelu2) ? sums_workers * ghosts * a : 0);
  plan.slope_sums1 = memory.place(needs(kNeedPrelu1) ? workers * m * a : 0);
  plan.scratch_bytes = memory.end();
  return plan;
}

}  // namespace

int backward_needs(const Problem& p, int needs) {
  if (!p.has_primary) needs &= ~kNeedDw1;
  if (p.ghosts() == 0) needs &= ~(kNeedDw2 | kNeedNorm2 | kNeedPrelu2);
  if (p.act1.act != Act::kPReLU) needs &= ~kNeedPrelu1;
  if (p.act2.act != Act::kPReLU) needs &= ~kNeedPrelu2;
  return needs & kNeedAll;
}

BackwardPlan plan_cuda_backward(const Problem& p, const CudaArch& arch, bool allow_tf32,
                                const BackwardTask& task) {
  // A search costs more than the launches: every shape is planned once.
  using Key = std::array<int64_t, 14>;
  constexpr size_t kMostPlans = 4096;
  static std::mutex mutex;
  static std::map<Key, BackwardPlan> known;
  const int64_t flags = allow_tf32 | task.u_given << 1 | task.u_rows << 2 | task.reads_sums2 << 3 |
                        (p.act1.act == Act::kPReLU) << 4 | p.has_primary << 5 | p.aligned << 6 |
                        int(p.layout) << 7 | int(p.dtype) << 8 | (p.act2.act == Act::kPReLU) << 10 |
                        task.needs << 11;
  const Key key = {p.batch,
                   p.channels,
                   p.height,
                   p.width,
                   p.stride,
                   p.intrinsic,
                   p.out_channels,
                   p.ratio,
                   p.dw_size,
                   flags,
                   arch.sm,
                   arch.multiprocessors,
                   arch.smem_per_block,
                   arch.smem_per_sm};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  const BackwardPlan plan = make_plan(p, arch, allow_tf32, task);
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= kMostPlans) known.clear();  // bounds the cache if shapes never repeat
  known.emplace(key, plan);
  return plan;
}

}  // namespace ghost
