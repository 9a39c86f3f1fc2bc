"""Backward through the cheap operation: from grad_out to the gradient at batch norm 1's output.

With b = bn2(v), a = bn1(u) and sums over all pixels::

    dz = act2'(b) * grad_out[:, m:]     dbeta2 = sum dz    dgamma2 = sum dz * vhat
    dv = bn2'(dz)                       dw2 = dv correlated with y
    dy = grad_out[:, :m] + dv convolved with w2 turned by 180 degrees
    da = act1'(a) * dy                  dbeta1 = sum da    dgamma1 = sum da * uhat

and for a PReLU the slopes' gradients, sum grad_out[:, m:] * min(b, 0) and sum dy * min(a, 0).
Each pass recomputes v from y: reading y from the caches is faster than reading v from memory.

A walk is the loop of one program over its tiles; ``fused_backward`` joins walks in pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate_gradient,
    address,
    block_channels,
    depthwise_tile,
    inverse_deviation,
    locate,
    norm_gradient,
    per_channel,
    scale_shift,
    slope_gradient,
    slopes,
    store,
)
from .partial import fold_matrix, fold_sums, store_matrix, store_sums


@triton.jit
def _ghost_gradient(
    y_ptr,
    w2_ptr,
    grad_ptr,
    image,
    p,
    pm,
    channels,
    statistics,
    slope,
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """(dz, vhat, a PReLU's slope gradient) [P, G]. statistics: see _statistics."""
    c, cm = channels
    scale, shift, mean, inverse = statistics
    v = depthwise_tile(y_ptr, w2_ptr, image, p, pm, c, cm, size, shape, tile)
    at = address(image, p, c + shape.M, size.out_pixels, shape.OUT_CH, shape.NHWC)
    mask = pm[:, None] & (c + shape.M < shape.OUT_CH)[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = v * scale[None, :] + shift[None, :]
    of_slope = grad
    if shape.ACT2 == 8:
        of_slope = slope_gradient(b, grad)
    dz = activate_gradient(b, grad, slope, shape.ACT2)
    return dz, (v - mean[None, :]) * inverse[None, :], of_slope


@triton.jit
def _statistics(norm, c, cm):
    """(scale, shift, mean, 1 / deviation) of a batch norm, for channels c."""
    scale, shift = scale_shift(norm, c, cm)
    return scale, shift, per_channel(norm.mean, c, cm), inverse_deviation(norm, c, cm)


# ---------------------------------------------------------------- walks


@triton.jit
def walk_sums(
    y_ptr,
    w2_ptr,
    grad_ptr,
    norm,
    image,
    first,
    channels,
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """Sums over TILES tiles, of ghost channels: dz, dz * vhat, a PReLU's slope gradient."""
    c, cm = channels
    statistics = _statistics(norm, c, cm)
    slope = slopes(norm.slope, c, cm, shape.ACT2)
    sum_dz = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    sum_dz_hat = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    sum_slope = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    for t in range(tile.TILES):
        p = (first + t) * tile.PIXELS + tl.arange(0, tile.PIXELS)
        pm = p < size.pixels
        dz, hat, of_slope = _ghost_gradient(
            y_ptr, w2_ptr, grad_ptr, image, p, pm, channels, statistics, slope, size, shape, tile
        )
        sum_dz += tl.sum(dz, 0)
        sum_dz_hat += tl.sum(dz * hat, 0)
        if shape.ACT2 == 8:
            sum_slope += tl.sum(of_slope, 0)
    return sum_dz, sum_dz_hat, sum_slope


@triton.jit
def walk_ghosts(
    y_ptr,
    w2_ptr,
    grad_ptr,
    norm,
    sums,
    dv_ptr,
    image,
    first,
    channels,
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """Store dv of TILES tiles, of ghost channels, if its pointer is given.

    Returns the tiles' part of dw2 [TAPS, G]; zeros without WEIGHTS.
    """
    D: tl.constexpr = shape.D
    c, cm = channels
    tap = tl.arange(0, shape.TAPS)
    statistics = _statistics(norm, c, cm)
    scale = statistics[0]
    slope = slopes(norm.slope, c, cm, shape.ACT2)
    sum_dz = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    sum_dz_hat = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    if shape.BATCH:
        sum_dz = per_channel(sums.beta, c, cm)
        sum_dz_hat = per_channel(sums.gamma, c, cm)
    Y_STEP: tl.constexpr = shape.M if shape.NHWC else 1
    width = size.width
    dw2 = tl.full((shape.TAPS, tile.CHANNELS), 0.0, tl.float32)
    for t in range(tile.TILES):
        p = (first + t) * tile.PIXELS + tl.arange(0, tile.PIXELS)
        pm = p < size.pixels
        dz, hat, _ = _ghost_gradient(
            y_ptr, w2_ptr, grad_ptr, image, p, pm, channels, statistics, slope, size, shape, tile
        )
        of_batch = sum_dz[None, :], sum_dz_hat[None, :], sums.per_value
        dv = norm_gradient(dz, hat, scale[None, :], of_batch, shape.BATCH)
        dv = tl.where(pm[:, None], dv, 0.0)
        if dv_ptr is not None:
            at = address(image, p, c, size.out_pixels, shape.G, shape.NHWC)
            store(dv_ptr, at, dv, pm[:, None] & cm[None, :])
        if shape.WEIGHTS:
            inner = p % size.out_pixels
            row = inner // width
            column = inner % width
            source = c // shape.GHOSTS_PER_MAP
            centre = y_ptr + address(image, p, source, size.out_pixels, shape.M, shape.NHWC)
            for i in range(D):
                down = i - D // 2
                in_rows = (row + down >= 0) & (row + down < size.height) & pm
                for j in tl.static_range(D):
                    right = j - D // 2
                    inside = in_rows & (column + right >= 0) & (column + right < width)
                    mask = inside[:, None] & cm[None, :]
                    y = tl.load(centre + (down * width + right) * Y_STEP, mask=mask, other=0.0)
                    total = tl.sum(dv * y.to(tl.float32), 0)
                    dw2 += tl.where((tap == i * D + j)[:, None], total[None, :], 0.0)
    return dw2


@triton.jit
def fold_taps(part, dw2_ptr, dw2, group, block, channels, shape: tl.constexpr, FAN: tl.constexpr):
    """Store a program's part of dw2 [TAPS, G], and fold the parts of all programs into dw2_ptr."""
    c, cm = channels
    tap = tl.arange(0, shape.TAPS)
    TAPS_OF_ONE: tl.constexpr = shape.D * shape.D
    SIZE: tl.constexpr = shape.G * TAPS_OF_ONE
    at = c[None, :] * TAPS_OF_ONE + tap[:, None]
    mask = (tap < TAPS_OF_ONE)[:, None] & cm[None, :]
    store_matrix(part, group, dw2, at, mask, SIZE)
    fold_matrix(part, dw2_ptr, group, block, at, mask, SIZE, FAN)


@triton.jit
def walk_intrinsic_gradient(
    dv_ptr,
    w2_ptr,
    grad_ptr,
    u_ptr,
    norm,
    da_ptr,
    image,
    first,
    channels,
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """Store da of TILES tiles, of intrinsic channels, if its pointer is given.

    Returns the sums of da, of da * uhat and of a PReLU's slope gradient.
    """
    c, cm = channels
    D: tl.constexpr = shape.D
    PER_MAP: tl.constexpr = shape.GHOSTS_PER_MAP
    DV_CH: tl.constexpr = shape.M * PER_MAP
    DV_STEP: tl.constexpr = DV_CH if shape.NHWC else 1
    scale, shift, mean, inverse = _statistics(norm, c, cm)
    slope = slopes(norm.slope, c, cm, shape.ACT1)
    width = size.width
    sum_da = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    sum_da_hat = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    sum_slope = tl.full((tile.CHANNELS,), 0.0, tl.float32)
    for t in range(tile.TILES):
        p = (first + t) * tile.PIXELS + tl.arange(0, tile.PIXELS)
        pm = p < size.pixels
        mask = pm[:, None] & cm[None, :]
        at = address(image, p, c, size.out_pixels, shape.OUT_CH, shape.NHWC)
        dy = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inner = p % size.out_pixels
        row = inner // width
        column = inner % width
        for r in range(PER_MAP):
            ghost = c * PER_MAP + r
            centre = dv_ptr + address(image, p, ghost, size.out_pixels, DV_CH, shape.NHWC)
            for i in range(D):
                up = D // 2 - i
                in_rows = (row + up >= 0) & (row + up < size.height) & pm
                for j in tl.static_range(D):
                    left = D // 2 - j
                    inside = in_rows & (column + left >= 0) & (column + left < width)
                    inside = inside[:, None] & cm[None, :]
                    dv = tl.load(centre + (up * width + left) * DV_STEP, mask=inside, other=0.0)
                    weight = tl.load(w2_ptr + ghost * (D * D) + (i * D + j), mask=cm, other=0.0)
                    dy += dv.to(tl.float32) * weight.to(tl.float32)[None, :]
        at = address(image, p, c, size.out_pixels, shape.M, shape.NHWC)
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        a = u * scale[None, :] + shift[None, :]
        if shape.ACT1 == 8:
            sum_slope += tl.sum(tl.where(mask, slope_gradient(a, dy), 0.0), 0)
        da = activate_gradient(a, dy, slope, shape.ACT1)
        da = tl.where(mask, da, 0.0)
        if da_ptr is not None:
            store(da_ptr, at, da, mask)
        sum_da += tl.sum(da, 0)
        sum_da_hat += tl.sum(da * (u - mean[None, :]) * inverse[None, :], 0)
    return sum_da, sum_da_hat, sum_slope


# ---------------------------------------------------------------- kernels


@triton.jit
def cheap_sums_kernel(
    y_ptr,  # [N, m, Ho, Wo]
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUT_CH, Ho, Wo]
    norm,  # [g]
    part,  # partial sums of dz, of dz * vhat and of a PReLU's slope gradient
    sums,  # [g], written; slope may be None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """dbeta2, dgamma2 and a PReLU's dslope2.

    Tile map: as cheap_kernel. Binding resource: memory bandwidth (y and grad_out in).
    """
    G: tl.constexpr = shape.G
    BLOCKS: tl.constexpr = (G + tile.CHANNELS - 1) // tile.CHANNELS
    block, group, image, first = locate(tl.program_id(0), size, BLOCKS, tile, shape.WIDE)
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    cm = c < G
    values = walk_sums(y_ptr, w2_ptr, grad_ptr, norm, image, first, (c, cm), size, shape, tile)
    store_sums(part, group, values, c, cm, G, tile.FAN, sums.slope is not None)
    fold_sums(part, sums, group, block, G, 1, tile, shape.WIDE)


@triton.jit
def cheap_gradient_kernel(
    y_ptr,  # [N, m, Ho, Wo]
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUT_CH, Ho, Wo]
    norm,  # [g]
    sums,  # [g], of the sums kernel; None without BATCH
    dv_ptr,  # [N, g, Ho, Wo], written, or None
    part,  # partial sums of dw2, or None
    dw2_ptr,  # [g, D, D], written, or None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """dv and dw2.

    Tile map: as cheap_kernel; TAPS is D * D rounded up to a power of two, the rows of the register
    tile in which dw2 accumulates. Binding resource: memory bandwidth (y and grad_out in, dv out);
    for D >= 5 loads from the L1 cache.
    """
    BLOCKS: tl.constexpr = (shape.G + tile.CHANNELS - 1) // tile.CHANNELS
    block, group, image, first = locate(tl.program_id(0), size, BLOCKS, tile, shape.WIDE)
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    channels = c, c < shape.G
    dw2 = walk_ghosts(
        y_ptr, w2_ptr, grad_ptr, norm, sums, dv_ptr, image, first, channels, size, shape, tile
    )
    if shape.WEIGHTS:
        fold_taps(part, dw2_ptr, dw2, group, block, channels, shape, tile.FAN)


@triton.jit
def intrinsic_gradient_kernel(
    dv_ptr,  # [N, g, Ho, Wo]; not read if GHOSTS_PER_MAP is 0
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUT_CH, Ho, Wo]
    u_ptr,  # [N, m, Ho, Wo]
    norm,  # [m]
    da_ptr,  # [N, m, Ho, Wo], written, or None
    part,  # partial sums of da, of da * uhat and of a PReLU's slope gradient, or None
    sums,  # [m], written; slope, or all, may be None
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """da, dbeta1, dgamma1 and a PReLU's dslope1.

    Tile map: a program owns CHANNELS intrinsic channels and TILES tiles of PIXELS consecutive
    pixels; it gathers the gradients of all ghosts of its channels.
    Binding resource: memory bandwidth (dv, grad_out and u in, da out); for D >= 5 loads from the
    L1 cache.
    """
    M: tl.constexpr = shape.M
    BLOCKS: tl.constexpr = (M + tile.CHANNELS - 1) // tile.CHANNELS
    block, group, image, first = locate(tl.program_id(0), size, BLOCKS, tile, shape.WIDE)
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    cm = c < M
    values = walk_intrinsic_gradient(
        dv_ptr, w2_ptr, grad_ptr, u_ptr, norm, da_ptr, image, first, (c, cm), size, shape, tile
    )
    if part.data is not None:
        store_sums(part, group, values, c, cm, M, tile.FAN, sums.slope is not None)
        fold_sums(part, sums, group, block, M, 1, tile, shape.WIDE)
