"""The primary convolution with what follows it: u = w1 * x, y = act1(bn1(u)), statistics of u."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    add_moments,
    address,
    block_channels,
    finish,
    locate,
    primary_tile,
    scale_shift,
    slopes,
    store,
)
from .partial import fold_moments, store_moments


@triton.jit
def primary_kernel(
    x_ptr,  # [N, C, H, W]
    w1_ptr,  # [m, C], or None: x is u
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [m] each, or None; slope: see slopes
    u_ptr,  # [N, m, Ho, Wo], written, or None
    y_ptr,  # [N, Y_CH, Ho, Wo], its first m channels written, or None
    out_ptr,  # [N, OUP, Ho, Wo], y * gate + residual written to the first m channels, or None
    gate_ptr, gate_height, gate_width, row_scale, column_scale, residual_ptr,  # see finish
    part_ptr, counter_ptr,  # partial moments of u, or None
    mean_out_ptr, var_out_ptr,  # [m], moments of u, written, or None
    parts, pixels, in_pixels, in_width, out_pixels, out_width,
    C: tl.constexpr, M: tl.constexpr, Y_CH: tl.constexpr, OUP: tl.constexpr, S: tl.constexpr,
    ACT: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    FAN: tl.constexpr,
):  # fmt: skip
    """u = x @ w1^T, and of it whatever pointers are given for.

    Tile map: a program owns BM intrinsic channels and TILES tiles of BP consecutive output pixels;
    the matrix product runs over C in steps of BK. Grid: groups of tiles x channel blocks, blocks
    fastest, so that the programs that read the same x run side by side.
    Binding resource: memory bandwidth (x in, u or y out); the product where C and m are large.
    """
    block, group, image, first = locate(tl.program_id(0), pixels, tl.cdiv(M, BM), BP, TILES, WIDE)
    c = block_channels(block, BM, WIDE)
    cm = c < M
    count = 0.0
    mean = tl.zeros((BM,), tl.float32)
    m2 = tl.zeros((BM,), tl.float32)
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    slope = slopes(slope, c, cm, ACT)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        mask = pm[:, None] & cm[None, :]
        u = primary_tile(
            x_ptr, w1_ptr, image, p, pm, c, cm, in_pixels, in_width, out_pixels, out_width,
            C, S, NHWC, WIDE, PREC, BP, BM, BK,
        )  # fmt: skip
        if part_ptr is not None:
            count, mean, m2 = add_moments(count, mean, m2, u, pm)
        if u_ptr is not None:
            at = address(image, p, c, out_pixels, M, NHWC)
            store(u_ptr, at, u, mask)
        if y_ptr is not None or out_ptr is not None:
            y = activate(u * scale[None, :] + shift[None, :], slope, ACT)
            if y_ptr is not None:
                store(y_ptr, address(image, p, c, out_pixels, Y_CH, NHWC), y, mask)
            if out_ptr is not None:
                at = address(image, p, c, out_pixels, OUP, NHWC)
                y = finish(
                    y, gate_ptr, gate_height, gate_width, row_scale, column_scale, residual_ptr,
                    image, p, c, at, mask, out_pixels, out_width, OUP, NHWC,
                )  # fmt: skip
                store(out_ptr, at, y, mask)
    if part_ptr is not None:
        store_moments(part_ptr, parts, group, block, count, mean, m2, c, cm, M, FAN)
        fold_moments(
            part_ptr, counter_ptr, mean_out_ptr, var_out_ptr, parts, group, block,
            M, BM, 1, FAN, WIDE,
        )  # fmt: skip
