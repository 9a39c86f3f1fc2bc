"""The cheap operation with what follows it: v = w2 (*) y, z = act2(bn2(v)), statistics of v."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    add_moments,
    address,
    block_channels,
    depthwise_tile,
    finish,
    locate,
    scale_shift,
    slopes,
    store,
)
from .partial import fold_moments, store_moments


@triton.jit
def cheap_kernel(
    y_ptr,  # [N, Y_CH, Ho, Wo], its first m channels read
    w2_ptr,  # [g, D, D]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [g] each, or None; slope: see slopes
    out_ptr,  # [N, OUP, Ho, Wo], channels m .. OUP written, or None
    gate_ptr, gate_height, gate_width, row_scale, column_scale, residual_ptr,  # see finish
    part_ptr, counter_ptr,  # partial moments of v, or None
    mean_out_ptr, var_out_ptr,  # [g], moments of v, written, or None
    parts, pixels, out_pixels, height, width,
    M: tl.constexpr, G: tl.constexpr, Y_CH: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, ACT: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr, TILES: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """v, its moments, z = act2(bn2(v)) * gate + residual next to y in out: whatever has a pointer.

    y_ptr may be out_ptr: what is read and what is written are different channels.
    Tile map: a program owns BG ghost channels and TILES tiles of BP consecutive pixels. Consecutive
    tiles share the rows of y between them, in the L1 cache.
    Binding resource: memory bandwidth (y in once, z out); for D >= 5 the D * D loads a value from
    the L1 cache.
    """
    block, group, image, first = locate(tl.program_id(0), pixels, tl.cdiv(G, BG), BP, TILES, WIDE)
    c = block_channels(block, BG, WIDE)
    cm = c < G
    count = 0.0
    mean = tl.zeros((BG,), tl.float32)
    m2 = tl.zeros((BG,), tl.float32)
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    slope = slopes(slope, c, cm, ACT)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        v = depthwise_tile(
            y_ptr, w2_ptr, image, p, pm, c, cm, out_pixels, height, width, Y_CH, R, D, NHWC, BP, BG
        )
        if part_ptr is not None:
            count, mean, m2 = add_moments(count, mean, m2, v, pm)
        if out_ptr is not None:
            z = activate(v * scale[None, :] + shift[None, :], slope, ACT)
            at = address(image, p, c + M, out_pixels, OUP, NHWC)
            mask = pm[:, None] & (c + M < OUP)[None, :]
            z = finish(
                z, gate_ptr, gate_height, gate_width, row_scale, column_scale, residual_ptr,
                image, p, c + M, at, mask, out_pixels, width, OUP, NHWC,
            )  # fmt: skip
            store(out_ptr, at, z, mask)
    if part_ptr is not None:
        store_moments(part_ptr, parts, group, block, count, mean, m2, c, cm, G, FAN)
        fold_moments(
            part_ptr, counter_ptr, mean_out_ptr, var_out_ptr, parts, group, block,
            G, BG, 1, FAN, WIDE,
        )  # fmt: skip
