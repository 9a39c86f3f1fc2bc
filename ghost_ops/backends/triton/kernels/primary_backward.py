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
def _du_tile(
    da_ptr, u_ptr, gamma_ptr, mean_ptr, var_ptr, eps, dbeta_ptr, dgamma_ptr, per_value,
    image, p, pm, c, cm, out_pixels,
    M: tl.constexpr, BATCH: tl.constexpr, NHWC: tl.constexpr,
):  # fmt: skip
    """du [P, M] at output pixels p and intrinsic channels c; zero outside the masks."""
    mask = pm[:, None] & cm[None, :]
    at = address(image, p, c, out_pixels, M, NHWC)
    da = tl.load(da_ptr + at, mask=mask, other=0.0).to(tl.float32)
    inverse = inverse_deviation(var_ptr, c, cm, eps)
    scale = inverse
    if gamma_ptr is not None:
        scale = inverse * per_channel(gamma_ptr, c, cm)
    if BATCH:
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        hat = (u - per_channel(mean_ptr, c, cm)[None, :]) * inverse[None, :]
        sum_da = per_channel(dbeta_ptr, c, cm)[None, :]
        sum_da_hat = per_channel(dgamma_ptr, c, cm)[None, :]
        du = norm_gradient(da, hat, scale[None, :], sum_da, sum_da_hat, per_value, BATCH)
    else:
        du = da * scale[None, :]
    return tl.where(mask, du, 0.0)


@triton.jit
def _input_gradient(
    pid, da_ptr, u_ptr, w1_ptr, gamma_ptr, mean_ptr, var_ptr, eps, dbeta_ptr, dgamma_ptr, per_value,
    dx_ptr, pixels, in_pixels, in_width, out_pixels, out_width,
    C: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BATCH: tl.constexpr, NHWC: tl.constexpr,
    WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dx of BC input channels and TILES tiles of BP consecutive *input* pixels."""
    block, _, image, first = locate(pid, pixels, tl.cdiv(C, BC), BP, TILES, WIDE)
    c = block_channels(block, BC, WIDE)
    cm = c < C
    for t in range(TILES):
        q = (first + t) * BP + tl.arange(0, BP)
        qm = q < pixels
        if S == 1:
            p = q
            pm = qm
        else:
            inner = q % in_pixels
            row = inner // in_width
            column = inner % in_width
            p = (q // in_pixels) * out_pixels + (row // S) * out_width + column // S
            pm = qm & (row % S == 0) & (column % S == 0)
        if w1_ptr is not None:
            dx = tl.zeros((BP, BC), tl.float32)
            for k0 in range(0, M, BK):
                k = k0 + tl.arange(0, BK)
                km = k < M
                if WIDE:
                    k = k.to(tl.int64)
                du = _du_tile(
                    da_ptr, u_ptr, gamma_ptr, mean_ptr, var_ptr, eps, dbeta_ptr, dgamma_ptr,
                    per_value, image, p, pm, k, km, out_pixels, M, BATCH, NHWC,
                )  # fmt: skip
                w = tl.load(
                    w1_ptr + k[:, None] * C + c[None, :], mask=km[:, None] & cm[None, :], other=0.0
                )
                dx = dot(rounded(du, w.dtype), w, dx, PREC)
        else:
            dx = _du_tile(
                da_ptr, u_ptr, gamma_ptr, mean_ptr, var_ptr, eps, dbeta_ptr, dgamma_ptr,
                per_value, image, p, pm, c, cm, out_pixels, M, BATCH, NHWC,
            )  # fmt: skip
        at = address(image, q, c, in_pixels, C, NHWC)
        store(dx_ptr, at, dx, qm[:, None] & cm[None, :])


@triton.jit
def _weight_gradient(
    pid, da_ptr, u_ptr, x_ptr, gamma_ptr, mean_ptr, var_ptr, eps, dbeta_ptr, dgamma_ptr, per_value,
    part_ptr, counter_ptr, dw1_ptr, parts, pixels, in_pixels, in_width, out_pixels, out_width,
    C: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BATCH: tl.constexpr, NHWC: tl.constexpr,
    WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """BM x BC entries of dw1, from TILES tiles of BP output pixels."""
    BLOCKS_C: tl.constexpr = (C + BC - 1) // BC
    BLOCKS_M: tl.constexpr = (M + BM - 1) // BM
    block, group, image, first = locate(pid, pixels, BLOCKS_M * BLOCKS_C, BP, TILES, WIDE)
    k = block_channels(block // BLOCKS_C, BM, WIDE)
    km = k < M
    c = block_channels(block % BLOCKS_C, BC, WIDE)
    cm = c < C
    dw1 = tl.zeros((BM, BC), tl.float32)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        du = _du_tile(
            da_ptr, u_ptr, gamma_ptr, mean_ptr, var_ptr, eps, dbeta_ptr, dgamma_ptr,
            per_value, image, p, pm, k, km, out_pixels, M, BATCH, NHWC,
        )  # fmt: skip
        q = sampled(p, in_pixels, in_width, out_pixels, out_width, S)
        at = address(image, q, c, in_pixels, C, NHWC)
        x = tl.load(x_ptr + at, mask=pm[:, None] & cm[None, :], other=0.0)
        dw1 = dot(tl.trans(rounded(du, x.dtype)), x, dw1, PREC)
    at = k[:, None] * C + c[None, :]
    mask = km[:, None] & cm[None, :]
    store_matrix(part_ptr, group, dw1, at, mask, M * C)
    fold_matrix(part_ptr, counter_ptr, dw1_ptr, parts, group, block, at, mask, M * C, FAN)


@triton.jit
def primary_gradient_kernel(
    da_ptr, u_ptr,  # [N, m, Ho, Wo]
    x_ptr,  # [N, C, H, W]
    w1_ptr,  # [m, C], or None: x is u
    gamma_ptr, mean_ptr, var_ptr, eps,  # [m]; gamma may be None
    dbeta_ptr, dgamma_ptr, per_value,  # [m]
    dx_ptr,  # [N, C, H, W], written, or None
    part_ptr, counter_ptr,  # partial sums of dw1, or None
    dw1_ptr,  # [m, C], written, or None
    weight_programs, parts, x_pixels, pixels, in_pixels, in_width, out_pixels, out_width,
    C: tl.constexpr, M: tl.constexpr, S: tl.constexpr, BATCH: tl.constexpr, NHWC: tl.constexpr,
    WIDE: tl.constexpr, PREC: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    W_BP: tl.constexpr, W_BM: tl.constexpr, W_BC: tl.constexpr, W_TILES: tl.constexpr,
    FAN: tl.constexpr,
):  # fmt: skip
    """dw1 = du^T @ x and dx = du @ w1, du computed on the way in from da and u.

    Tile map: the first weight_programs programs make dw1, each a partial W_BM x W_BC block over
    W_TILES tiles of W_BP output pixels; their work is the longer one. The others make dx, each BC
    input channels of TILES tiles of BP input pixels, the product over m in steps of BK; dx is zero
    where a strided convolution does not read.
    Binding resource: memory bandwidth (da, u and x in, dx out); the products for large m and C.
    """
    pid = tl.program_id(0)
    if pid < weight_programs:
        if dw1_ptr is not None:
            _weight_gradient(
                pid, da_ptr, u_ptr, x_ptr, gamma_ptr, mean_ptr, var_ptr, eps, dbeta_ptr,
                dgamma_ptr, per_value, part_ptr, counter_ptr, dw1_ptr, parts, pixels,
                in_pixels, in_width, out_pixels, out_width,
                C, M, S, BATCH, NHWC, WIDE, PREC, W_BP, W_BM, W_BC, W_TILES, FAN,
            )  # fmt: skip
    else:
        if dx_ptr is not None:
            _input_gradient(
                pid - weight_programs, da_ptr, u_ptr, w1_ptr, gamma_ptr, mean_ptr, var_ptr, eps,
                dbeta_ptr, dgamma_ptr, per_value, dx_ptr, x_pixels,
                in_pixels, in_width, out_pixels, out_width,
                C, M, S, BATCH, NHWC, WIDE, PREC, BP, BC, BK, TILES,
            )  # fmt: skip
