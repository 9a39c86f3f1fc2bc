// The Ghost module as plain data: the launchers of every backend and the planner take it.
#pragma once

#include <cstdint>

namespace ghost {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Layout : int { kNCHW = 0, kNHWC = 1 };

// Codes are shared with ghost_ops/activations.py.
enum class Act : int {
  kNone = 0,
  kReLU = 1,
  kReLU6 = 2,
  kLeakyReLU = 3,
  kSiLU = 4,
  kHardswish = 5,
  kGELU = 6,
  kGELUTanh = 7,
  kPReLU = 8,  // LeakyReLU with a slope per channel
};
inline constexpr int kNumActs = 8;  // activations without parameters

struct Activation {
  Act act = Act::kNone;
  double slope = 0.0;  // LeakyReLU only
};

//   u = w1 * x
//   y = act1(bn1(u))
//   v = w2 (*) y
//   z = act2(bn2(v))
//   out = concat(y, z)[:, :out_channels]
struct Problem {
  int64_t batch = 0;
  int64_t channels = 0;           // C of x
  int64_t height = 0, width = 0;  // of x
  int64_t kernel = 1;        // k of the k x k primary convolution; more than 1: channel lanes only
  int64_t padding = 0;       // zeros on every side of x
  int64_t stride = 1;        // of the primary convolution
  int64_t intrinsic = 0;     // m
  int64_t out_channels = 0;  // of out
  int64_t ratio = 2;         // ghosts per intrinsic map, plus one
  int64_t dw_size = 3;       // d
  Activation act1, act2;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kNCHW;
  bool has_primary = true;  // false: x is u (the primary convolution ran elsewhere)
  bool has_residual = false;
  bool pooled = false;       // out is the mean over its pixels, [N, out_channels]; ratio 1 only
  bool has_in_gate = false;  // x is multiplied by a gate [N, C] when it is read
  int64_t gate_height = 0, gate_width = 0;  // of a gate [N, out_channels, Hg, Wg]; 0: none
  bool joined = false;                // x is [C, N, H, W]: the images of a channel are adjacent
  bool allows_channel_lanes = false;  // set by the operator: no gate, no PReLU
  bool has_tail = false;              // an affine map and act2 follow y in out; channel lanes only
  bool aligned = true;                // x and w1 start at multiples of 16 bytes; CUDA only
  bool has_pairs = false;             // packed holds the primary weights in bfloat16 too

  int64_t out_size(int64_t size) const {
    const int64_t padded = size + 2 * padding;
    return size > 0 && padded >= kernel ? (padded - kernel) / stride + 1 : 0;
  }
  int64_t out_height() const { return out_size(height); }
  int64_t out_width() const { return out_size(width); }
  int64_t depth() const { return channels * kernel * kernel; }  // K of the product
  int64_t out_pixels() const { return out_height() * out_width(); }
  int64_t ghosts_per_map() const { return ratio - 1; }
  int64_t ghosts() const { return intrinsic * ghosts_per_map(); }
  int64_t pad() const { return dw_size / 2; }
  bool has_gate() const { return gate_height > 0; }
};

inline int64_t element_size(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}
// Arithmetic and packed parameters: float64 for float64, float32 for everything else.
inline DType compute_dtype(DType t) {
  return t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
inline int64_t compute_size(DType t) {
  return element_size(compute_dtype(t));
}

// Primary weights are packed in panels of this many output channels: a panel is whole vectors, and
// every register block of the GEMM (2, 4, 8 or 16 channels) is a contiguous slice of one panel.
inline constexpr int64_t kPanel = 16;
inline int64_t round_up(int64_t a, int64_t b) {
  return (a + b - 1) / b * b;
}

// Offsets (in elements of the compute type) inside the packed parameter vector of `ghost_pack`:
// w1 [ceil(m / kPanel)][K][kPanel], shift1 [m] padded to kPanel, w2 [ghosts][d * d], shift2
// [ghosts]; without a primary convolution scale1 and shift1 [m] come first, and there is no w1.
struct PackedLayout {
  int64_t w1 = 0, shift1 = 0, w2 = 0, shift2 = 0, scale1 = 0;
  int64_t lane_taps = 0;  // w2 again, as [d * d][ghosts]
  // The bfloat16 weights without bn1's scale, [ceil(m / kPanel)][K / 2][kPanel][2], and the scale:
  // products in bfloat16 apply it to their sums, because scaled weights would have to be rounded.
  int64_t pairs = 0, pair_scale = 0;
  int64_t tail = 0, numel = 0;  // at the end: scale and shift of the tail, not counted in numel
  PackedLayout(int64_t channels, int64_t intrinsic, int64_t ghosts, int64_t dw_size,
               bool has_primary) {
    const int64_t padded = round_up(intrinsic, kPanel);
    if (has_primary) {
      shift1 = padded * channels;  // bn1's scale is folded into w1
      w2 = shift1 + padded;
    } else {
      shift1 = intrinsic;  // scale1 first, then shift1
      w2 = 2 * intrinsic;
    }
    shift2 = w2 + ghosts * dw_size * dw_size;
    lane_taps = shift2 + ghosts;
    tail = numel = lane_taps + ghosts * dw_size * dw_size;
  }
  explicit PackedLayout(const Problem& p)
      : PackedLayout(p.depth(), p.intrinsic, p.ghosts(), p.dw_size, p.has_primary) {
    if (p.has_pairs) add_pairs(p.depth(), p.intrinsic);
  }
  // For an even number of input values.
  void add_pairs(int64_t channels, int64_t intrinsic) {
    const int64_t padded = round_up(intrinsic, kPanel);
    pairs = round_up(numel, kPanel);
    pair_scale = pairs + padded * channels / 2;
    tail = numel = pair_scale + padded;
  }
};

}  // namespace ghost
