// Products of bfloat16 with channels along the lanes, on the tiles of AMX: NHWC.
//
//   Y[p][c] = act(shift[c] + scale[c] * sum_k X[p][k] W[k][c])      sums in float32
//
// Tile map: tiles 0 to 3 hold the sums of up to 16 pixels by the 16 channels of a panel each; tile
// 4 holds x of these pixels and up to 32 k, in the order of NHWC; tile 5 holds the packed weights
// of these k, two to an element of 32 bits. Tiles 6 and 7 are tiles 4 and 5 for the last k if K is
// not a multiple of 32. A last, partial tile of pixels overlaps the tile before: both compute the
// same values.
// Binding resource: the loads of x from L2, the stores of the sums.
#pragma once

#include <cmath>

#include "cpu/lanes.h"

// The assemblers that come with these compilers have the AMX instructions.
#if defined(__linux__) && defined(__x86_64__) && defined(__AVX512F__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define GHOST_OPS_AMX_UNIT 1
#endif
#elif !defined(__AVX2__)
#define GHOST_OPS_EMULATED_AMX_UNIT 1
#endif

namespace ghost {
namespace GHOST_ISA {

inline constexpr int kTileRows = 16, kTileBytes = 64;
inline constexpr int kTileDepth = kTileBytes / int(sizeof(BFloat16));

// The operand of ldtilecfg.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row of each tile
  uint8_t rows[16] = {};
};

// rows: pixels of a tile; depth, rest: k of tiles 4 and 5, and of 6 and 7.
inline TileConfig tile_config(int rows, int depth, int rest) {
  TileConfig c;
  for (int t = 0; t < 4; ++t) c.rows[t] = uint8_t(rows), c.bytes[t] = kTileBytes;
  for (int t = 4; t < 8; ++t) {
    const int k = t < 6 ? depth : rest;
    if (k == 0) continue;
    c.rows[t] = uint8_t(t % 2 == 0 ? rows : k / 2);
    c.bytes[t] = uint16_t(t % 2 == 0 ? k * int(sizeof(BFloat16)) : kTileBytes);
  }
  return c;
}

#if defined(GHOST_OPS_AMX_UNIT)
// Rounds to nearest, ties to even, as Narrow does; subnormal numbers become zero. All processors
// with tiles have this instruction.
GHOST_INLINE VecU16 narrow_flushed(VecF v) {
  VecU16 h;
  asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
  return h;
}

struct Tiles {
  explicit Tiles(const TileConfig& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int kTile>
  GHOST_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  GHOST_INLINE void read(const void* p, int64_t step) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(step) : "memory");
  }
  template <int kTile>
  GHOST_INLINE void write(void* p, int64_t step) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(p), "r"(step) : "memory");
  }
  // sums += x * w
  template <int kSums, int kX, int kW>
  GHOST_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
  }
};
#elif defined(GHOST_OPS_EMULATED_AMX_UNIT)
// The instructions in software, for tests on any machine.
GHOST_INLINE VecU16 narrow_flushed(VecF v) {
  const VecU32 u = (VecU32)v, tiny = (VecU32)((u & 0x7fffffffu) < 0x00800000u);
  return Narrow::apply((VecF)(u & ~(tiny & 0x7fffffffu)), BFloat16{});
}

class Tiles {
  const TileConfig config_;
  char tile_[8][kTileRows][kTileBytes];

  // The instruction treats subnormal operands as zero, and rounds subnormal results to zero.
  static float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
  template <class E>
  E& element(int t, int row, int i) {
    return reinterpret_cast<E*>(tile_[t][row])[i];
  }
  float value(int t, int row, int i) {
    const uint32_t bits = uint32_t(element<uint16_t>(t, row, i)) << 16;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return flushed(v);
  }

 public:
  explicit Tiles(const TileConfig& c) : config_(c) {}

  template <int kTile>
  void zero() {
    std::memset(tile_[kTile], 0, sizeof tile_[kTile]);
  }
  template <int kTile>
  void read(const void* p, int64_t step) {
    for (int r = 0; r < config_.rows[kTile]; ++r)
      std::memcpy(tile_[kTile][r], static_cast<const char*>(p) + r * step, config_.bytes[kTile]);
  }
  template <int kTile>
  void write(void* p, int64_t step) {
    for (int r = 0; r < config_.rows[kTile]; ++r)
      std::memcpy(static_cast<char*>(p) + r * step, tile_[kTile][r], config_.bytes[kTile]);
  }
  // Even and odd k have separate sums, which are added at the end.
  template <int kSums, int kX, int kW>
  void multiply() {
    for (int r = 0; r < config_.rows[kSums]; ++r)
      for (int c = 0; c < kTileBytes / 4; ++c) {
        float sums[2] = {0.0f, 0.0f};
        for (int k = 0; k < config_.rows[kW]; ++k)
          for (int i = 0; i < 2; ++i)
            sums[i] = flushed(std::fma(value(kX, r, 2 * k + i), value(kW, k, 2 * c + i), sums[i]));
        float& to = element<float>(kSums, r, c);
        to = flushed(flushed(to) + flushed(sums[0] + sums[1]));
      }
  }
};
#endif

#if defined(GHOST_OPS_AMX_UNIT) || defined(GHOST_OPS_EMULATED_AMX_UNIT)
inline constexpr bool kHasTiles = true;

// bfloat16 in memory, for products on tiles.
struct TileStorage : HalfStorage<BFloat16> {
  static GHOST_INLINE void store(BFloat16* p, VecF v) {
    const VecU16 h = narrow_flushed(v);
    std::memcpy(p, &h, sizeof h);
  }
  static GHOST_INLINE void store_n(BFloat16* p, VecF v, int64_t n) {
    const VecU16 h = narrow_flushed(v);
    std::memcpy(p, &h, size_t(std::min<int64_t>(n, kLanes<float>)) * sizeof(BFloat16));
  }
};

// The sums of some tiles of pixels and a panel of channels.
//   x: the first pixel of each tile; run: values k of a row of taps
//   w: the panel, [K / 2][kPanel][2]
//   ahead: memory to prefetch, as many bytes as the tiles read; or null
//   sums: [pixels of a tile][kPanel] of each tile
template <size_t... kTile>
void tile_sums(Tiles& tiles, std::index_sequence<kTile...>, const LaneSource<BFloat16>& in,
               const BFloat16* const* x, const BFloat16* w, int64_t run, const char* ahead,
               float (*sums)[kTileRows * kPanel]) {
  constexpr int64_t kSize = sizeof(BFloat16), kRow = kTileBytes;
  const int64_t step = in.pixel * kSize, depth = std::min<int64_t>(run, kTileDepth);
  (tiles.template zero<int(kTile)>(), ...);
  for (int64_t tap = 0; tap < in.taps; ++tap) {
    int64_t at = tap * in.tap, left = run;
    for (; left >= depth; left -= depth, at += depth, w += depth * kPanel) {
      tiles.template read<5>(w, kRow);
      ((tiles.template read<4>(x[kTile] + at, step), tiles.template multiply<int(kTile), 4, 5>()),
       ...);
      if (ahead) {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows * int(sizeof...(kTile)); ++i, ahead += kTileBytes)
          __builtin_prefetch(ahead, 0, 2);
      }
    }
    if (left == 0) continue;
    tiles.template read<7>(w, kRow);
    ((tiles.template read<6>(x[kTile] + at, step), tiles.template multiply<int(kTile), 6, 7>()),
     ...);
    w += left * kPanel;
  }
  (tiles.template write<int(kTile)>(sums[kTile], kRow), ...);
}

// y [rows][ld] = act(scale * sums + shift) of a tile; channels: of the panel.
template <Act kAct>
void finish_tile(const float* sums, int rows, const float* scale, const float* shift, float slope,
                 float* y, int64_t ld, int64_t channels) {
  constexpr int L = kLanes<float>;
  for (int64_t v = 0; v < channels; v += L, sums += L, y += L) {
    const VecF a = load(scale + v), b = load(shift + v);
    const int64_t left = channels - v;
    const auto value = [&](int q) __attribute__((always_inline)) {
      return activate<kAct>(load(sums + q * kPanel) * a + b, slope);
    };
    if (left >= L)
      for (int q = 0; q < rows; ++q) store(y + q * ld, value(q));
    else
      for (int q = 0; q < rows; ++q) store_first(y + q * ld, value(q), left);
  }
}

// lane_product on tiles, for an even number of values k in a row of taps: y [pixels][ld].
//   pairs: [ceil(M / kPanel)][K / 2][kPanel][2]
//   scale, shift: [M], padded to kPanel
//   fetch: prefetch x, which is contiguous, from beyond L2
inline void tile_product(const LaneSource<BFloat16>& in, const BFloat16* pairs, int64_t K,
                         const float* scale, const float* shift, int64_t M, float* y, int64_t ld,
                         const Activation& act, bool fetch) {
  const int64_t run = K / in.taps, lines = in.images * in.rows,
                per_line = (in.pixels + kTileRows - 1) / kTileRows, total = lines * per_line;
  if (total == 0) return;
  const int64_t rows = (in.pixels + per_line - 1) / per_line;
  const int rest = run > kTileDepth ? int(run % kTileDepth) : 0;
  Tiles tiles(tile_config(int(rows), int(std::min<int64_t>(run, kTileDepth)), rest));
  alignas(64) float sums[4][kTileRows * kPanel];
  with_activation(act.act, [&](auto code) {
    for (int64_t c = 0; c < M; c += kPanel, pairs += K * kPanel)
      for (int64_t t = 0; t < total; t += 4) {
        const int64_t count = std::min<int64_t>(4, total - t);
        const BFloat16* x[4];
        int64_t pixel[4];
        for (int64_t i = 0; i < count; ++i) {
          const int64_t line = (t + i) / per_line,
                        q = std::min((t + i) % per_line * rows, in.pixels - rows);
          x[i] = in.x + line / in.rows * in.image + line % in.rows * in.row + q * in.pixel;
          pixel[i] = line * in.pixels + q;
        }
        with_constant<1, 2, 3, 4>(count, [&](auto n) {
          const char* ahead = nullptr;
          if (fetch && c == 0) ahead = reinterpret_cast<const char*>(x[0] + 4 * rows * in.pixel);
          tile_sums(tiles, std::make_index_sequence<decltype(n)::value>{}, in, x, pairs, run, ahead,
                    sums);
        });
        for (int64_t i = 0; i < count; ++i)
          finish_tile<decltype(code)::value>(sums[i], int(rows), scale + c, shift + c,
                                             float(act.slope), y + pixel[i] * ld + c, ld,
                                             std::min(kPanel, M - c));
      }
  });
}
#else
inline constexpr bool kHasTiles = false;
using TileStorage = Storage<BFloat16>;
#endif

}  // namespace GHOST_ISA
}  // namespace ghost
