// Matrix products of a warp: one accumulator layout for tensor cores (float16, bfloat16, TF32) and
// plain multiply-adds (float, double), so that every epilogue is written once.
//
//   c[row][col] += sum over k of a[row][k] * b[k][col]
//
// Tile map: a 16 x 8 tile of results is spread over a warp as by mma.sync. With g = lane / 4 and
// t = lane % 4 a lane holds c[0], c[1] = (row g, columns 2t, 2t + 1) and c[2], c[3] = (row g + 8,
// the same columns). Both operands lie in shared memory. Their slices of K are 64 bytes (or a power
// of two of them) wide, the rows padded by 16 bytes: ldmatrix and the scalar loads are free of bank
// conflicts.
// Binding resource: tensor cores, or shared-memory reads for the plain multiply-adds.
#pragma once

#include "core/problem.h"
#include "cuda/prim.cuh"

namespace ghost::cuda {

using prim::Accumulator;

// Storage type and arithmetic. kTensor: mma.sync (TF32 for float); else fused multiply-adds.
template <class T_, bool kTensor_>
struct Policy {
  using T = T_;
  using A = Accumulator<T_>;
  static constexpr bool kTensor = kTensor_;
  // Elements of K in one step. A slice is zero-filled up to a multiple of it.
  static constexpr int kStep = kTensor ? 32 / int(sizeof(T)) : 1;
};
using HalfPolicy = Policy<prim::half_t, true>;
using BFloat16Policy = Policy<prim::bfloat16_t, true>;
using Tf32Policy = Policy<float, true>;
using FloatPolicy = Policy<float, false>;
using DoublePolicy = Policy<double, false>;

// Blocks that a multiprocessor should hold, which bounds the registers. cuda_plan.cpp assumes the
// same. Three where that causes no spills: narrow blocks of TF32 in NHWC. One for double.
template <class P>
constexpr int min_blocks(Layout layout, int channels) {
  if (sizeof(typename P::A) == 8) return 1;
  const bool tf32 = P::kTensor && sizeof(typename P::T) == 4;
  return tf32 && layout == Layout::kNHWC && channels <= 32 ? 3 : 2;
}

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;

// How kWarpsM x kWarpsN warps share a product, kTilesM x kTilesN tiles of 16 rows and 8 columns
// each (kTilesN even). Tiles are dealt out in turn, so that a ragged last chunk leaves all warps
// about equally idle. If the block has more warps, kWarpsK groups of them split the sum over k.
template <int kTilesM_, int kTilesN_, int kWarpsM_, int kWarpsN_>
struct TileGrid {
  static constexpr int kTilesM = kTilesM_, kTilesN = kTilesN_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kWarpsK = kWarps / (kWarpsM * kWarpsN);
  static constexpr int kRows = kTilesM * kWarpsM * 16, kCols = kTilesN * kWarpsN * 8;
  static constexpr int kLaneRows = 8;  // lanes that share a column

  static __device__ __forceinline__ int warp_m() {
    const int m = int(prim::warp()) / kWarpsN;
    return kWarpsK == 1 ? m : m % kWarpsM;
  }
  static __device__ __forceinline__ int warp_n() { return int(prim::warp()) % kWarpsN; }
  static __device__ __forceinline__ int warp_k() { return int(prim::warp()) / (kWarpsM * kWarpsN); }
  static __device__ __forceinline__ int lane_row() { return int(prim::lane() >> 2); }
  // Row of the chunk of this lane's results c[0], c[1] (half = 0) or c[2], c[3] (half = 1).
  static __device__ __forceinline__ int row(int mt, int half) {
    return (mt * kWarpsM + warp_m()) * 16 + lane_row() + half * 8;
  }
  // Column of c[0] and c[2]; c[1] and c[3] have the next one.
  static __device__ __forceinline__ int col(int nt) {
    return ((nt >> 1) * kWarpsN + warp_n()) * 16 + (nt & 1) * 8 + int(prim::lane() & 3) * 2;
  }
  // How many of this warp's row tiles begin before `rows`, and pairs of column tiles before `cols`.
  static __device__ __forceinline__ int active_m(int rows) {
    const int left = (rows + 15) / 16 - warp_m();
    const int n = left <= 0 ? 0 : (left + kWarpsM - 1) / kWarpsM;
    return n < kTilesM ? n : kTilesM;
  }
  static __device__ __forceinline__ int active_n(int cols) {
    const int left = (cols + 15) / 16 - warp_n();
    const int n = left <= 0 ? 0 : (left + kWarpsN - 1) / kWarpsN;
    return n < kTilesN / 2 ? n : kTilesN / 2;
  }
};

// The eight warps of a block on kCols = 16, 32, 64 or 128 columns, 128 rows or, of 128 columns, 64.
template <int kCols>
inline constexpr int kGridWarpsN = kCols >= 128  ? 4
                                   : kCols >= 64 ? 2
                                                 : 1;
template <int kCols>
inline constexpr int kGridWarpsM = kWarps / kGridWarpsN<kCols>;
template <int kCols>
struct WarpGrid : TileGrid<(kCols >= 128 ? 64 : 128) / 16 / kGridWarpsM<kCols>,
                           kCols / 8 / kGridWarpsN<kCols>, kGridWarpsM<kCols>, kGridWarpsN<kCols>> {
};

// acc += a b over one step of K after another.
//   a, not kATrans: a[row * lda + k], points at row 0 of the chunk and the first k
//      kATrans:     a[k * lda + row]
//   b, not kBTrans: b[n * ldb + k];  kBTrans: b[k * ldb + n]
// lda, ldb: multiples of 16 bytes. Rows and columns past the active tiles are neither read nor
// written; those inside must be readable but may hold anything (a row or column affects only its
// own results). m_active, n_active are warp-uniform (WarpGrid::active_m, active_n).
//
// The lane's part of an address is computed once: a step advances the two pointers.
template <class P, class Grid, bool kATrans, bool kBTrans>
class MmaStep {
  using T = typename P::T;
  using A = typename P::A;
  static constexpr int kM = Grid::kTilesM, kN = Grid::kTilesN;

 public:
  __device__ __forceinline__ MmaStep(const T* a, int lda, const T* b, int ldb)
      : a_(a + Grid::warp_m() * 16 * (kATrans ? 1 : lda) + a_offset(lda)),
        b_(b + Grid::warp_n() * 16 * (kBTrans ? 1 : ldb) + b_offset(ldb)),
        lda_(lda),
        ldb_(ldb) {}

  // Elements from one step to the next.
  __device__ __forceinline__ void advance(int a_step, int b_step) {
    a_ += a_step;
    b_ += b_step;
  }

  __device__ __forceinline__ void run(A (&acc)[kM][kN][4], int m_active, int n_active) const {
    if constexpr (!P::kTensor)
      multiply_add(acc, m_active, n_active);
    else
      tensor(acc, m_active, n_active);
  }

 private:
  const T *a_, *b_;
  int lda_, ldb_;

  // The element of the operand's first tile that this lane begins with.
  static __device__ __forceinline__ int a_offset(int lda) {
    const int lane = int(prim::lane());
    if constexpr (!P::kTensor)
      return (lane >> 2) * (kATrans ? 1 : lda);
    else if constexpr (!kATrans)
      return (lane & 15) * lda + (lane >> 4) * (16 / int(sizeof(T)));
    else if constexpr (sizeof(T) == 2)
      return ((lane >> 4) * 8 + (lane & 7)) * lda + ((lane >> 3) & 1) * 8;
    else
      return (lane & 3) * lda + (lane >> 2);
  }
  static __device__ __forceinline__ int b_offset(int ldb) {
    const int lane = int(prim::lane());
    if constexpr (!P::kTensor)
      return (lane & 3) * 2 * (kBTrans ? 1 : ldb);
    else if constexpr (!kBTrans)
      return ((lane & 7) + (lane >> 4) * 8) * ldb + ((lane >> 3) & 1) * (16 / int(sizeof(T)));
    else if constexpr (sizeof(T) == 2)
      return (lane & 15) * ldb + (lane >> 4) * 8;
    else
      return (lane & 3) * ldb + (lane >> 2);
  }

  __device__ __forceinline__ void tensor(A (&acc)[kM][kN][4], int m_active, int n_active) const {
    uint32_t bf[kN][2];
#pragma unroll
    for (int p = 0; p < kN / 2; ++p)
      if (p < n_active) {
        uint32_t r[4];
        load_b(r, b_ + p * Grid::kWarpsN * 16 * (kBTrans ? 1 : ldb_));
        bf[2 * p][0] = r[0];
        bf[2 * p][1] = r[1];
        bf[2 * p + 1][0] = r[2];
        bf[2 * p + 1][1] = r[3];
      }
#pragma unroll
    for (int mt = 0; mt < kM; ++mt)
      if (mt < m_active) {
        uint32_t af[4];
        load_a(af, a_ + mt * Grid::kWarpsM * 16 * (kATrans ? 1 : lda_));
#pragma unroll
        for (int nt = 0; nt < kN; ++nt)
          if (nt / 2 < n_active) {
            if constexpr (sizeof(T) == 2)
              prim::mma_m16n8k16<T>(acc[mt][nt], af, bf[nt]);
            else
              prim::mma_m16n8k8_tf32(acc[mt][nt], af, bf[nt]);
          }
      }
  }

  // Fragments of a 16 x kStep tile: ldmatrix moves 16-byte rows, which may be 8 halves or 4 floats;
  // only the transposed float tile is loaded element by element.
  __device__ __forceinline__ void load_a(uint32_t (&r)[4], const T* p) const {
    if constexpr (!kATrans) {
      prim::ldmatrix_x4(r, p);
    } else if constexpr (sizeof(T) == 2) {
      prim::ldmatrix_x4_trans(r, p);
    } else {
      r[0] = prim::as_uint(p[0]);
      r[1] = prim::as_uint(p[8]);
      r[2] = prim::as_uint(p[4 * lda_]);
      r[3] = prim::as_uint(p[4 * lda_ + 8]);
    }
    round_operand(r);
  }
  // Fragments of two neighbouring kStep x 8 tiles: r[0], r[1] of the first.
  __device__ __forceinline__ void load_b(uint32_t (&r)[4], const T* p) const {
    if constexpr (!kBTrans) {
      prim::ldmatrix_x4(r, p);
    } else if constexpr (sizeof(T) == 2) {
      prim::ldmatrix_x4_trans(r, p);
    } else {
      r[0] = prim::as_uint(p[0]);
      r[1] = prim::as_uint(p[4 * ldb_]);
      r[2] = prim::as_uint(p[8]);
      r[3] = prim::as_uint(p[4 * ldb_ + 8]);
    }
    round_operand(r);
  }
  static __device__ __forceinline__ void round_operand(uint32_t (&r)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = prim::to_tf32(prim::as_float(r[i]));
    }
  }

  __device__ __forceinline__ void multiply_add(A (&acc)[kM][kN][4], int m_active,
                                               int n_active) const {
    A bv[kN][2];
#pragma unroll
    for (int nt = 0; nt < kN; ++nt)
      if (nt / 2 < n_active) {
        const int n = (nt >> 1) * Grid::kWarpsN * 16 + (nt & 1) * 8;
        bv[nt][0] = kBTrans ? b_[n] : b_[n * ldb_];
        bv[nt][1] = kBTrans ? b_[n + 1] : b_[(n + 1) * ldb_];
      }
#pragma unroll
    for (int mt = 0; mt < kM; ++mt)
      if (mt < m_active) {
        const int row = mt * Grid::kWarpsM * 16;
        const A a0 = kATrans ? a_[row] : a_[row * lda_];
        const A a1 = kATrans ? a_[row + 8] : a_[(row + 8) * lda_];
#pragma unroll
        for (int nt = 0; nt < kN; ++nt)
          if (nt / 2 < n_active) {
            acc[mt][nt][0] = prim::fma(a0, bv[nt][0], acc[mt][nt][0]);
            acc[mt][nt][1] = prim::fma(a0, bv[nt][1], acc[mt][nt][1]);
            acc[mt][nt][2] = prim::fma(a1, bv[nt][0], acc[mt][nt][2]);
            acc[mt][nt][3] = prim::fma(a1, bv[nt][1], acc[mt][nt][3]);
          }
      }
  }
};

}  // namespace ghost::cuda
