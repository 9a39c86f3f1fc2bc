"""The cheap operation, norm and activation: v = w2 (*) y, z = act2(bn2(v)), statistics of v."""

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
    norm,  # [g]
    out_ptr,  # [N, OUT_CH, Ho, Wo], channels m .. OUT_CH written, or None
    epilogue,
    part,  # partial moments of v, or None
    moments,  # (mean, var) of v, [g] each, written, or None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """v, its moments, and z = act2(bn2(v)) * gate + residual next to y in out.

    A result without a pointer is left out. y_ptr may be out_ptr: the channels that are read and
    written are different.
    Tile map: a program owns CHANNELS ghost channels and TILES tiles of PIXELS consecutive pixels.
    Consecutive tiles share rows of y in the L1 cache.
    Binding resource: memory bandwidth (y in once, z out); for D >= 5 the loads from the L1 cache,
    D * D per value.
    """
    M: tl.constexpr = shape.M
    G: tl.constexpr = shape.G
    BLOCKS: tl.constexpr = (G + tile.CHANNELS - 1) // tile.CHANNELS
    block, group, image, first = locate(tl.program_id(0), size, BLOCKS, tile, shape.WIDE)
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    cm = c < G
    count = 0.0
    mean = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    m2 = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    scale, shift = scale_shift(norm, c, cm)
    slope = slopes(norm.slope, c, cm, shape.ACT2)
    for t in range(tile.TILES):
        p = (first + t) * tile.PIXELS + tl.arange(0, tile.PIXELS)
        pm = p < size.pixels
        v = depthwise_tile(y_ptr, w2_ptr, image, p, pm, c, cm, size, shape, tile)
        if part.data is not None:
            count, mean, m2 = add_moments(count, mean, m2, v, pm)
        if out_ptr is not None:
            z = activate(v * scale[None, :] + shift[None, :], slope, shape.ACT2)
            at = address(image, p, c + M, size.out_pixels, shape.OUT_CH, shape.NHWC)
            mask = pm[:, None] & (c + M < shape.OUT_CH)[None, :]
            z = finish(z, epilogue, image, p, c + M, at, mask, size, shape)
            store(out_ptr, at, z, mask)
    if part.data is not None:
        store_moments(part, group, block, count, mean, m2, c, cm, G, tile.FAN)
        fold_moments(part, moments, group, block, G, 1, tile, shape.WIDE)
