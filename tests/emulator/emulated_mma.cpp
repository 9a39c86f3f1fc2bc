// The matrix products of a warp. They take most of the emulator's time; this file is always
// compiled with optimisation.

#include "emulated_prim.h"

namespace ghost::prim {
namespace {

// One register of a or b as numbers: two of 16 bits, or one of TF32.
template <class T, int PerRegister>
void unpack_register(uint32_t bits, float (&v)[PerRegister]) {
  if constexpr (PerRegister == 2) {
    const float2 pair = unpack_pair<T>(bits);
    v[0] = pair.x, v[1] = pair.y;
  } else {
    v[0] = as_float(bits & ~0x1fffu);
  }
}

}  // namespace

template <class T, int PerRegister>
void mma(const emu::Slot (&in)[32], emu::Slot (&out)[32]) {
  constexpr int K = 8 * PerRegister;
  float a[16][K], b[K][8], c[16][8] = {};
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4 * PerRegister;
    MmaOperands own;
    std::memcpy(&own, &in[l], sizeof own);
    for (int r = 0; r < 4; ++r) {
      float v[PerRegister];
      unpack_register<T>(own.a[r], v);
      for (int e = 0; e < PerRegister; ++e) a[g + r % 2 * 8][t + r / 2 * (K / 2) + e] = v[e];
    }
    for (int r = 0; r < 2; ++r) {
      float v[PerRegister];
      unpack_register<T>(own.b[r], v);
      for (int e = 0; e < PerRegister; ++e) b[t + r * (K / 2) + e][g] = v[e];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < K; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4 * 2;
    const float own[4] = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
    std::memcpy(&out[l], own, sizeof own);
  }
}

template void mma<half_t, 2>(const emu::Slot (&)[32], emu::Slot (&)[32]);
template void mma<bfloat16_t, 2>(const emu::Slot (&)[32], emu::Slot (&)[32]);
template void mma<float, 1>(const emu::Slot (&)[32], emu::Slot (&)[32]);

}  // namespace ghost::prim
