#include "core/cuda_plan.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace ghost {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Data sheets: A100, A10/L4 class, H100 SXM, B200.
constexpr CudaArch kArchs[] = {
    {80, 108, 164 << 10, 163 << 10, 40 << 20, 1555, 4500, 1.41, 2048},
    {86, 72, 100 << 10, 99 << 10, 6 << 20, 600, 2400, 1.70, 1024},
    {89, 58, 100 << 10, 99 << 10, 48 << 20, 300, 2400, 2.04, 1024},
    {90, 132, 228 << 10, 227 << 10, 50 << 20, 3350, 5500, 1.76, 4096},
    {100, 148, 228 << 10, 227 << 10, 126 << 20, 8000, 9000, 1.85, 4096},
};

// How a warp's results of the direct product are cut into tiles of 8 pixels x 16 channels:
// DirectGrid in product.cuh, with the widths of ghost_apply and of the other kernels.
struct DirectTiles {
  int64_t warps_n, n, m;
  DirectTiles(int64_t instance, CudaKernel kernel)
      : warps_n(instance >= 128 ? 2 : 1),
        n(instance / 16 / warps_n),
        m(tiles(instance, kernel) / n) {}
  static int64_t tiles(int64_t instance, CudaKernel kernel) {
    if (kernel == CudaKernel::kApply) return instance == 64 ? 16 : 8;
    return kernel == CudaKernel::kCheapStats ? 8 : 4;
  }
  int64_t rows() const { return 8 * m * (kCudaThreads / 32 / warps_n); }
};

// Elements between rows of a map tile in shared memory. NHWC: rows aligned to 16 bytes and an odd
// number of 16-byte (32-byte for float32) groups apart, so that the lanes of an mma fragment hit
// different banks. NCHW: an odd number of pairs apart, for the columns that its stores read.
int64_t padded_stride(int64_t channels, Layout layout, int64_t element) {
  if (layout == Layout::kNCHW) return channels + 2;
  return element < 8 && channels / 8 % 2 == 0 ? channels + 8 : channels;
}

constexpr int64_t kDirectSlice = 64;  // bytes of a pixel that the direct product takes at a time

struct Choice {
  int64_t instance, channel_blocks, ghost_blocks, images, rows, cols, slice;
  bool resident;
};

class Planner {
 public:
  Planner(const Problem& p, CudaKernel kernel, const CudaArch& arch, bool allow_tf32)
      : p_(p),
        kernel_(kernel),
        arch_(arch),
        element_(element_size(p.dtype)),
        compute_(compute_size(p.dtype)),
        tensor_(element_ == 2 || (p.dtype == DType::kFloat32 && allow_tf32)),
        direct_(element_ == 2 && p.layout == Layout::kNHWC && p.has_primary && has_wide_rows(p)),
        halo_(kernel_primary() ? 0 : p.pad()),
        ghosts_(kernel_primary() ? 0 : p.ratio - 1),
        H_(p.out_height()),
        W_(p.out_width()) {}

  CudaPlan best() {
    CudaPlan found;
    bool any = false;
    const auto consider = [&](const Choice& c) {
      CudaPlan plan;
      plan.tensor_cores = tensor_;
      if (!lay_out(c, plan.tile)) return;
      estimate(plan);
      if (!any || plan.seconds < found.seconds * 0.999) found = plan;
      any = true;
    };
    std::vector<int64_t> instances = {32};
    if (tensor_) instances = {32, 64, 128};
    if (element_ == 2 && p_.layout == Layout::kNHWC && !direct_) instances = {32, 64};
    if (direct_ && kernel_ == CudaKernel::kApply) instances.insert(instances.begin(), 16);
    if (backward()) instances.resize(element_ == 2 ? 2 : 1);
    for (int64_t instance : instances) {
      const int64_t least = ceil_div(p_.intrinsic, instance);
      for (int64_t ghost_blocks = 1; ghost_blocks <= std::max<int64_t>(ghosts_, 1);
           ++ghost_blocks) {
        for (int64_t slice_bytes : {32, 64, 128}) {
          const int64_t slice = slice_bytes / element_;
          if (!direct_ && slice_bytes > 32 && slice / 2 >= p_.channels) continue;
          if (!p_.has_primary && slice_bytes > 32) continue;
          if (direct_ && slice_bytes != kDirectSlice) continue;
          for (bool resident : {true, false}) {
            if (!p_.has_primary && !resident) continue;
            // Narrow instances have no ring; and w1 of two stages is no larger than a ring.
            if (direct_ && !resident && (instance <= 32 || p_.channels <= 2 * kCudaRing)) continue;
            // Narrower blocks than the instance has room for: more of them for a small batch.
            for (int64_t blocks : {least, 2 * least, 4 * least})
              if (blocks == least || p_.intrinsic > 8 * (blocks / 2))
                tile_shapes({instance, blocks, ghost_blocks, 1, H_, W_, slice, resident}, consider);
          }
        }
        if (any) break;  // sharing out the ghosts of a map is only for want of memory
      }
    }
    if (!any)
      throw std::runtime_error("no tile of this Ghost module fits into the " +
                               std::to_string(arch_.smem_per_block) +
                               " bytes of shared memory that a block may have");
    return found;
  }

 private:
  bool kernel_primary() const {
    return kernel_ == CudaKernel::kPrimaryStats || kernel_ == CudaKernel::kPrimaryStatsKeep;
  }
  bool backward() const { return kernel_ == CudaKernel::kBackwardSums; }
  bool keeps() const { return kernel_ == CudaKernel::kPrimaryStatsKeep; }
  // Pixels of a chunk of the product, by kernel instance: as in WarpGrid of gemm.cuh where staged.
  int64_t chunk_rows(int64_t instance) const {
    if (direct_) return DirectTiles(instance, kernel_).rows();
    return instance >= 128 ? 64 : 128;
  }
  // Whether the registers of an instance are bounded so that a multiprocessor holds three blocks of
  // it, not two: min_blocks in gemm.cuh.
  bool three_blocks(int64_t instance) const {
    const bool sums = kernel_primary() || kernel_ == CudaKernel::kCheapStats;  // registers for them
    return !sums && tensor_ && element_ == 4 && instance <= 32 && p_.layout == Layout::kNHWC;
  }

  template <class F>
  void tile_shapes(Choice c, const F& consider) {
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
        if (c.rows == H_ && c.cols == W_) continue;  // a whole image: seen above
        consider(c);
      }
    }
  }

  // The tile of a choice with its place in shared memory; false if it does not fit.
  bool lay_out(const Choice& c, CudaTile& t) const {
    const int64_t e = element_, a = compute_;
    const int64_t channels = round_up(ceil_div(p_.intrinsic, c.channel_blocks), 8);
    const int64_t ghosts = ceil_div(ghosts_, c.ghost_blocks), taps = p_.dw_size * p_.dw_size;
    if (channels > c.instance) return false;
    if (direct_ && c.resident && c.instance > 32 && 2 * channels < c.instance) return false;
    t.instance = int32_t(c.instance);
    t.direct = direct_;
    t.channels = int32_t(channels);
    t.channel_blocks = int32_t(ceil_div(p_.intrinsic, channels));
    t.ghosts = int32_t(ghosts);
    t.ghost_blocks = int32_t(ghosts == 0 ? 1 : ceil_div(ghosts_, ghosts));
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
    t.moments_at = place(sums ? (ghosts * (backward() ? 4 : 6) + 1) * kCudaThreads * a : 0);
    t.norm2_at = place(backward() ? ghosts * 6 * channels * a : 0);
    // The gradient of z, with a strip's unused pixels behind it.
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

  // Bytes and instructions of the tiles against what a multiprocessor can do, then how many blocks
  // share one. Constants are counts of instructions in the kernels' loops.
  void estimate(CudaPlan& plan) const {
    CudaTile& t = plan.tile;
    const double e = double(element_), parts = double(t.channel_blocks) * t.ghost_blocks;
    const int64_t by_smem = arch_.smem_per_sm / (t.smem_bytes + 1024);
    const bool three = three_blocks(t.instance);
    const int64_t by_registers = compute_ == 8 ? 1 : three ? 3 : 2;
    plan.blocks_per_sm = std::max<int64_t>(1, std::min(by_smem, by_registers));
    const int64_t room = arch_.multiprocessors * plan.blocks_per_sm;
    int64_t slots = std::max<int64_t>(1, room / int64_t(parts));
    if (kernel_ != CudaKernel::kApply)  // every block of the next pass reads all partials
      slots = std::min<int64_t>(slots, std::max<int64_t>(1, 8192 / t.channels));
    slots = std::max<int64_t>(1, std::min(slots, t.tiles));
    const int64_t turns = std::max<int64_t>(1, ceil_div(t.tiles, slots));
    t.slots = int32_t(std::max<int64_t>(1, ceil_div(t.tiles, turns)));
    plan.blocks = int64_t(t.slots) * int64_t(parts);

    const double source = t.max_source, inner = t.max_inner, channels = t.channels;
    const double c = double(p_.channels), d = double(p_.dw_size);
    double cycles = 0, product_cycles = 0, tile_l2 = 0;
    // A narrow copy costs as much as a wide one.
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
    // Cycles that a warp waits for x; those of the pipe to shared memory and L1, where counted.
    double latency = 0, pipe = 0;
    if (p_.has_primary) {
      const double mac = double(round_up(int64_t(source), 16)) * double(round_up(t.channels, 16)) *
                         std::ceil(c * e / 32) * 32 / e;
      const double rate = !tensor_ ? (p_.dtype == DType::kFloat64 ? 32 : 64)
                                   : double(arch_.tensor_flops_clock) / 2 / (e / 2) * 0.5;
      const double chunks = std::ceil(source / double(chunk_rows(t.instance)));
      product_cycles = mac / rate;
      tile_l2 += source * c * e;
      if (!t.resident) tile_l2 += chunks * channels * c * e;
      if (direct_)
        cycles += direct_product(t, chunks, latency, pipe);
      else
        cycles += staged_product(t, x_width, chunks);
    } else {
      tile_l2 += source * channels * e;
      cycles += source * channels * e / x_width * 20 / 128 + source * channels * 6 / 128;
    }
    cycles += source * 12 / 128 + 300;
    double serial = 0;  // instructions of one thread, where few threads have work
    if (!kernel_primary()) {
      // Windows are dealt out to groups of threads in rounds; a warp costs the same whether all of
      // its lanes have one. Per row of y: the strip with its halo (read, converted, addressed), and
      // its products; then what a window costs besides, in ghost_cheap_stats three instructions a
      // value (counted in the machine code of sm_90, as the others).
      const int64_t pairs = ceil_div(std::min<int64_t>(t.channels, p_.intrinsic), 2);
      const int64_t groups = kCudaThreads / pairs;
      const int64_t windows =
          t.images * ceil_div(t.rows, t.window_rows) * ceil_div(t.cols, kCudaStrip);
      const int64_t rounds = windows / groups, rest = windows % groups;
      const int64_t warps = rounds * ceil_div(groups * pairs, 32) + ceil_div(rest * pairs, 32);
      const double rows = d + t.window_rows - 1, each = element_ == 2 ? 4 : 2;
      const double besides =
          kernel_ == CudaKernel::kCheapStats ? 80 + 42 * t.window_rows : 64 + 36 * t.window_rows;
      const double window = rows * (kCudaStrip + d - 1) * each +
                            t.window_rows * d * d * 2 * kCudaStrip + d * d + besides;
      pipe += double(warps) * t.ghosts *
              (rows * (kCudaStrip + d - 1) + 2 * d * d + t.window_rows * kCudaStrip);
      cycles += double(warps) * t.ghosts * window / 4;
      serial = double(rounds + (rest > 0)) * t.ghosts * window;
    }
    double out_bytes = 0;
    if (kernel_ == CudaKernel::kApply && !p_.pooled)
      out_bytes = inner * channels * (1 + t.ghosts) * e * (1 + p_.has_residual + p_.has_gate());
    if (keeps()) out_bytes = inner * channels * e;
    if (backward()) out_bytes = inner * channels * (1 + t.ghosts) * e;
    cycles += out_bytes / out_width * (nhwc ? 13 : 18) / 128;
    tile_l2 += out_bytes;
    pipe += out_bytes / 128 * 3;

    const double weights = t.resident && p_.has_primary ? channels * c * e : 0;
    const double total_tiles = double(t.tiles) * parts;
    plan.l2_bytes = int64_t(total_tiles * tile_l2 + double(plan.blocks) * weights);
    const double px = double(p_.batch) * double(H_ * W_);
    const double x_bytes = double(p_.batch) * c * double(p_.height * p_.width) * e;
    // The neighbours' halo and the other channel blocks find x in L2; a little is evicted.
    plan.dram_bytes = int64_t(
        x_bytes +
        (kernel_ == CudaKernel::kApply ? (p_.pooled ? double(p_.batch) : px) * p_.out_channels * e
                                       : 0) +
        (keeps() ? px * p_.intrinsic * e : 0) + (p_.has_residual ? px * p_.out_channels * e : 0) +
        double(p_.batch * p_.out_channels * p_.gate_height * p_.gate_width) * e +
        double(p_.intrinsic) * c * e);
    const double clock = arch_.clock_ghz * 1e9;
    const double here = std::ceil(double(plan.blocks) / double(arch_.multiprocessors));
    const double side_by_side = std::min(here, double(plan.blocks_per_sm));
    const double issue = cycles / 0.7;
    // A block alone cannot overlap its phases; several can. With its two warps a scheduler it is
    // taken to issue half an instruction a cycle: an estimate from the dependences in the machine
    // code, never measured.
    const double alone =
        2500 + std::max(cycles, serial) * 2 + std::max(product_cycles + pipe * 0.5, latency);
    const double widest = std::max({issue, product_cycles, pipe});
    const double shared = side_by_side * (widest + 0.15 * (issue + product_cycles + pipe - widest));
    const double waves = std::ceil(here / double(plan.blocks_per_sm));
    const double busy = double(turns) * waves * std::max(alone, shared) / clock;
    // Too few bytes in flight do not fill the memory pipes.
    const double filled = std::min(1.0, double(plan.blocks) / double(arch_.multiprocessors));
    const double dram = double(plan.dram_bytes) / (arch_.dram_gb_s * 0.92e9 * filled);
    const double l2 = double(plan.l2_bytes) / (arch_.l2_gb_s * 0.8e9 * filled);
    const double prologue = (1500 + weights / 32 + channels * t.ghosts * d * d / 64) / clock;
    const double most = std::max({busy, dram, l2});
    plan.seconds = most + 0.15 * (busy + dram + l2 - most) + prologue + 2e-6;
  }

  // Cycles in which a scheduler issues the product of a tile. Staged: per slice the copies' and the
  // operands' addresses, the barrier; per chunk scale, shift, activation, rounding and stores of a
  // lane's results.
  double staged_product(const CudaTile& t, double x_width, double chunks) const {
    const double c = double(p_.channels), e = double(element_);
    const double results = double(t.instance * chunk_rows(t.instance)) / kCudaThreads;
    const double slices = double(ceil_div(p_.channels, t.slice));
    double cycles = t.max_source * c * e / x_width * 16 / 128;
    if (!t.resident) cycles += chunks * t.channels * c * e / 16 * 23 / 128;
    return cycles + chunks * (slices * 125 + 60 + 4 * results) * 2;
  }
  // Direct: a warp has m tiles of 8 pixels times n of 16 channels. Instructions per block of 32
  // channels of x: a row's address and load (2, with its gate 8 more), per 16 channels two reads of
  // w1 (3) and two products a tile, and what the loop costs (38). Per stage of a ring: 20 for 16
  // bytes of w1, and the barrier. Per chunk: 32 x m x n / 8 results cleared, rounded and stored,
  // also where there is no channel (6 a tile); scaled where there is one (4 a tile, 4 for scale and
  // shift), or summed (12 a tile and 3, and 4 to mask and shift; with u kept 10 to round and
  // store); positions (6 a tile of pixels); what the loop costs (54). A read of w1 or of x takes
  // the memory pipe four cycles, as 32 lanes times 16 bytes. 700 cycles until x comes from memory,
  // 200 for a stage of w1.
  double direct_product(const CudaTile& t, double chunks, double& latency, double& pipe) const {
    const DirectTiles tiles(t.instance, kernel_);
    const double m = double(tiles.m), n = double(tiles.n);
    const double active = double(ceil_div(t.channels, 16)) / double(tiles.warps_n);
    const double blocks = double(ceil_div(p_.channels, 32));
    const double ahead = m * n > 8 ? 1 : std::min(8 / m, 4.0);
    const double row = p_.has_in_gate ? 10 : 2;
    const double block = 38 + m * row + active * (3 + 2 * m);
    const double chunk = 54 + m * (6 + 6 * n) +
                         (kernel_primary() ? active * (3 + 12 * m) + m * n * (keeps() ? 14 : 4)
                                           : active * (4 + 4 * m));
    const double warp_chunks = double(ceil_div(t.max_source, 8 * tiles.m) * tiles.warps_n);
    latency = chunks * std::ceil(blocks / ahead) * 700;
    pipe = warp_chunks * (blocks * (4 * m + 8 * active) + 2 * m + active * (4 + 2 * m));
    double ring = 0;
    if (!t.resident) {
      const double bytes = double(t.channels) * double(p_.channels) * double(element_);
      const double stages = double(ceil_div(p_.channels, kCudaRing));
      ring = chunks * (bytes / 16 * 20 / 128 + stages * 100);
      latency += chunks * stages * 200;
    }
    return warp_chunks * (blocks * block + chunk) / 4 + ring;
  }

  const Problem& p_;
  CudaKernel kernel_;
  const CudaArch& arch_;
  int64_t element_, compute_;
  bool tensor_, direct_;  // CudaTile::direct
  int64_t halo_, ghosts_, H_, W_;
};

using Key = std::tuple<int, bool, int, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int, int, bool, bool, bool, bool, int64_t,
                       int64_t, int64_t, int64_t>;

Key key_of(const Problem& p, CudaKernel kernel, const CudaArch& arch, bool allow_tf32) {
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
          p.gate_height,
          p.gate_width,
          arch.multiprocessors,
          arch.smem_per_block};
}

}  // namespace

CudaArch cuda_arch(int sm, int64_t multiprocessors, int64_t smem_per_block) {
  CudaArch arch = kArchs[0];
  for (const CudaArch& known : kArchs)
    if (known.sm <= sm) arch = known;
  arch.sm = sm;
  if (multiprocessors > 0) {
    // Bandwidth goes with the size of the chip, more or less.
    const double share = double(multiprocessors) / double(arch.multiprocessors);
    arch.dram_gb_s *= share;
    arch.l2_gb_s *= share;
    arch.multiprocessors = multiprocessors;
  }
  if (smem_per_block > 0) {
    arch.smem_per_block = smem_per_block;
    arch.smem_per_sm = smem_per_block + 1024;
  }
  return arch;
}

CudaPlan plan_cuda(const Problem& p, CudaKernel kernel, const CudaArch& arch, bool allow_tf32) {
  static std::mutex mutex;
  static std::map<Key, CudaPlan> known;
  constexpr size_t kMostPlans = 4096;
  const Key key = key_of(p, kernel, arch, allow_tf32);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  const CudaPlan plan = Planner(p, kernel, arch, allow_tf32).best();
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() >= kMostPlans) known.clear();  // shapes that never repeat must not pile up
  known.emplace(key, plan);
  return plan;
}

bool cuda_stashes_u(const Problem& p) {
  // Reading x in each of three passes, against once and then writing u once and reading it twice.
  return p.has_primary && 3 * p.channels * p.height * p.width >
                              p.channels * p.height * p.width + 3 * p.intrinsic * p.out_pixels();
}

CudaTraining cuda_training(const Problem& p, bool keep_u) {
  CudaTraining t;
  t.writes_u = keep_u || cuda_stashes_u(p);
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
