"""The primary convolution, norm and activation: u = w1 * x, y = act1(bn1(u)), statistics of u."""

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
    norm,  # [m]
    u_ptr,  # [N, m, Ho, Wo], written, or None
    y_ptr,  # [N, Y_CH, Ho, Wo], its first m channels written, or None
    out_ptr,  # [N, OUT_CH, Ho, Wo], y * gate + residual written to the first m channels, or None
    epilogue,
    part,  # partial moments of u, or None
    moments,  # (mean, var) of u, [m] each, written, or None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """u = x @ w1^T, the moments of u, y = act1(bn1(u)), out = y * gate + residual.

    A result whose pointer is None is not computed.

    Tile map: a program owns CHANNELS intrinsic channels and TILES tiles of PIXELS consecutive
    output pixels; the matrix product runs over C in steps of DEPTH. Grid: groups of tiles x channel
    blocks, blocks fastest, so that the programs that read the same x run side by side.
    Binding resource: memory bandwidth (x in, u or y out); the product if C and m are large.
    """
    M: tl.constexpr = shape.M
    BLOCKS: tl.constexpr = (M + tile.CHANNELS - 1) // tile.CHANNELS
    block, group, image, first = locate(tl.program_id(0), size, BLOCKS, tile, shape.WIDE)
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    cm = c < M
    count = 0.0
    mean = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    m2 = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    scale, shift = scale_shift(norm, c, cm)
    slope = slopes(norm.slope, c, cm, shape.ACT1)
    for t in range(tile.TILES):
        p = (first + t) * tile.PIXELS + tl.arange(0, tile.PIXELS)
        pm = p < size.pixels
        mask = pm[:, None] & cm[None, :]
        u = primary_tile(x_ptr, w1_ptr, image, p, pm, c, cm, size, shape, tile)
        if part.data is not None:
            count, mean, m2 = add_moments(count, mean, m2, u, pm)
        if u_ptr is not None:
            at = address(image, p, c, size.out_pixels, M, shape.NHWC)
            store(u_ptr, at, u, mask)
        if y_ptr is not None or out_ptr is not None:
            y = activate(u * scale[None, :] + shift[None, :], slope, shape.ACT1)
            if y_ptr is not None:
                at = address(image, p, c, size.out_pixels, shape.Y_CH, shape.NHWC)
                store(y_ptr, at, y, mask)
            if out_ptr is not None:
                at = address(image, p, c, size.out_pixels, shape.OUT_CH, shape.NHWC)
                y = finish(y, epilogue, image, p, c, at, mask, size, shape)
                store(out_ptr, at, y, mask)
    if part.data is not None:
        store_moments(part, group, block, count, mean, m2, c, cm, M, tile.FAN)
        fold_moments(part, moments, group, block, M, 1, tile, shape.WIDE)
