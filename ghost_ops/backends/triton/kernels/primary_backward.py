"""Backward through batch norm 1 and the primary convolution: du = bn1'(da), dx = w1^T du, dw1."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    address,
    block_channels,
    dot,
    inverse_deviation,
    locate,
    norm_gradient,
    per_channel,
    rounded,
    sampled,
    store,
)
from .partial import fold_matrix, store_matrix


@triton.jit
def _du_tile(da_ptr, u_ptr, norm, sums, image, p, pm, c, cm, size, shape: tl.constexpr):
    """du [P, M] at output pixels p and intrinsic channels c; zero outside the masks."""
    mask = pm[:, None] & cm[None, :]
    at = address(image, p, c, size.out_pixels, shape.M, shape.NHWC)
    da = tl.load(da_ptr + at, mask=mask, other=0.0).to(tl.float32)
    inverse = inverse_deviation(norm, c, cm)
    scale = inverse
    if norm.gamma is not None:
        scale = inverse * per_channel(norm.gamma, c, cm)
    if shape.BATCH:
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        hat = (u - per_channel(norm.mean, c, cm)[None, :]) * inverse[None, :]
        sum_da = per_channel(sums.beta, c, cm)[None, :]
        sum_da_hat = per_channel(sums.gamma, c, cm)[None, :]
        of_batch = sum_da, sum_da_hat, sums.per_value
        du = norm_gradient(da, hat, scale[None, :], of_batch, shape.BATCH)
    else:
        du = da * scale[None, :]
    return tl.where(mask, du, 0.0)


@triton.jit
def _input_gradient(
    pid, da_ptr, u_ptr, w1_ptr, norm, sums, dx_ptr, size, shape: tl.constexpr, tile: tl.constexpr
):
    """dx of CHANNELS input channels and TILES tiles of PIXELS consecutive *input* pixels.

    size.pixels: input pixels.
    """
    C: tl.constexpr = shape.C
    S: tl.constexpr = shape.S
    block, _, image, first = locate(pid, size, tl.cdiv(C, tile.CHANNELS), tile, shape.WIDE)
    c = block_channels(block, tile.CHANNELS, shape.WIDE)
    cm = c < C
    for t in range(tile.TILES):
        q = (first + t) * tile.PIXELS + tl.arange(0, tile.PIXELS)
        qm = q < size.pixels
        if S == 1:
            p = q
            pm = qm
        else:
            inner = q % size.in_pixels
            row = inner // size.in_width
            column = inner % size.in_width
            p = (q // size.in_pixels) * size.out_pixels + (row // S) * size.width + column // S
            pm = qm & (row % S == 0) & (column % S == 0)
        if w1_ptr is not None:
            dx = tl.full((tile.PIXELS, tile.CHANNELS), 0.0, tl.float32)
            for k0 in range(0, shape.M, tile.DEPTH):
                k = k0 + tl.arange(0, tile.DEPTH)
                km = k < shape.M
                if shape.WIDE:
                    k = k.to(tl.int64)
                du = _du_tile(da_ptr, u_ptr, norm, sums, image, p, pm, k, km, size, shape)
                at = k[:, None] * C + c[None, :]
                w = tl.load(w1_ptr + at, mask=km[:, None] & cm[None, :], other=0.0)
                dx = dot(rounded(du, w.dtype), w, dx, shape)
        else:
            dx = _du_tile(da_ptr, u_ptr, norm, sums, image, p, pm, c, cm, size, shape)
        at = address(image, q, c, size.in_pixels, C, shape.NHWC)
        store(dx_ptr, at, dx, qm[:, None] & cm[None, :])


@triton.jit
def _weight_gradient(
    pid,
    da_ptr,
    u_ptr,
    x_ptr,
    norm,
    sums,
    part,
    dw1_ptr,
    size,
    shape: tl.constexpr,
    tile: tl.constexpr,
):
    """CHANNELS x DEPTH entries [m, C] of dw1, from TILES tiles of PIXELS output pixels."""
    C: tl.constexpr = shape.C
    M: tl.constexpr = shape.M
    BLOCKS_C: tl.constexpr = (C + tile.DEPTH - 1) // tile.DEPTH
    BLOCKS_M: tl.constexpr = (M + tile.CHANNELS - 1) // tile.CHANNELS
    block, group, image, first = locate(pid, size, BLOCKS_M * BLOCKS_C, tile, shape.WIDE)
    k = block_channels(block // BLOCKS_C, tile.CHANNELS, shape.WIDE)
    km = k < M
    c = block_channels(block % BLOCKS_C, tile.DEPTH, shape.WIDE)
    cm = c < C
    dw1 = tl.full((tile.CHANNELS, tile.DEPTH), 0.0, tl.float32)
    for t in range(tile.TILES):
        p = (first + t) * tile.PIXELS + tl.arange(0, tile.PIXELS)
        pm = p < size.pixels
        du = _du_tile(da_ptr, u_ptr, norm, sums, image, p, pm, k, km, size, shape)
        q = sampled(p, size, shape.S)
        at = address(image, q, c, size.in_pixels, C, shape.NHWC)
        x = tl.load(x_ptr + at, mask=pm[:, None] & cm[None, :], other=0.0)
        dw1 = dot(tl.trans(rounded(du, x.dtype)), x, dw1, shape)
    at = k[:, None] * C + c[None, :]
    mask = km[:, None] & cm[None, :]
    store_matrix(part, group, dw1, at, mask, M * C)
    fold_matrix(part, dw1_ptr, group, block, at, mask, M * C, tile.FAN)


@triton.jit
def primary_gradient_kernel(
    da_ptr,  # [N, m, Ho, Wo]
    u_ptr,  # [N, m, Ho, Wo]
    x_ptr,  # [N, C, H, W]
    w1_ptr,  # [m, C], or None: x is u
    norm,  # [m]
    sums,  # [m]; None without BATCH
    dx_ptr,  # [N, C, H, W], written, or None
    part,  # partial sums of dw1, or None
    dw1_ptr,  # [m, C], written, or None
    weight_programs,
    sizes,  # of the maps for dx, and for dw1
    shape: tl.constexpr,
    tile: tl.constexpr,
    weight_tile: tl.constexpr,
):
    """dw1 = du^T @ x and dx = du @ w1; du is recomputed from da and u as it is read.

    Tile map: the first weight_programs programs make dw1, each a partial block of weight_tile's
    CHANNELS x DEPTH over its TILES tiles of PIXELS output pixels; these programs run longest. The
    other programs make dx, each CHANNELS input channels of TILES tiles of PIXELS input pixels, the
    product over m in steps of DEPTH; dx is zero at pixels that a strided convolution does not read.
    Binding resource: memory bandwidth (da, u and x in, dx out); the products for large m and C.
    """
    size, weight_size = sizes
    pid = tl.program_id(0)
    if pid < weight_programs:
        if dw1_ptr is not None:
            _weight_gradient(
                pid,
                da_ptr,
                u_ptr,
                x_ptr,
                norm,
                sums,
                part,
                dw1_ptr,
                weight_size,
                shape,
                weight_tile,
            )
    else:
        if dx_ptr is not None:
            input_pid = pid - weight_programs
            _input_gradient(input_pid, da_ptr, u_ptr, w1_ptr, norm, sums, dx_ptr, size, shape, tile)
