"""Planted mistakes in the CUDA sources, each of which must make a check fail.

Each mistake is a replacement of text in a copy of csrc. Only the files in ``compile`` are compiled
again; the rest of the library is linked unchanged. If the text of a mistake is not found in the
source, the test fails: the list must follow the code.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import emulator
import pytest
from cuda_driver import Job, results_of

NHWC = ("cuda/instances/forward_half_nhwc.cu",)
STAGED = ("cuda/instances/forward_tf32_nhwc.cu",)
NCHW = ("cuda/instances/forward_half_nchw.cu",)
GRADS = ("cuda/instances/backward_half.cu",)
PRIMARY = ("cuda/instances/backward_half.cu",)
BOTH = ("cuda/instances/backward_du_half.cu",)
SUMS = ("cuda/instances/backward_sums_half.cu",)
PLAN = ("core/cuda_plan.cpp",)
LAYERS = ("cuda/instances/layers_half.cu",)
PIPELINED = ("cuda/instances/pipelined_half_sm90.cu",)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake.

    Args:
        name: what is wrong.
        file: relative to csrc; old, new: the text there and what stands in its place.
        compile: which sources are compiled with it.
        cases: checks of ``cuda_driver``, one of which must fail.
        schedules: under which to run them.
        device: the GPU that the emulator stands for.
        count: how often ``old`` occurs; all are replaced.
        pipeline: the checks run with GHOST_OPS_CUDA_PIPELINE=1.
    """

    name: str
    file: str
    old: str
    new: str
    compile: Sequence[str]
    cases: Sequence[str]
    schedules: Sequence[str] = ("plain", "greedy-eager", "reversed")
    device: str = "sm_90"
    count: int = 1
    pipeline: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return {"GHOST_OPS_CUDA_PIPELINE": str(int(self.pipeline))}

    @property
    def quick(self) -> bool:
        """Whether every test run plants it: one mistake of each kind."""
        return self.name in QUICK


SYNC = "prim::sync_threads();"
TILE, FORWARD, APPLY = "cuda/tile.cuh", "cuda/forward.cuh", "cuda/apply.cuh"
PRODUCT, STORES = "cuda/product.cuh", "cuda/stores.cuh"
EVAL = ("eval nhwc", "eval deep", "eval wide", "eval lean")
EVAL_STAGED = ("eval staged", "eval staged deep")
DEPTHWISE, GATE = "cuda/depthwise_conv.cuh", "cuda/squeeze_excite.cuh"
RING = ("eval huge",)  # w1 does not fit into shared memory
TRAIN = ("train nhwc", "train deep", "train wide", "frozen nhwc")
DU, CHEAP = "cuda/backward_du.cuh", "cuda/backward_cheap.cuh"
# The mistakes of every test run.
QUICK = """
no barrier after the copies
one wait too few
halo off by one
pixels too many overwrite others
weights read before they are there
ring read before its stage has landed
gate of another image
row of taps one off
hidden values without a barrier
load not waited for
no fence before the bulk store
output stage used again too early
one stage of x too few
ReLU swallows NaN
shared memory too small
no barrier between dv and its use
no barrier between du and its products
next tile over the one at work
sums of slopes not cleared
one norm's kind for both
""".strip().splitlines()


def pipelined(
    name: str, old: str, new: str, cases: Sequence[str] = ("bands", "images"), **changes: Any
) -> Mutant:
    """A mistake in ghost_apply_pipelined, where blocks take several tiles."""
    where = {"file": "cuda/apply_pipelined.cuh", "compile": PIPELINED, **changes}
    return Mutant(name, old=old, new=new, cases=cases, device="tiny sm_90", pipeline=True, **where)


LOAD_WAIT = "prim::mbarrier_wait(full + stage, uint32_t(parity));"
READ_WAIT = "if (leader) prim::bulk_wait_read<0>();  // the other"
PIPELINED_MUTANTS = [
    pipelined("load not waited for", LOAD_WAIT, ""),
    pipelined("load waited for by one warp", LOAD_WAIT, f"if (prim::warp() == 0) {LOAD_WAIT}"),
    pipelined("wrong parity", "parity ^= 1;", "parity = 0;"),
    pipelined(
        "no fence before the bulk store", f"prim::fence_async();\n    {READ_WAIT}", READ_WAIT
    ),
    pipelined("no fence after the barriers", "prim::fence_async();\n    for", "for"),
    pipelined("output stage used again too early", READ_WAIT, "// the other"),
    pipelined("one stage of x too few", "++stage == plan.stages", "++stage == plan.stages - 1"),
    pipelined("one output stage", "half ^= 1;", ""),
    pipelined("x loaded where it is read", f"{SYNC}\n    if (leader) load", "if (leader) load"),
    pipelined("bulk store of unfinished results", f"the barrier\n    {SYNC}", "the barrier"),
    pipelined("bulk store too short", "channels) * 2);", "channels) * 2 - 16);"),
    pipelined("bulk load too short", "(p.c) * 2;\n    prim", "(p.c) * 2 - 16;\n    prim"),
    pipelined("bulk load too long", "(full + stage, bytes)", "(full + stage, bytes - 16)"),
    pipelined("rows outside the image", "+ t.halo > p.h)", "+ t.halo > p.h + 99)"),
    pipelined("carried rows overwritten", f"own, out);\n        {SYNC}", "own, out);"),
    pipelined("carried rows not stored", "if (r < 0 || r >=", "if (r <= 0 || r >="),
    pipelined("image of a pixel", "row / p.h * t.pitch", "row / p.h"),
    pipelined("past the last channel", "exists ? from : shared + kPipelinedZerosAt", "from"),
    pipelined(
        "shared memory of half a plan", "t.smem_bytes = int32_t(at);",
        "t.smem_bytes = int32_t(at / 2);", file="core/cuda_plan_pipelined.cpp",
        compile=("core/cuda_plan_pipelined.cpp",),
    ),
]  # fmt: skip

MUTANTS = [
    Mutant(
        "no barrier after the copies", PRODUCT,
        f"      }}\n      {SYNC}\n    }}\n    load_next();", "      }\n    }\n    load_next();",
        STAGED, EVAL_STAGED,
    ),
    Mutant(
        "one wait too few", PRODUCT, "cp_async_wait<kCudaStages - 2>",
        "cp_async_wait<kCudaStages - 1>", STAGED, EVAL_STAGED,
    ),
    Mutant(
        "barrier for some warps", PRODUCT, f"{SYNC}\n    }}\n    load_next();",
        f"if (prim::warp() < 7) {SYNC}\n    }}\n    load_next();", STAGED, EVAL_STAGED,
    ),
    Mutant(
        "one stage too few", PRODUCT, "== kCudaStages)", "== kCudaStages - 1)", STAGED,
        EVAL_STAGED, count=2,
    ),
    Mutant(
        "weights read before they are there", PRODUCT,
        f"!ring) {{\n      prim::cp_async_wait<0>();\n      {SYNC}",
        "!ring) {\n      prim::cp_async_wait<0>();", NHWC, EVAL,
    ),
    Mutant(
        "ring read before its stage has landed", PRODUCT,
        f"prim::cp_async_wait<0>();\n          {SYNC}", SYNC, NHWC, RING,
    ),
    Mutant(
        "ring filled while it is read", PRODUCT, f"prim::cp_async_wait<0>();\n          {SYNC}",
        "prim::cp_async_wait<0>();", NHWC, RING,
    ),
    Mutant(
        "the other stage of the ring", PRODUCT, "block = (filling ^ 1) * stage_blocks",
        "block = filling * stage_blocks", NHWC, RING, schedules=("plain",),
    ),
    Mutant(
        "pixels of the chunk before", PRODUCT, "begin_chunk(q0 + Grid::kRows)",
        "begin_chunk(begun ? q0 : 0)", NHWC, ("eval many", "eval bands"), schedules=("plain",),
        device="tiny sm_86",
    ),
    Mutant(
        "columns of another lane", PRODUCT, "kPlace[] = {0, 8, 512, 520}",
        "kPlace[] = {0, 512, 8, 520}", NHWC, RING, schedules=("plain",),
    ),
    Mutant(
        "halo off by one", TILE, "tile.src_h = max_of(tile.h0 - t.halo, 0);",
        "tile.src_h = max_of(tile.h0 - t.halo + 1, 0);", NHWC, EVAL,
    ),
    Mutant("padding not cleared", FORWARD, "clear_padding(y, t, tile);", "", NHWC, EVAL),
    Mutant(
        "no barrier before the tables", FORWARD,
        f"const A* slope = shift + t.channels;\n  {SYNC}", "const A* slope = shift + t.channels;",
        NHWC, ("eval bands",), device="tiny sm_86",
    ),
    Mutant(
        "no barrier after the tables", FORWARD, f"clear_padding(y, t, tile);\n  {SYNC}",
        "clear_padding(y, t, tile);", NHWC, (*EVAL, "eval u"),
    ),
    Mutant(
        "no barrier before the depthwise", FORWARD, f"  }}\n  {SYNC}\n}}", "  }\n}", NHWC, EVAL
    ),
    Mutant(
        "no barrier before the stores", APPLY,
        f"    if (t.ghosts > 0 || gated) {SYNC}\n", "", NHWC, EVAL,
    ),
    Mutant(
        "gate of another pixel", STORES, "int(float(tile.w0 + c) * o.gate_cols)",
        "int(float(tile.w0 + c + 1) * o.gate_cols)", NHWC, ("eval gate",), schedules=("plain",),
    ),
    Mutant(
        "no wait for the kernel before", APPLY, "  prim::wait_for_previous_kernel();\n", "", NHWC,
        ("eval nhwc",), schedules=("plain",),
    ),
    Mutant(
        "slope of another channel", "cuda/epilogue.cuh", "(act.slopes, first + int64_t(i) * step)",
        "(act.slopes, first)", NHWC, ("eval prelu",), schedules=("plain",),
    ),
    Mutant(
        "scale left out of the taps", APPLY, "t.channels, taps_count, affine + j * 3 * t.channels",
        "t.channels, taps_count, static_cast<const A*>(nullptr)", NHWC, ("train nhwc",),
        schedules=("plain",),
    ),
    Mutant(
        "strip not masked", APPLY, "if (s < count) store_pair(", "store_pair(", NHWC,
        ("eval lean", "eval lean bands"), schedules=("plain",),
    ),
    Mutant(
        "lean where it does not apply", "cuda/forward.cu", "p.ratio == 2 &&", "true &&",
        ("cuda/forward.cu",), ("eval ratio relu",), schedules=("plain",),
    ),
    Mutant(
        "whole vectors of a misaligned view", "core/cuda_plan.h", "return p.aligned && ",
        "return ", PLAN, ("eval misaligned",), schedules=("plain",),
    ),
    Mutant(
        "second row of a window one off", "cuda/depthwise.cuh",
        "add_row<kD, 1>(row, taps + 2 * (i - 1) * kD, acc[1])",
        "add_row<kD, 1>(row, taps + 2 * i * kD, acc[1])", NCHW, ("eval nchw",),
        schedules=("plain",),
    ),
    Mutant(
        "coefficients of other channels", "cuda/backward_primary.cuh",
        "reload_coefficients(p, k0,", "reload_coefficients(p, 0,", PRIMARY, ("many channels",),
        schedules=("plain",), device="58 KiB",
    ),
    Mutant(
        "coefficients of other channels, u", "cuda/backward_primary.cuh",
        "reload_coefficients(p, c0,", "reload_coefficients(p, 0,", PRIMARY, ("many channels, u",),
        schedules=("plain",), device="40 KiB",
    ),
    Mutant(
        "parameters of another ghost", "cuda/backward_grads.cuh",
        "if (!all_kept) begin_ghosts<T>(p, me, j,", "if (!all_kept) begin_ghosts<T>(p, me, 0,",
        ("cuda/instances/backward_float64.cu",), ("many ghosts",), schedules=("plain",),
        device="58 KiB",
    ),
    Mutant(
        "weight gradient of the last tile only", "cuda/backward_grads.cuh",
        "out = more ? out + total : total;", "out = total;",
        ("cuda/instances/backward_float64.cu",), ("many ghosts",), schedules=("plain",),
        device="58 KiB",
    ),
    Mutant(
        "tail of K not zeroed", PRODUCT, "const int k_end = ceil_div(p.c, P::kStep) * P::kStep;",
        "const int k_end = p.c;", STAGED, ("eval tf32",),
    ),
    Mutant(
        "pixels too many overwrite others", TILE, "PixelEntry{0, t.positions - 1}",
        "PixelEntry{0, t.positions / 2}", NHWC, EVAL,
    ),
    Mutant(
        "ReLU swallows NaN", "cuda/epilogue.cuh", "prim::pack_pair_relu<T>(v[2 * i], v[2 * i + 1])",
        "prim::pack_pair<T>(v[2 * i] > 0 ? v[2 * i] : 0, v[2 * i + 1])", NHWC, ("nan",), count=2,
    ),
    Mutant(
        "shared memory too small", "core/cuda_plan.cpp", "t.smem_bytes = int32_t(at);",
        "t.smem_bytes = int32_t(at / 2);", PLAN, EVAL,
    ),
    Mutant(
        "matrix not transposed", "cuda/gemm.cuh", "prim::ldmatrix_x4_trans(r, p);",
        "prim::ldmatrix_x4(r, p);", NCHW, ("eval nchw",), count=2,
    ),
    Mutant(
        "statistics without the spread of means", "cuda/stats.cuh",
        "m2 += squares[at] + d * (A(2) * sum[at] + n[s] * d)", "m2 += squares[at]", NCHW,
        ("statistics",), schedules=("plain",),
    ),
    Mutant(
        "statistics of unused pixels", "cuda/cheap_stats.cuh", "if (s >= count || r >= rows)",
        "if (r >= rows)", NCHW, ("statistics",), schedules=("plain",),
    ),
    Mutant(
        "statistics of an unused row", "cuda/cheap_stats.cuh", "if (s >= count || r >= rows)",
        "if (s >= count)", NCHW, ("statistics",), schedules=("plain",),
    ),
    Mutant(
        "sums about zero", "cuda/cheap_stats.cuh", "if (n == 0) {", "if (n < 0) {", NCHW,
        ("far statistics",), schedules=("plain",),
    ),
    Mutant(
        "sums of a product's rows past the last pixel", "cuda/primary_stats.cuh",
        "if (i >= count) acc[i / 2]", "if (i > count) acc[i / 2]", NCHW,
        ("statistics", "far statistics"), schedules=("plain",),
    ),
    Mutant(
        "odd last channel not masked", STORES, "if (c + 1 < from.count)", "", NCHW, ("eval nchw",)
    ),
    Mutant(
        "no barrier between dv and its use", "cuda/backward_grads.cuh",
        f"        {SYNC}\n        if (p.dw2_sums != nullptr)", "        if (p.dw2_sums != nullptr)",
        GRADS, TRAIN,
    ),
    Mutant(
        "gradients not waited for", "cuda/backward_grads.cuh",
        f"    prim::cp_async_wait<0>();\n    {SYNC}\n\n    int j = 0;",
        f"    {SYNC}\n\n    int j = 0;", GRADS, TRAIN,
    ),
    Mutant(
        "dw1 overwrites its operands", "cuda/backward_primary.cuh",
        f"    {SYNC}\n    copy_x<T>(", "    copy_x<T>(", PRIMARY, ("train many nchw",),
        device="tiny sm_86",
    ),
    Mutant(
        "weights not waited for", "cuda/backward_primary.cuh",
        f"        prim::cp_async_wait<0>();\n        {SYNC}\n        for (int k = 0; k < depth",
        f"        {SYNC}\n        for (int k = 0; k < depth", PRIMARY,
        ("train many nchw",),
    ),
    Mutant(
        "coefficients of dv without a barrier", "cuda/backward_grads.cuh",
        f"the mean has been used\n  {SYNC}", "the mean has been used",
        ("cuda/instances/backward_float64.cu",), ("many ghosts",), device="58 KiB",
    ),
    Mutant(
        "pixels past the image", CHEAP, "min_of(p.width - w, pixels)", "pixels", GRADS,
        TRAIN, schedules=("plain",),
    ),
    Mutant(
        "copies in one row", CHEAP, "      at.col -= box.cols;\n      ++at.row;",
        "      at.col -= box.cols;", GRADS, ("train many",), schedules=("plain",),
        device="tiny sm_86",
    ),
    Mutant(
        "tile not waited for", DU, f"    prim::cp_async_wait<0>();\n    {SYNC}", f"    {SYNC}",
        BOTH, TRAIN,
    ),
    Mutant(
        "tile read before others have copied theirs", DU,
        f"    prim::cp_async_wait<0>();\n    {SYNC}", "    prim::cp_async_wait<0>();", BOTH,
        ("train many",), device="tiny sm_86",
    ),
    Mutant(
        "next tile over the one at work", DU, "DuStage<T>(p, shared, stage ^ 1)",
        "DuStage<T>(p, shared, stage)", BOTH, ("train many",), device="tiny sm_86",
    ),
    Mutant(
        "the same stage for all tiles", DU, "stage ^= 1", "stage ^= 0", BOTH, ("train many",),
        schedules=("plain",), device="tiny sm_86",
    ),
    Mutant(
        "no barrier between du and its products", DU,
        f"    {SYNC}\n    if (p.dx != nullptr)", "    if (p.dx != nullptr)", BOTH,
        (*TRAIN, "train slices"),
    ),
    Mutant(
        "sums of dw1 over a tile in use", DU,
        f"    {SYNC}\n#pragma unroll\n    for (int i = 0; i < kCount",
        "#pragma unroll\n    for (int i = 0; i < kCount", BOTH, ("train many", *TRAIN),
    ),
    Mutant(
        "sums of dw1 read before they are there", DU, f"    {SYNC}\n    if (tid >= kGroup) return;",
        "    if (tid >= kGroup) return;", BOTH, TRAIN,
    ),
    Mutant(
        "dw1 of one group of warps", DU, "k < Grid::kWarpsK; ++k", "k < 1; ++k", BOTH, TRAIN,
        schedules=("plain",),
    ),
    Mutant(
        "dx of another lane", DU, "(t & bit) ? low : high", "(t & bit) ? high : low", BOTH, TRAIN,
        schedules=("plain",),
    ),
    Mutant(
        "w1 of another slice", DU, "copy_rows(static_cast<const T*>(p.w1) + c0,",
        "copy_rows(static_cast<const T*>(p.w1),", BOTH, ("train slices",), schedules=("plain",),
    ),
    Mutant(
        "rows past the last pixel not zeroed", DU, "for (; r < rows;", "for (; r < there;", BOTH,
        ("train many",), schedules=("plain",), device="tiny sm_86",
    ),
    Mutant(
        "padding of rows not cleared", DU, "i < p.plan.smem_bytes;", "i < 0;", BOTH, TRAIN,
        schedules=("plain",),
    ),
    Mutant(
        "padding cleared after the copies", DU,
        f"uint4{{0, 0, 0, 0}});\n  {SYNC}\n  copy_rows", "uint4{0, 0, 0, 0});\n  copy_rows", BOTH,
        (*TRAIN, "train many"),
    ),
    Mutant(
        "mean gradient left out", DU, "-(mean_grad + mean * hat) * scale", "-mean * hat * scale",
        BOTH, TRAIN, schedules=("plain",),
    ),
    Mutant(
        "u of other columns", DU, "w1 + col * Unit::kCols * s.x_ld", "w1", BOTH, ("train columns",),
        schedules=("plain",),
    ),
    Mutant(
        "sums without a barrier", "cuda/backward_sums.cuh",
        f"    prim::cp_async_wait<0>();\n    {SYNC}\n    const A* const norm",
        "    prim::cp_async_wait<0>();\n    const A* const norm", SUMS, ("train ratio",),
    ),
    Mutant(
        "partial sums without a barrier", "cuda/backward_common.cuh",
        f"    shared[tid] = sum;\n    {SYNC}", "    shared[tid] = sum;", GRADS, TRAIN,
    ),
    Mutant(
        "gate of another image", PRODUCT, "if (t.images > 1) image =", "if (t.images > 99) image =",
        NHWC, ("input gate",), schedules=("plain",), device="tiny sm_86",
    ),
    Mutant(
        "gate of other channels", PRODUCT, "t.in_gate_at) + first_k + k;", "t.in_gate_at) + k;",
        NHWC, ("input gate",), schedules=("plain",),
    ),
    Mutant(
        "gate applied before the copies are there", PRODUCT,
        "prim::cp_async_wait<kCudaStages - 2>();\n      if constexpr (kGated) {",
        "prim::cp_async_wait<kCudaStages - 1>();\n      if constexpr (kGated) {", STAGED,
        ("input gate staged",),
    ),
    Mutant(
        "gate of another image, staged", PRODUCT, "source[q0 + row].offset / plane;",
        "source[q0].offset / plane;", STAGED, ("input gate staged",), schedules=("plain",),
        device="tiny sm_86",
    ),
    Mutant(
        "gate of another image, planes", PRODUCT, "source[q0 + row + e].offset / (p.c * plane)",
        "source[q0 + row + e].offset / (p.c * plane + 1)", NCHW, ("input gate nchw",),
        schedules=("plain",), device="tiny sm_86",
    ),
    Mutant(
        "row of taps one off", DEPTHWISE, "const int row = h * kStride + i - kD / 2;",
        "const int row = h * kStride + i - kD / 2 + 1;", LAYERS, ("depthwise",),
        schedules=("plain",),
    ),
    Mutant(
        "columns before the first one", DEPTHWISE, "if (at >= 0 && at < width)",
        "if (at < width)", LAYERS, ("depthwise",), schedules=("plain",),
    ),
    Mutant(
        "pixels past the last column", DEPTHWISE, "if (w + s >= p.out_w) break;", "", LAYERS,
        ("depthwise",), schedules=("plain",),
    ),
    Mutant(
        "sums without a barrier before them", DEPTHWISE,
        f"  {SYNC}\n  if (!mine || place.slot != 0) return;",
        "  if (!mine || place.slot != 0) return;", LAYERS, ("depthwise", "depthwise pixels"),
    ),
    Mutant(
        "sums of one thread", DEPTHWISE, "s < p.plan.slots; ++s) total", "s < 1; ++s) total",
        LAYERS, ("depthwise",), schedules=("plain",),
    ),
    Mutant(
        "pixels of another row", DEPTHWISE, "max_of(-top, 0)", "max_of(-top, 1)", LAYERS,
        ("depthwise pixels",), schedules=("plain",),
    ),
    Mutant(
        "means without a barrier", GATE,
        f"      {SYNC}\n#pragma unroll 1\n      for (int k = int(threadIdx.x); k < lanes * kVec;",
        "#pragma unroll 1\n      for (int k = int(threadIdx.x); k < lanes * kVec;", LAYERS,
        ("gate",),
    ),
    Mutant(
        "hidden values without a barrier", GATE,
        f"  }}\n  {SYNC}\n  // In whole vectors", "  }\n  // In whole vectors", LAYERS,
        ("gate", "gate nchw", "gate in parts"),
    ),
    Mutant(
        "expansion without a barrier", GATE, f"  }});\n  {SYNC}\n", "  });\n", LAYERS,
        ("gate", "gate in parts"),
    ),
    Mutant(
        "rows of another part", GATE, "first = part * rows;", "first = 0;", LAYERS,
        ("gate in parts",), schedules=("plain",),
    ),
    Mutant(
        "stem's padding", "cuda/conv_stem.cuh", "column >= 0 && column < p.w", "column < p.w",
        LAYERS, ("stem",), schedules=("plain",),
    ),
    Mutant(
        "pooled images of a tile mixed up", APPLY, "y_position(t, tile, image, h, 0)",
        "y_position(t, tile, 0, h, 0)", NHWC, ("pooled",), schedules=("plain",),
        device="tiny sm_86",
    ),
    Mutant(
        "slopes' gradient on the other side", "cuda/epilogue.cuh", "x(i) > A(0) ? A(0) : g[i]",
        "x(i) < A(0) ? A(0) : g[i]", GRADS, ("train prelu",), schedules=("plain",),
    ),
    Mutant(
        "slopes' gradient where there is no pixel", "cuda/backward_grads.cuh",
        "if (exists >> (i / 2) & 1u) slopes[i & 1]", "slopes[i & 1]", GRADS, ("train prelu",),
        schedules=("plain",),
    ),
    Mutant(
        "slopes of another ghost", CHEAP,
        "p.slopes2, int64_t{me.first + c} * p.ghosts_per_map + j0 + j)",
        "p.slopes2, int64_t{me.first + c} * p.ghosts_per_map + j0)", SUMS, ("train prelu ratio",),
        schedules=("plain",),
    ),
    Mutant(
        "slopes in a row that is in use", "cuda/backward_grads.cuh",
        "kMean, norm2);  // the mean", "kScale, norm2);  // the mean", GRADS, ("train prelu",),
        schedules=("plain",),
    ),
    Mutant(
        "sums of slopes not cleared", "cuda/backward_grads.cuh",
        "store_pair(slope_sums, A(0), A(0));", "(void)slope_sums;", GRADS, ("train prelu",),
        schedules=("plain",),
    ),
    Mutant(
        "sums of slopes of one group of threads", "cuda/backward_grads.cuh",
        "total += first[k * me.channels];", "total += first[0];", GRADS, ("train prelu",),
        schedules=("plain",),
    ),
    Mutant(
        "given means taken for sums", "cuda/backward.cu",
        "c.values2 = args_.means2 != nullptr ? 1.0 :", "c.values2 = args_.means2 == this ? 1.0 :",
        ("cuda/backward.cu",), ("train in three",), schedules=("plain",),
    ),
    Mutant(
        "given means of the first norm taken for sums", "cuda/backward.cu",
        "q.values1 = args_.means1 != nullptr ? 1.0 :", "q.values1 = args_.means1 == this ? 1.0 :",
        ("cuda/backward.cu",), ("train in three",), schedules=("plain",),
    ),
    Mutant(
        "sums in the place of given means", "cuda/backward.cu",
        "c.sums2 = args_.means2 != nullptr ?", "c.sums2 = args_.means2 == this ?",
        ("cuda/backward.cu",), ("train in three",), schedules=("plain",),
    ),
    Mutant(
        "one norm's kind for both", "cuda/backward.cu", "q.batch_stats = args_.batch_stats1;",
        "q.batch_stats = args_.batch_stats2;", ("cuda/backward.cu",),
        ("frozen first nhwc", "frozen second nhwc"), schedules=("plain",),
    ),
    *PIPELINED_MUTANTS,
    Mutant(
        "half of a derivative", "cuda/epilogue.cuh", "* (A(1) - s))", ")", SUMS, TRAIN,
        schedules=("plain",),
    ),
]  # fmt: skip


def plant(mutant: Mutant) -> Path:
    """The library with the mistake."""
    folder = emulator.BUILD / "mutants" / mutant.name.replace(" ", "-")
    csrc = folder / "csrc"
    changed = csrc / mutant.file
    text = (emulator.CSRC / mutant.file).read_text()
    found = text.count(mutant.old)
    assert found == mutant.count, f"{mutant.file} has {found} times:\n{mutant.old}"
    shutil.copytree(
        emulator.CSRC, csrc, dirs_exist_ok=True, ignore=shutil.ignore_patterns(changed.name)
    )
    planted = text.replace(mutant.old, mutant.new)
    if not changed.exists() or changed.read_text() != planted:  # else already compiled
        changed.write_text(planted)
    name = folder.relative_to(emulator.BUILD).as_posix()
    return emulator.build_variant(name, mutant.compile, csrc)


def build_and_run(mutants: Sequence[Mutant], folder: Path) -> dict[str, dict[str, Any]]:
    """The results of the checks on each mistake and on the good library, by name."""
    good = emulator.or_skip(emulator.build_ops)
    # One compilation per mistake, two at a time.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(plant, mutants))
    jobs = [
        Job(m.name, str(path), m.cases, m.schedules, m.device, m.environment)
        for m, path in zip(mutants, libraries, strict=True)
    ]
    for device, pipeline in sorted({(m.device, m.pipeline) for m in mutants}):
        alike = [m for m in mutants if (m.device, m.pipeline) == (device, pipeline)]
        cases = sorted({case for m in alike for case in m.cases})
        name, schedules = f"good {device} {pipeline}", ["plain", "greedy-eager", "reversed"]
        jobs.append(Job(name, str(good), cases, schedules, device, alike[0].environment))
    return results_of(jobs, folder)


def verify(mutants: Sequence[Mutant], folder: Path) -> None:
    results = build_and_run(mutants, folder)
    unnoticed = [m.name for m in mutants if results[m.name]["status"] == 0]
    good = [job for name, job in results.items() if name.startswith("good ")]
    assert good
    assert all(job["status"] == 0 for job in good), [job["output"] for job in good]
    assert not unnoticed, "no check failed"


def test_planted_mistakes_are_found(tmp_path: Path) -> None:
    verify([mutant for mutant in MUTANTS if mutant.quick], tmp_path)


@pytest.mark.slow
def test_more_planted_mistakes_are_found(tmp_path: Path) -> None:
    verify([mutant for mutant in MUTANTS if not mutant.quick], tmp_path)
