"""The whole module in one pass: y stays with the program that made it."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    add_moments,
    address,
    block_channels,
    depthwise_tile,
    primary_tile,
    scale_shift,
    slopes,
    store,
)
from .partial import fold_moments, store_moments


@triton.jit
def walk_intrinsic(
    x_ptr, w1_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope, u_ptr, y_ptr,
    image, block, in_pixels, in_width, out_pixels, width,
    C: tl.constexpr, M: tl.constexpr, Y_CH: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    NHWC: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store y, and u if its pointer is given, of one image and one block of channels."""
    c = block_channels(block, BM, WIDE)
    cm = c < M
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    slope = slopes(slope, c, cm, ACT)
    for t in range(TILES):
        p = t * BP + tl.arange(0, BP)
        if WIDE:
            p = p.to(tl.int64)
        pm = p < out_pixels
        mask = pm[:, None] & cm[None, :]
        u = primary_tile(
            x_ptr, w1_ptr, image, p, pm, c, cm, in_pixels, in_width, out_pixels, width,
            C, S, NHWC, WIDE, PREC, BP, BM, BK,
        )  # fmt: skip
        if u_ptr is not None:
            store(u_ptr, address(image, p, c, out_pixels, M, NHWC), u, mask)
        y = activate(u * scale[None, :] + shift[None, :], slope, ACT)
        store(y_ptr, address(image, p, c, out_pixels, Y_CH, NHWC), y, mask)


@triton.jit
def fused_kernel(
    x_ptr,  # [N, C, H, W]
    w1_ptr,  # [m, C], or None: x is u
    gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1, slope1,  # [m] each, or None; see slopes
    w2_ptr,  # [g, D, D]
    gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2, slope2,  # [g] each, or None; as above
    y_ptr,  # [N, Y_CH, Ho, Wo], its first m channels written
    out_ptr,  # [N, OUP, Ho, Wo], channels m .. OUP written, or None
    part_ptr, counter_ptr,  # partial moments of v, or None
    mean_out_ptr, var_out_ptr,  # [g], moments of v, written, or None
    parts, in_pixels, in_width, out_pixels, height, width,
    C: tl.constexpr, M: tl.constexpr, G: tl.constexpr, Y_CH: tl.constexpr, OUP: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr, S: tl.constexpr, ACT1: tl.constexpr, ACT2: tl.constexpr,
    NHWC: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """y = act1(bn1(w1 * x)), then z = act2(bn2(w2 (*) y)) or the moments of v.

    Tile map: a program owns one whole image and BM intrinsic channels with all their ghosts, so
    that no halo is computed twice and nobody else writes what it reads. It walks over the image's
    TILES tiles of BP pixels twice: the first walk stores y, and after a block barrier the second
    reads it back with its neighbours, from the L1 and L2 caches.
    Binding resource: memory bandwidth (x in, out out), given enough images to fill the device.
    """
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (M + BM - 1) // BM
    block = pid % BLOCKS
    group = pid // BLOCKS
    image = group
    if WIDE:
        image = group.to(tl.int64)
    walk_intrinsic(
        x_ptr, w1_ptr, gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, eps1, slope1, None, y_ptr,
        image, block, in_pixels, in_width, out_pixels, width,
        C, M, Y_CH, S, ACT1, NHWC, WIDE, PREC, BP, BM, BK, TILES,
    )  # fmt: skip

    tl.debug_barrier()

    # The block's BM * R ghost channels, BM at a time.
    for j in tl.static_range(R):
        column = block * R + j
        ghost = block_channels(column, BM, WIDE)
        gm = ghost < G
        count = 0.0
        mean = tl.zeros((BM,), tl.float32)
        m2 = tl.zeros((BM,), tl.float32)
        scale, shift = scale_shift(ghost, gm, gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, eps2)
        slope = slopes(slope2, ghost, gm, ACT2)
        for t in range(TILES):
            p = t * BP + tl.arange(0, BP)
            if WIDE:
                p = p.to(tl.int64)
            pm = p < out_pixels
            v = depthwise_tile(
                y_ptr, w2_ptr, image, p, pm, ghost, gm, out_pixels, height, width,
                Y_CH, R, D, NHWC, BP, BM,
            )  # fmt: skip
            if part_ptr is not None:
                count, mean, m2 = add_moments(count, mean, m2, v, pm)
            if out_ptr is not None:
                z = activate(v * scale[None, :] + shift[None, :], slope, ACT2)
                at = address(image, p, ghost + M, out_pixels, OUP, NHWC)
                mask = pm[:, None] & (ghost + M < OUP)[None, :]
                store(out_ptr, at, z, mask)
        if part_ptr is not None:
            store_moments(part_ptr, parts, group, column, count, mean, m2, ghost, gm, G, FAN)
    if part_ptr is not None:
        fold_moments(
            part_ptr, counter_ptr, mean_out_ptr, var_out_ptr, parts, group, block,
            G, BM, R, FAN, WIDE,
        )  # fmt: skip
