"""Backward through the cheap operation: from grad_out to the gradient at batch norm 1's output.

With b = bn2(v), a = bn1(u) and sums over all pixels::

    dz = act2'(b) * grad_out[:, m:]     dbeta2 = sum dz    dgamma2 = sum dz * vhat
    dv = bn2'(dz)                       dw2 = dv correlated with y
    dy = grad_out[:, :m] + dv convolved with w2 turned by 180 degrees
    da = act1'(a) * dy                  dbeta1 = sum da    dgamma1 = sum da * uhat

and of a PReLU the slopes' gradients, sum grad_out[:, m:] * min(b, 0) and sum dy * min(a, 0).
v is computed anew from y in each pass: y is read from the caches, v would come from memory.

The walks are what one program does with its tiles; ``fused_backward`` joins them in pairs.
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
    y_ptr, w2_ptr, grad_ptr, image, p, pm, c, cm, scale, shift, mean, inverse, slope,
    out_pixels, height, width,
    M: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    NHWC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """(dz, vhat, a PReLU's slope gradient) [P, G]."""
    v = depthwise_tile(
        y_ptr, w2_ptr, image, p, pm, c, cm, out_pixels, height, width, M, R, D, NHWC, BP, BG
    )
    at = address(image, p, c + M, out_pixels, OUP, NHWC)
    mask = pm[:, None] & (c + M < OUP)[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = v * scale[None, :] + shift[None, :]
    of_slope = grad
    if ACT == 8:
        of_slope = slope_gradient(b, grad)
    dz = activate_gradient(b, grad, slope, ACT)
    return dz, (v - mean[None, :]) * inverse[None, :], of_slope


# ---------------------------------------------------------------- walks


@triton.jit
def walk_sums(
    y_ptr, w2_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,
    image, first, pixels, c, cm, out_pixels, height, width,
    M: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    NHWC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums over TILES tiles, of ghost channels c: dz, dz * vhat, a PReLU's slope gradient."""
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    slope = slopes(slope, c, cm, ACT)
    mean = per_channel(mean_ptr, c, cm)
    inverse = inverse_deviation(var_ptr, c, cm, eps)
    sum_dz = tl.zeros((BG,), tl.float32)
    sum_dz_hat = tl.zeros((BG,), tl.float32)
    sum_slope = tl.zeros((BG,), tl.float32)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        dz, hat, of_slope = _ghost_gradient(
            y_ptr, w2_ptr, grad_ptr, image, p, pm, c, cm, scale, shift, mean, inverse, slope,
            out_pixels, height, width, M, OUP, R, D, ACT, NHWC, BP, BG,
        )  # fmt: skip
        sum_dz += tl.sum(dz, 0)
        sum_dz_hat += tl.sum(dz * hat, 0)
        if ACT == 8:
            sum_slope += tl.sum(of_slope, 0)
    return sum_dz, sum_dz_hat, sum_slope


@triton.jit
def walk_ghosts(
    y_ptr, w2_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,
    dbeta_ptr, dgamma_ptr, dv_ptr, per_value,
    image, first, pixels, c, cm, tap, out_pixels, height, width,
    M: tl.constexpr, G: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    TAPS: tl.constexpr, ACT: tl.constexpr, BATCH: tl.constexpr, WEIGHTS: tl.constexpr,
    NHWC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store dv of TILES tiles, of ghost channels c, if its pointer is given.

    Returns their part of dw2 [TAPS, BG]; zeros without WEIGHTS.
    """
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    slope = slopes(slope, c, cm, ACT)
    mean = per_channel(mean_ptr, c, cm)
    inverse = inverse_deviation(var_ptr, c, cm, eps)
    sum_dz = tl.zeros((BG,), tl.float32)
    sum_dz_hat = tl.zeros((BG,), tl.float32)
    if BATCH:
        sum_dz = per_channel(dbeta_ptr, c, cm)
        sum_dz_hat = per_channel(dgamma_ptr, c, cm)
    Y_STEP: tl.constexpr = M if NHWC else 1
    dw2 = tl.zeros((TAPS, BG), tl.float32)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        dz, hat, _ = _ghost_gradient(
            y_ptr, w2_ptr, grad_ptr, image, p, pm, c, cm, scale, shift, mean, inverse, slope,
            out_pixels, height, width, M, OUP, R, D, ACT, NHWC, BP, BG,
        )  # fmt: skip
        dv = norm_gradient(
            dz, hat, scale[None, :], sum_dz[None, :], sum_dz_hat[None, :], per_value, BATCH
        )
        dv = tl.where(pm[:, None], dv, 0.0)
        if dv_ptr is not None:
            at = address(image, p, c, out_pixels, G, NHWC)
            store(dv_ptr, at, dv, pm[:, None] & cm[None, :])
        if WEIGHTS:
            inner = p % out_pixels
            row = inner // width
            column = inner % width
            centre = y_ptr + address(image, p, c // R, out_pixels, M, NHWC)
            for i in range(D):
                down = i - D // 2
                in_rows = (row + down >= 0) & (row + down < height) & pm
                for j in tl.static_range(D):
                    right = j - D // 2
                    inside = in_rows & (column + right >= 0) & (column + right < width)
                    mask = inside[:, None] & cm[None, :]
                    y = tl.load(centre + (down * width + right) * Y_STEP, mask=mask, other=0.0)
                    total = tl.sum(dv * y.to(tl.float32), 0)
                    dw2 += tl.where((tap == i * D + j)[:, None], total[None, :], 0.0)
    return dw2


@triton.jit
def walk_intrinsic_gradient(
    dv_ptr, w2_ptr, grad_ptr, u_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope, da_ptr,
    image, first, pixels, c, cm, out_pixels, height, width,
    M: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    NHWC: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Store da of TILES tiles, of intrinsic channels c, if its pointer is given.

    Returns the sums of da, of da * uhat and of a PReLU's slope gradient.
    """
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    slope = slopes(slope, c, cm, ACT)
    mean = per_channel(mean_ptr, c, cm)
    inverse = inverse_deviation(var_ptr, c, cm, eps)
    DV_STEP: tl.constexpr = M * R if NHWC else 1
    sum_da = tl.zeros((BM,), tl.float32)
    sum_da_hat = tl.zeros((BM,), tl.float32)
    sum_slope = tl.zeros((BM,), tl.float32)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        mask = pm[:, None] & cm[None, :]
        at = address(image, p, c, out_pixels, OUP, NHWC)
        dy = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inner = p % out_pixels
        row = inner // width
        column = inner % width
        for r in range(R):
            ghost = c * R + r
            centre = dv_ptr + address(image, p, ghost, out_pixels, M * R, NHWC)
            for i in range(D):
                up = D // 2 - i
                in_rows = (row + up >= 0) & (row + up < height) & pm
                for j in tl.static_range(D):
                    left = D // 2 - j
                    inside = in_rows & (column + left >= 0) & (column + left < width)
                    inside = inside[:, None] & cm[None, :]
                    dv = tl.load(centre + (up * width + left) * DV_STEP, mask=inside, other=0.0)
                    weight = tl.load(w2_ptr + ghost * (D * D) + (i * D + j), mask=cm, other=0.0)
                    dy += dv.to(tl.float32) * weight.to(tl.float32)[None, :]
        at = address(image, p, c, out_pixels, M, NHWC)
        u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
        a = u * scale[None, :] + shift[None, :]
        if ACT == 8:
            sum_slope += tl.sum(tl.where(mask, slope_gradient(a, dy), 0.0), 0)
        da = activate_gradient(a, dy, slope, ACT)
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
    grad_ptr,  # [N, OUP, Ho, Wo]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [g] each; gamma and beta may be None
    part_ptr, counter_ptr,  # partial sums of dz, of dz * vhat and of a PReLU's slope gradient
    dbeta_ptr, dgamma_ptr, dslope_ptr,  # [g], written; the last may be None
    parts, pixels, out_pixels, height, width,
    M: tl.constexpr, G: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    ACT: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr, TILES: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """dbeta2, dgamma2 and a PReLU's dslope2.

    Tile map: as cheap_kernel. Binding resource: memory bandwidth (y and grad_out in).
    """
    block, group, image, first = locate(tl.program_id(0), pixels, tl.cdiv(G, BG), BP, TILES, WIDE)
    c = block_channels(block, BG, WIDE)
    cm = c < G
    sum_dz, sum_dz_hat, sum_slope = walk_sums(
        y_ptr, w2_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,
        image, first, pixels, c, cm, out_pixels, height, width,
        M, OUP, R, D, ACT, NHWC, BP, BG, TILES,
    )  # fmt: skip
    store_sums(
        part_ptr, parts, group, sum_dz, sum_dz_hat, sum_slope, c, cm, G, FAN,
        dslope_ptr is not None,
    )  # fmt: skip
    fold_sums(
        part_ptr, counter_ptr, dbeta_ptr, dgamma_ptr, dslope_ptr, parts, group, block,
        G, BG, 1, FAN, WIDE,
    )  # fmt: skip


@triton.jit
def cheap_gradient_kernel(
    y_ptr,  # [N, m, Ho, Wo]
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUP, Ho, Wo]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [g] each; gamma and beta may be None
    dbeta_ptr, dgamma_ptr,  # [g], of the sums kernel; None without BATCH
    dv_ptr,  # [N, g, Ho, Wo], written, or None
    part_ptr, counter_ptr,  # partial sums of dw2, or None
    dw2_ptr,  # [g, D, D], written, or None
    per_value, parts, pixels, out_pixels, height, width,
    M: tl.constexpr, G: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    TAPS: tl.constexpr, ACT: tl.constexpr, BATCH: tl.constexpr, NHWC: tl.constexpr,
    WIDE: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, TILES: tl.constexpr,
    FAN: tl.constexpr,
):  # fmt: skip
    """dv and dw2.

    Tile map: as cheap_kernel; TAPS is D * D rounded up to a power of two, the rows of the register
    tile that dw2 is added up in. Binding resource: memory bandwidth (y and grad_out in, dv out);
    for D >= 5 loads from the L1 cache.
    """
    block, group, image, first = locate(tl.program_id(0), pixels, tl.cdiv(G, BG), BP, TILES, WIDE)
    c = block_channels(block, BG, WIDE)
    cm = c < G
    tap = tl.arange(0, TAPS)
    dw2 = walk_ghosts(
        y_ptr, w2_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,
        dbeta_ptr, dgamma_ptr, dv_ptr, per_value,
        image, first, pixels, c, cm, tap, out_pixels, height, width,
        M, G, OUP, R, D, TAPS, ACT, BATCH, dw2_ptr is not None, NHWC, BP, BG, TILES,
    )  # fmt: skip
    if dw2_ptr is not None:
        at = c[None, :] * (D * D) + tap[:, None]
        mask = (tap < D * D)[:, None] & cm[None, :]
        store_matrix(part_ptr, group, dw2, at, mask, G * D * D)
        fold_matrix(part_ptr, counter_ptr, dw2_ptr, parts, group, block, at, mask, G * D * D, FAN)


@triton.jit
def intrinsic_gradient_kernel(
    dv_ptr,  # [N, g, Ho, Wo]; not read if R is 0
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUP, Ho, Wo]
    u_ptr,  # [N, m, Ho, Wo]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [m] each; gamma and beta may be None
    da_ptr,  # [N, m, Ho, Wo], written, or None
    part_ptr, counter_ptr,  # partial sums of da, of da * uhat and of a PReLU's slope gradient
    dbeta_ptr, dgamma_ptr, dslope_ptr,  # [m], written; None: not wanted, the last alone or all
    parts, pixels, out_pixels, height, width,
    M: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    NHWC: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr,
    TILES: tl.constexpr, FAN: tl.constexpr,
):  # fmt: skip
    """da, dbeta1, dgamma1 and a PReLU's dslope1.

    Tile map: a program owns BM intrinsic channels and TILES tiles of BP consecutive pixels; it
    gathers the gradients of the R ghosts of its channels.
    Binding resource: memory bandwidth (dv, grad_out and u in, da out); as above for D >= 5.
    """
    block, group, image, first = locate(tl.program_id(0), pixels, tl.cdiv(M, BM), BP, TILES, WIDE)
    c = block_channels(block, BM, WIDE)
    cm = c < M
    sum_da, sum_da_hat, sum_slope = walk_intrinsic_gradient(
        dv_ptr, w2_ptr, grad_ptr, u_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,
        da_ptr, image, first, pixels, c, cm, out_pixels, height, width,
        M, OUP, R, D, ACT, NHWC, BP, BM, TILES,
    )  # fmt: skip
    if part_ptr is not None:
        store_sums(
            part_ptr, parts, group, sum_da, sum_da_hat, sum_slope, c, cm, M, FAN,
            dslope_ptr is not None,
        )  # fmt: skip
        fold_sums(
            part_ptr, counter_ptr, dbeta_ptr, dgamma_ptr, dslope_ptr, parts, group, block,
            M, BM, 1, FAN, WIDE,
        )  # fmt: skip
