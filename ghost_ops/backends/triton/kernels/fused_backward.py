"""Two launches of the backward in one: what the second reads stays with the program that made it.

As in ``fused``: a program owns one whole image and BM intrinsic channels with all their ghosts,
stores a map, waits at a block barrier, and reads it back with its neighbours from the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cheap_backward import walk_ghosts, walk_intrinsic_gradient, walk_sums
from .common import block_channels
from .fused import walk_intrinsic
from .partial import fold_matrix, fold_sums, store_matrix, store_sums


@triton.jit
def _own(BLOCKS: tl.constexpr, WIDE: tl.constexpr):
    """(channel block, group, image, first tile) of this program."""
    pid = tl.program_id(0)
    group = pid // BLOCKS
    image = group
    first = group * 0
    if WIDE:
        image = image.to(tl.int64)
        first = first.to(tl.int64)
    return pid % BLOCKS, group, image, first


@triton.jit
def fused_sums_kernel(
    x_ptr,  # [N, C, H, W]
    w1_ptr,  # [m, C], or None: x is u
    gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1, slope1,  # [m] each; two may be None
    w2_ptr,  # [g, D, D]
    gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2, slope2,  # [g] each; two may be None
    grad_ptr,  # [N, OUP, Ho, Wo]
    u_ptr,  # [N, m, Ho, Wo], written, or None
    y_ptr,  # [N, m, Ho, Wo], written
    part_ptr, counter_ptr,  # partial sums of dz, of dz * vhat and of a PReLU's slope gradient
    dbeta_ptr, dgamma_ptr, dslope_ptr,  # [g], written; the last may be None
    parts, in_pixels, in_width, out_pixels, height, width,
    C: tl.constexpr, M: tl.constexpr, G: tl.constexpr, OUP: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, S: tl.constexpr, ACT1: tl.constexpr, ACT2: tl.constexpr,
    NHWC: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """u and y anew, then dbeta2, dgamma2 and a PReLU's dslope2.

    Binding resource: memory bandwidth (x and grad_out in, u and y out).
    """
    block, group, image, first = _own(tl.cdiv(M, BM), WIDE)
    walk_intrinsic(
        x_ptr, w1_ptr, gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1, slope1, u_ptr, y_ptr,
        image, block, in_pixels, in_width, out_pixels, width,
        C, M, M, S, ACT1, NHWC, WIDE, PREC, BP, BM, BK, TILES,
    )  # fmt: skip
    tl.debug_barrier()
    for j in tl.static_range(R):
        c = block_channels(block * R + j, BM, WIDE)
        cm = c < G
        sum_dz, sum_dz_hat, sum_slope = walk_sums(
            y_ptr, w2_ptr, grad_ptr, gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2, slope2,
            image, first, out_pixels, c, cm, out_pixels, height, width,
            M, OUP, R, D, ACT2, NHWC, BP, BM, TILES,
        )  # fmt: skip
        store_sums(
            part_ptr, parts, group, sum_dz, sum_dz_hat, sum_slope, c, cm, G, FAN,
            dslope_ptr is not None,
        )  # fmt: skip
    fold_sums(
        part_ptr, counter_ptr, dbeta_ptr, dgamma_ptr, dslope_ptr, parts, group, block,
        G, BM, R, FAN, WIDE,
    )  # fmt: skip


@triton.jit
def fused_gradient_kernel(
    y_ptr, u_ptr,  # [N, m, Ho, Wo]
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUP, Ho, Wo]
    gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1, slope1,  # [m] each; two may be None
    gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2, slope2,  # [g] each; two may be None
    dbeta2_ptr, dgamma2_ptr, per_value,  # [g], of the sums kernel; None without BATCH
    dv_ptr,  # [N, g, Ho, Wo], written
    da_ptr,  # [N, m, Ho, Wo], written, or None
    sums_ptr, sums_counter_ptr,  # partial sums of da, of da * uhat and of a PReLU's slope gradient
    dbeta1_ptr, dgamma1_ptr, dslope1_ptr,  # [m], written; None: not wanted, the last alone or all
    taps_ptr, taps_counter_ptr,  # partial sums of dw2, or None
    dw2_ptr,  # [g, D, D], written, or None
    parts, out_pixels, height, width,
    M: tl.constexpr, G: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    TAPS: tl.constexpr, ACT1: tl.constexpr, ACT2: tl.constexpr, BATCH: tl.constexpr,
    NHWC: tl.constexpr, WIDE: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """dv and dw2, then da, dbeta1, dgamma1 and a PReLU's dslope1.

    Binding resource: memory bandwidth (y, u and grad_out in, dv and da out); for D >= 5 loads from
    the L1 cache.
    """
    block, group, image, first = _own(tl.cdiv(M, BM), WIDE)
    tap = tl.arange(0, TAPS)
    for j in tl.static_range(R):
        c = block_channels(block * R + j, BM, WIDE)
        cm = c < G
        dw2 = walk_ghosts(
            y_ptr, w2_ptr, grad_ptr, gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2, slope2,
            dbeta2_ptr, dgamma2_ptr, dv_ptr, per_value,
            image, first, out_pixels, c, cm, tap, out_pixels, height, width,
            M, G, OUP, R, D, TAPS, ACT2, BATCH, dw2_ptr is not None, NHWC, BP, BM, TILES,
        )  # fmt: skip
        if dw2_ptr is not None:
            at = c[None, :] * (D * D) + tap[:, None]
            mask = (tap < D * D)[:, None] & cm[None, :]
            store_matrix(taps_ptr, group, dw2, at, mask, G * D * D)
            fold_matrix(
                taps_ptr, taps_counter_ptr, dw2_ptr, parts, group, block * R + j, at, mask,
                G * D * D, FAN,
            )  # fmt: skip
    tl.debug_barrier()
    c = block_channels(block, BM, WIDE)
    cm = c < M
    sum_da, sum_da_hat, sum_slope = walk_intrinsic_gradient(
        dv_ptr, w2_ptr, grad_ptr, u_ptr, gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1, slope1,
        da_ptr, image, first, out_pixels, c, cm, out_pixels, height, width,
        M, OUP, R, D, ACT1, NHWC, BP, BM, TILES,
    )  # fmt: skip
    if sums_ptr is not None:
        store_sums(
            sums_ptr, parts, group, sum_da, sum_da_hat, sum_slope, c, cm, M, FAN,
            dslope1_ptr is not None,
        )  # fmt: skip
        fold_sums(
            sums_ptr, sums_counter_ptr, dbeta1_ptr, dgamma1_ptr, dslope1_ptr, parts, group, block,
            M, BM, 1, FAN, WIDE,
        )  # fmt: skip
