"""Two launches of the backward joined: a program reads back the map that it has stored.

As in ``fused``, a program owns one whole image and CHANNELS intrinsic channels with all their
ghosts. It stores a map, waits at a block barrier, and reads the map back from the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cheap_backward import fold_taps, walk_ghosts, walk_intrinsic_gradient, walk_sums
from .common import block_channels
from .fused import walk_intrinsic
from .partial import fold_sums, store_sums


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
    norm1,  # [m]
    w2_ptr,  # [g, D, D]
    norm2,  # [g]
    grad_ptr,  # [N, OUT_CH, Ho, Wo]
    u_ptr,  # [N, m, Ho, Wo], written, or None
    y_ptr,  # [N, m, Ho, Wo], written
    part,  # partial sums of dz, of dz * vhat and of a PReLU's slope gradient
    sums,  # [g], written; slope may be None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """u and y recomputed, then dbeta2, dgamma2 and a PReLU's dslope2.

    Binding resource: memory bandwidth (x and grad_out in, u and y out).
    """
    G: tl.constexpr = shape.G
    PER_MAP: tl.constexpr = shape.GHOSTS_PER_MAP
    block, group, image, first = _own(tl.cdiv(shape.M, tile.CHANNELS), shape.WIDE)
    walk_intrinsic(x_ptr, w1_ptr, norm1, u_ptr, y_ptr, image, block, size, shape, tile)
    tl.debug_barrier()
    for j in tl.static_range(PER_MAP):
        c = block_channels(block * PER_MAP + j, tile.CHANNELS, shape.WIDE)
        cm = c < G
        values = walk_sums(y_ptr, w2_ptr, grad_ptr, norm2, image, first, (c, cm), size, shape, tile)
        store_sums(part, group, values, c, cm, G, tile.FAN, sums.slope is not None)
    fold_sums(part, sums, group, block, G, PER_MAP, tile, shape.WIDE)


@triton.jit
def fused_gradient_kernel(
    y_ptr,  # [N, m, Ho, Wo]
    u_ptr,  # [N, m, Ho, Wo]
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUT_CH, Ho, Wo]
    norm1,  # [m]
    norm2,  # [g]
    sums2,  # [g], of the sums kernel; None without BATCH
    dv_ptr,  # [N, g, Ho, Wo], written
    da_ptr,  # [N, m, Ho, Wo], written, or None
    part1,  # partial sums of da, of da * uhat and of a PReLU's slope gradient, or None
    sums1,  # [m], written; slope, or all, may be None
    taps,  # partial sums of dw2, or None
    dw2_ptr,  # [g, D, D], written, or None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """dv and dw2, then da, dbeta1, dgamma1 and a PReLU's dslope1.

    Binding resource: memory bandwidth (y, u and grad_out in, dv and da out); for D >= 5 loads from
    the L1 cache.
    """
    M: tl.constexpr = shape.M
    PER_MAP: tl.constexpr = shape.GHOSTS_PER_MAP
    block, group, image, first = _own(tl.cdiv(M, tile.CHANNELS), shape.WIDE)
    for j in tl.static_range(PER_MAP):
        column = block * PER_MAP + j
        c = block_channels(column, tile.CHANNELS, shape.WIDE)
        ghosts = c, c < shape.G
        dw2 = walk_ghosts(
            y_ptr, w2_ptr, grad_ptr, norm2, sums2, dv_ptr, image, first, ghosts, size, shape, tile
        )
        if shape.WEIGHTS:
            fold_taps(taps, dw2_ptr, dw2, group, column, ghosts, shape, tile.FAN)
    tl.debug_barrier()
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    cm = c < M
    values = walk_intrinsic_gradient(
        dv_ptr, w2_ptr, grad_ptr, u_ptr, norm1, da_ptr, image, first, (c, cm), size, shape, tile
    )
    if part1.data is not None:
        store_sums(part1, group, values, c, cm, M, tile.FAN, sums1.slope is not None)
        fold_sums(part1, sums1, group, block, M, 1, tile, shape.WIDE)
