"""The whole module in one launch: a program reads back the part of y that it has stored."""

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
    x_ptr,
    w1_ptr,
    norm,
    u_ptr,
    y_ptr,
    image,
    block,
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """Store y, and u if its pointer is given, of one image and one block of channels."""
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    cm = c < shape.M
    scale, shift = scale_shift(norm, c, cm)
    slope = slopes(norm.slope, c, cm, shape.ACT1)
    for t in range(tile.TILES):
        p = t * tile.PIXELS + tl.arange(0, tile.PIXELS)
        if shape.WIDE:
            p = p.to(tl.int64)
        pm = p < size.out_pixels
        mask = pm[:, None] & cm[None, :]
        u = primary_tile(x_ptr, w1_ptr, image, p, pm, c, cm, size, shape, tile)
        if u_ptr is not None:
            store(u_ptr, address(image, p, c, size.out_pixels, shape.M, shape.NHWC), u, mask)
        y = activate(u * scale[None, :] + shift[None, :], slope, shape.ACT1)
        store(y_ptr, address(image, p, c, size.out_pixels, shape.Y_CH, shape.NHWC), y, mask)


@triton.jit
def fused_kernel(
    x_ptr,  # [N, C, H, W]
    w1_ptr,  # [m, C], or None: x is u
    norm1,  # [m]
    w2_ptr,  # [g, D, D]
    norm2,  # [g]
    y_ptr,  # [N, Y_CH, Ho, Wo], its first m channels written
    out_ptr,  # [N, OUT_CH, Ho, Wo], channels m .. OUT_CH written, or None
    part,  # partial moments of v, or None
    moments,  # (mean, var) of v, [g] each, written, or None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """y = act1(bn1(w1 * x)), then z = act2(bn2(w2 (*) y)) or the moments of v.

    Tile map: a program owns one whole image and CHANNELS intrinsic channels with all their ghosts,
    so that no halo is computed twice and no other program writes what it reads. It walks over the
    image's TILES tiles of PIXELS pixels twice: the first walk stores y, and after a block barrier
    the second reads it back with its neighbours, from the L1 and L2 caches.
    Binding resource: memory bandwidth (x in, out out), given enough images to fill the device.
    """
    G: tl.constexpr = shape.G
    M: tl.constexpr = shape.M
    pid = tl.program_id(0)
    BLOCKS: tl.constexpr = (M + tile.CHANNELS - 1) // tile.CHANNELS
    block = pid % BLOCKS
    group = pid // BLOCKS
    image = group
    if shape.WIDE:
        image = group.to(tl.int64)
    walk_intrinsic(x_ptr, w1_ptr, norm1, None, y_ptr, image, block, size, shape, tile)

    tl.debug_barrier()

    # The ghost channels of the block, CHANNELS at a time.
    GHOSTS_PER_MAP: tl.constexpr = shape.GHOSTS_PER_MAP
    for j in tl.static_range(GHOSTS_PER_MAP):
        column = block * shape.GHOSTS_PER_MAP + j
        ghost = block_channels(column, tile.CHANNELS, shape.WIDE)
        gm = ghost < G
        count = 0.0
        mean = tl.full((tile.CHANNELS,), 0.0, tl.float32)
        m2 = tl.full((tile.CHANNELS,), 0.0, tl.float32)
        scale, shift = scale_shift(norm2, ghost, gm)
        slope = slopes(norm2.slope, ghost, gm, shape.ACT2)
        for t in range(tile.TILES):
            p = t * tile.PIXELS + tl.arange(0, tile.PIXELS)
            if shape.WIDE:
                p = p.to(tl.int64)
            pm = p < size.out_pixels
            v = depthwise_tile(y_ptr, w2_ptr, image, p, pm, ghost, gm, size, shape, tile)
            if part.data is not None:
                count, mean, m2 = add_moments(count, mean, m2, v, pm)
            if out_ptr is not None:
                z = activate(v * scale[None, :] + shift[None, :], slope, shape.ACT2)
                at = address(image, p, ghost + M, size.out_pixels, shape.OUT_CH, shape.NHWC)
                mask = pm[:, None] & (ghost + M < shape.OUT_CH)[None, :]
                store(out_ptr, at, z, mask)
        if part.data is not None:
            store_moments(part, group, column, count, mean, m2, ghost, gm, G, tile.FAN)
    if part.data is not None:
        fold_moments(part, moments, group, block, G, shape.GHOSTS_PER_MAP, tile, shape.WIDE)
