#include "core/plan.h"

#include <algorithm>

namespace ghost {
namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Maps of at most this many pixels are computed as whole images if the caches allow it.
constexpr int64_t kWholeImage = 64 * 64;

// Images of at most this many pixels are prefetched one ahead. In larger ones the planes are few at
// a time and long enough for the hardware prefetcher, see gemm_nn.
constexpr int64_t kSmallImage = 1024;

// GEMM block width. Wide blocks read each weight once for many pixels, but their x columns (C *
// vecs vectors) must stay in L1 during the loop over channels. If they do not, blocks of three
// vectors cause the least L2 traffic. In large images, whose lines arrive one by one, six vectors
// are a little faster than five if there are channels enough.
int choose_vecs(const Problem& p, const CpuMachine& cpu) {
  const int64_t vector_bytes = cpu.lanes * 4;
  const int most = max_vecs(cpu.registers);
  if (most < 4) return most;
  const bool rows = p.out_pixels() > kSmallImage && p.intrinsic >= 12;
  for (int v : {rows ? 6 : 5, 3})
    if (p.channels * v * vector_bytes <= cpu.l1_bytes * 3 / 4) return v;
  return 3;
}

}  // namespace

bool keep_primary(const Problem& p) {
  return p.intrinsic * p.out_pixels() * 4 <= p.channels * p.height * p.width;
}

Traffic traffic(const Problem& p) {
  const int64_t e = element_size(p.dtype), px = p.batch * p.out_pixels();
  const int64_t m = p.intrinsic, g = p.ghosts(), d2 = p.dw_size * p.dw_size;
  const int64_t x = p.has_primary ? p.batch * p.channels * p.height * p.width : m * px,
                out = p.out_channels * px;
  const int64_t params = (p.has_primary ? p.channels * m : 0) + g * d2 + 2 * (m + g);
  Traffic t;
  t.bytes_fused = (x + out + params) * e;
  // Passes of eager mode: conv x -> u; bn u -> u'; act in place; depthwise y -> v; bn v -> v'; act
  // in place; concat reads y and z and writes out.
  const int64_t acts =
      (p.act1.act != Act::kNone ? 2 * m : 0) + (p.act2.act != Act::kNone ? 2 * g : 0);
  const int64_t conv = p.has_primary ? x + m * px : 0;
  t.bytes_eager = (conv + (2 * m + (m + g) + 2 * g + acts + (m + g)) * px + out + params) * e;
  t.flops = 2 * px * ((p.has_primary ? p.channels * m : 0) + g * d2);
  return t;
}

namespace {

// NCHW maps of at most this many pixels leave lanes idle in vectors of pixels.
constexpr int64_t kRaggedImage = 64;
// NCHW modules of at least this many intrinsic channels are transposed for tiles.
constexpr int64_t kFewestForTiles = 48;

bool takes_tiles(const Problem& p, const CpuMachine& cpu) {
  return cpu.amx && p.has_pairs && p.dtype == DType::kBFloat16 && p.depth() > 0;
}

bool takes_channel_lanes(const Problem& p, const CpuMachine& cpu) {
  if (!p.allows_channel_lanes) return false;
  if (p.layout == Layout::kNHWC || p.kernel > 1 || p.padding > 0 || p.has_tail) return true;
  // Tiles save more time in these modules than the transposition of x and out takes.
  if (takes_tiles(p, cpu) && p.intrinsic >= kFewestForTiles) return true;
  return p.has_primary && p.stride == 1 && element_size(p.dtype) == compute_size(p.dtype) &&
         p.out_pixels() <= kRaggedImage && p.channels >= p.out_channels;
}

ApplyPlan plan_channel_lanes(const Problem& p, const CpuMachine& cpu) {
  ApplyPlan plan;
  plan.channel_lanes = true;
  plan.vecs = 1;
  const int64_t a = compute_size(p.dtype), e = element_size(p.dtype), H = p.out_height(),
                W = p.out_width(), P = H * W, m = p.intrinsic, pad = p.pad();
  plan.group = m;
  plan.band_rows = H;
  // The weights of a block's slice take half of L1. The slice depends on all m channels, not on the
  // channels of one item, so that the order of a sum is the same for any number of threads.
  const int64_t lanes = cpu.lanes * 4 / a, widest = kPanel <= lanes ? 4 : 2;
  const int64_t most = cpu.l1_bytes / 2 / (std::min(ceil_div(m, lanes), widest) * lanes * a);
  const int64_t slices = p.depth() > most * 5 / 4 ? ceil_div(p.depth(), most) : 1;
  plan.depth = std::max<int64_t>(ceil_div(p.depth(), slices), 1);
  if (P == 0 || p.batch == 0) return plan;
  plan.amx = takes_tiles(p, cpu);
  if (plan.amx) plan.depth = p.depth();
  const bool nhwc = p.layout == Layout::kNHWC, same = e == a,
             plain = p.kernel == 1 && p.stride == 1 && p.padding == 0;
  const bool direct = same ? (nhwc ? p.kernel == 1 : plain) : plan.amx && nhwc && p.kernel == 1;
  plan.pack = !(p.has_primary && p.padding == 0 && direct);

  // Bytes of a pixel that must stay in L2 between the product and its ghosts.
  const int64_t out_image = P * p.out_channels * e;
  const int64_t pixel = a * ((plan.pack ? p.channels * p.stride * p.stride : 0) + p.out_channels) +
                        e * p.channels * p.stride * p.stride;
  const int64_t budget = cpu.l2_bytes / 2;
  // If the weights fit into L1 or nearly so, bands of a few rows keep y in L1, too.
  const int64_t row = W * e * (p.channels * p.stride * p.stride + p.out_channels);
  const bool light = p.depth() * m * a <= cpu.l1_bytes * 3 / 2 && H * row > cpu.l1_bytes;
  if (light) {
    const int64_t fewest = ceil_div(24, W);
    // On tiles the depthwise rows take more time than the product, and every call of the product
    // has a fixed cost: larger bands.
    const int64_t room = plan.amx ? cpu.l1_bytes * 3 : cpu.l1_bytes * 3 / 4;
    plan.band_rows = std::clamp<int64_t>(room / row, std::min(fewest, H), H);
  } else if (P * pixel <= budget) {
    const int64_t share = ceil_div(p.batch, cpu.cores);
    plan.images = std::clamp<int64_t>(budget / (P * pixel), 1, share);
    plan.images = ceil_div(p.batch, ceil_div(p.batch, plan.images));
  } else {
    // As many rows as L2 holds, because every band reads all weights.
    plan.band_rows = std::clamp<int64_t>(budget / (W * pixel), std::min(ceil_div(48, W), H), H);
  }
  plan.fetch_results =
      nhwc && !plan.pack && p.batch * (out_image + P * p.channels * e) > cpu.l2_bytes;
  const int64_t tiles = ceil_div(p.batch, plan.images), want = cpu.cores > 1 ? 2 * cpu.cores : 1;
  if (tiles < want) {
    const int64_t split = ceil_div(want, tiles), panels = ceil_div(m, kPanel);
    const int64_t cuts = H / (4 * pad + 4);  // parts with rows enough for their halo
    if (plan.images == 1 && cuts > 1 && (plan.band_rows < H || panels < split)) {
      plan.row_splits = std::min(split, cuts);
      plan.band_rows = std::min(plan.band_rows, ceil_div(H, plan.row_splits));
    } else {
      plan.channel_splits =
          std::min<int64_t>(plan.pack ? std::min(split, cpu.cores) : split, panels);
    }
  }
  plan.items = tiles * plan.row_splits * plan.channel_splits;

  plan.in_place =
      nhwc && same && !p.has_residual && !p.has_tail && p.ratio <= 2 && plan.row_splits == 1;
  // Non-temporal stores write whole rows at once, so y and z cannot be computed in out.
  plan.stream = plan.in_place && plan.channel_splits == 1 && p.out_channels > p.channels &&
                p.batch * out_image > 3 * cpu.l2_bytes;
  plan.in_place = plan.in_place && !plan.stream;
  const int64_t rows = std::min(H, plan.band_rows + 2 * pad),
                pixels = plan.band_rows == H ? plan.images * P : rows * W;
  // Elements of the rows of x with their padding.
  const int64_t height = plan.band_rows == H ? H : rows,
                lines = plan.pack ? ((height - 1) * p.stride + p.kernel) *
                                        (p.width + 2 * p.padding) * p.channels * plan.images
                                  : 0;
  const int64_t halves = (p.depth() + 2) * 2 * kPanel;  // a copy of the last channels' weights
  const int64_t panel = std::max(lines, p.has_tail ? pixels * 2 * m * p.ratio : 0);
  plan.scratch_bytes =
      a * (pixels * (plan.in_place ? 0 : m * p.ratio + (p.ratio > 2 ? p.ghosts() : 0)) + halves +
           panel + 256);
  return plan;
}

}  // namespace

ApplyPlan plan_apply(const Problem& p, const CpuMachine& cpu) {
  if (takes_channel_lanes(p, cpu)) return plan_channel_lanes(p, cpu);
  ApplyPlan plan;
  const int64_t a = compute_size(p.dtype), H = p.out_height(), W = p.out_width(), P = H * W,
                m = p.intrinsic;
  const int64_t s = std::max<int64_t>(p.ratio, 1), pad = p.pad();
  plan.vecs = choose_vecs(p, cpu);
  const bool native = p.layout == Layout::kNCHW && element_size(p.dtype) == a && p.stride == 1;
  plan.pack = p.has_primary && !native;
  if (P == 0 || p.batch == 0 || m == 0) {
    plan.group = m;
    plan.band_rows = H;
    return plan;
  }

  // Scratch bytes of a pixel of a tile for each of its channels. The scratch takes half of L2; the
  // lines of x and out pass through the rest. Transposed tiles are kept small: a block of channels
  // touches as many pages as it has rows.
  const int64_t budget =
      plan.pack && p.layout == Layout::kNHWC ? cpu.l2_bytes / 8 : cpu.l2_bytes / 2;
  const bool changed = p.has_residual || p.has_gate();  // before the store
  const bool z_in_scratch = !native || changed;         // else the kernel writes ghosts into out
  const int64_t per_channel = a * (1 + (z_in_scratch ? s - 1 : 0));
  const int64_t x_bytes = plan.pack ? p.channels * a : 0;
  plan.group = m;

  // Prefetching one tile ahead: the images of this tile and of the next one, the results and half
  // of the next results share L2 with the weights.
  const int64_t e = element_size(p.dtype), x_image = p.channels * p.height * p.width * e,
                out_image = p.out_channels * P * e, image = 2 * x_image + out_image * 3 / 2,
                room = cpu.l2_bytes * 3 / 4;
  const bool ahead = native && !p.joined && p.has_primary;

  // Whole images if a useful number of channels of one image fits; otherwise bands of rows, each
  // of which keeps the halo of y for the next one.
  const int64_t min_group = std::min<int64_t>(m, 4 * kPanel);
  if (P * (x_bytes + min_group * per_channel) <= budget && P <= kWholeImage) {
    plan.band_rows = H;
    // Images that leave the last vector mostly idle are joined.
    const int64_t vectors = ceil_div(P, cpu.lanes);
    const bool ragged = P * 10 < vectors * cpu.lanes * 9;
    // The results of joined images go through scratch. If sums are short and x is joined already,
    // that costs more than idle lanes.
    const bool side_by_side = p.joined && p.channels < 256;
    // A few pixels past whole vectors leave no lanes idle, see kMostPixels. If more is read than
    // written, joining still pays, because it reads the weights less often.
    const bool by_channels =
        ahead && s > 1 && P % (cpu.lanes * 4 / a) <= kMostPixels && p.out_channels > p.channels;
    if (ragged && p.batch > 1 && p.has_primary && !side_by_side && !by_channels) {
      const int64_t wanted = std::max<int64_t>(1, 784 / P), share = ceil_div(p.batch, cpu.cores);
      const int64_t copied = p.joined ? 0 : p.channels * a;
      plan.images = std::max<int64_t>(1, std::min({p.batch, wanted, share}));
      while (plan.images > 1 && plan.images * P * (copied + min_group * per_channel) > budget)
        --plan.images;
      if (ahead && s > 1) plan.images = std::max<int64_t>(1, std::min(plan.images, room / image));
      // Equal shares: 16 images in tiles of 5 would leave a tile of 1.
      plan.images = ceil_div(p.batch, ceil_div(p.batch, plan.images));
      if (plan.images > 1) plan.pack = !p.joined;
    }
    const int64_t px = plan.images * P, left = budget - px * (plan.pack ? p.channels * a : 0);
    plan.group = std::min(m, std::max(min_group, left / (px * per_channel) / kPanel * kPanel));
  } else {
    const int64_t row = W * (x_bytes + m * per_channel);
    int64_t rows = std::max<int64_t>(1, budget / 2 / std::max<int64_t>(row, 1) - 2 * pad);
    rows = std::min(H, std::max<int64_t>(rows, std::min<int64_t>(H, 4)));
    if (rows < H && rows > 1)
      rows -= rows % 2;  // even bands keep output rows of at least 8 floats aligned
    plan.band_rows = rows;
  }

  // Parallel items: images first, then rows of large maps, then channels of small ones.
  const int64_t tiles = ceil_div(p.batch, plan.images), want = cpu.cores > 1 ? 2 * cpu.cores : 1;
  if (tiles < want && cpu.cores > 1) {
    const int64_t split = ceil_div(want, tiles), panels = ceil_div(m, kPanel);
    const int64_t cuts = std::min(split, H / 4);  // parts of at least four rows
    if (plan.band_rows == H && panels < cuts && plan.images == 1 && H >= 2 * p.dw_size) {
      plan.band_rows = ceil_div(H, cuts);  // too few channels for all cores: cut the rows
      plan.group = m;
    }
    if (plan.band_rows < H)
      plan.row_splits = std::max<int64_t>(
          1, std::min(split, H / std::max<int64_t>(plan.band_rows / 2, 4 * pad + 1)));
    else
      plan.channel_splits =
          std::min<int64_t>(plan.pack ? std::min(split, cpu.cores) : split, panels);
  }
  plan.items = tiles * plan.row_splits * plan.channel_splits;
  const bool whole = plan.band_rows == H && P <= kWholeImage, large = P > kSmallImage;
  // If x is in cache nevertheless, prefetching slows only a few shapes with many input channels.
  if (!plan.pack && p.batch * x_image > cpu.l1_bytes) plan.fetch = Fetch::kColumns;
  if (ahead && whole && !large && plan.group == m && plan.channel_splits == 1 &&
      p.batch * x_image > cpu.l1_bytes && plan.images * image <= room)
    plan.fetch = Fetch::kImages;
  // Non-temporal stores write whole lines: planes that begin inside a line gain nothing from them.
  // Ordinary stores are faster if the place of the results can be prefetched and more is written
  // than read.
  const bool aligned = P * a % (cpu.lanes * 4) == 0;
  const bool past = native && !p.has_residual && aligned && p.batch * out_image > 3 * cpu.l2_bytes;
  const bool in_place = s > 1 && !p.has_gate();
  plan.fetch_results = past && in_place && whole && large && p.out_channels > p.channels;
  plan.stream = past && !plan.fetch_results && !(in_place && plan.fetch == Fetch::kImages);
  // dx in training. If it has more channels than du, du stays in cache and the prefetch is for the
  // place of the results, evenly over the product; else the prefetch is for both.
  if (p.joined && whole && !large && !plan.stream && plan.images == 1 &&
      plan.fetch != Fetch::kNothing) {
    if (p.out_channels > p.channels && plan.group == m && plan.channel_splits == 1)
      plan.fetch = Fetch::kImages;
    else
      plan.fetch_results = true;
  }

  const int64_t tile_px = plan.images * std::min(H, plan.band_rows + 2 * pad) * W + 64;
  const int64_t lanes_slack = 4 * 64;
  plan.scratch_bytes = a * (tile_px * ((plan.pack ? p.channels : 0) + plan.group * s) +
                            lanes_slack * (p.channels + plan.group * s + 8));
  return plan;
}

Share share_of(const Problem& p, const ApplyPlan& plan, int64_t item) {
  const int64_t channel_part = item % plan.channel_splits,
                row_part = item / plan.channel_splits % plan.row_splits,
                tile = item / plan.channel_splits / plan.row_splits,
                panels = ceil_div(p.intrinsic, kPanel), H = p.out_height();
  const auto channel = [&](int64_t part) {
    return std::min(panels * part / plan.channel_splits * kPanel, p.intrinsic);
  };
  return {tile * plan.images,
          std::min((tile + 1) * plan.images, p.batch),
          H * row_part / plan.row_splits,
          H * (row_part + 1) / plan.row_splits,
          channel(channel_part),
          channel(channel_part + 1)};
}

int64_t channel_stride(int64_t pixels, DType dtype) {
  const int64_t line = 64 / compute_size(dtype);
  return (ceil_div(pixels, line) | 1) * line;
}

int64_t channel_block(const Problem& p) {
  return p.layout == Layout::kNHWC ? 16 : 1;
}

int64_t channel_items(const Problem& p) {
  return ceil_div(p.intrinsic, channel_block(p));
}

WeightGradPath plan_weight_grad(const Problem& p, const CpuMachine& cpu) {
  const bool planes =
      p.layout == Layout::kNCHW && p.stride == 1 && element_size(p.dtype) == compute_size(p.dtype);
  if (!planes) return WeightGradPath::kTransposed;
  // The lanes of a broadcast product are the rows of the narrower operand. If these rows are few
  // or leave many lanes idle, dot products over long runs of pixels are faster.
  const int64_t narrow = std::min(p.intrinsic, p.channels);
  const bool few =
      narrow <= 8 ||
      (narrow < 32 && narrow * 10 < 7 * round_up(narrow, cpu.lanes * 4 / compute_size(p.dtype)));
  return few && p.out_pixels() >= 256 ? WeightGradPath::kDot : WeightGradPath::kBroadcast;
}

int64_t weight_grad_items(const Problem& p) {
  return ceil_div(p.intrinsic, kGradRowsPerItem);
}

bool sums_by_lanes(const Problem& p) {
  return p.layout == Layout::kNHWC && p.stride == 1 &&
         element_size(p.dtype) == compute_size(p.dtype) && p.batch * p.out_pixels() > 0;
}

bool trains_by_lanes(const Problem& p) {
  return sums_by_lanes(p) && p.ratio == 2 && p.out_channels == 2 * p.intrinsic &&
         p.act1.act != Act::kPReLU && p.act2.act != Act::kPReLU;
}

LaneItems lane_items(const Problem& p, const CpuMachine& cpu) {
  LaneItems items;
  const int64_t row = p.width * p.intrinsic * compute_size(p.dtype), map = p.height * row;
  // Three maps of a chunk, with their halo, fit into half of L2.
  const int64_t budget = cpu.l2_bytes / 6, halo = 2 * p.pad() * 2;
  items.images = std::clamp<int64_t>((256 << 10) / std::max<int64_t>(map, 1), 1,
                                     std::max<int64_t>(p.batch / 8, 1));
  items.count = ceil_div(p.batch, items.images);
  items.band = p.height;
  items.chunk_images = std::clamp<int64_t>(budget / std::max<int64_t>(map, 1), 1, items.images);
  if (map > budget)
    items.band = std::clamp<int64_t>(budget / row - halo, std::min<int64_t>(p.height, 4), p.height);
  return items;
}

}  // namespace ghost
