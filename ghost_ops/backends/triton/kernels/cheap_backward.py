"""Backward through the cheap operation: from grad_out to the gradient at batch norm 1's output.

With b = bn2(v), a = bn1(u) and sums over all pixels::

    dz = act2'(b) * grad_out[:, m:]     dbeta2 = sum dz    dgamma2 = sum dz * vhat
    dv = bn2'(dz)                       dw2 = dv correlated with y
    dy = grad_out[:, :m] + dv convolved with w2 turned by 180 degrees
    da = act1'(a) * dy                  dbeta1 = sum da    dgamma1 = sum da * uhat

v is computed anew from y in each pass: y is read from the caches, v would come from memory.
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
    store,
)


@triton.jit
def _ghost_gradient(
    y_ptr, w2_ptr, grad_ptr, image, p, pm, c, cm, scale, shift, mean, inverse, slope,
    out_pixels, height, width,
    M: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    NHWC: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """(dz, vhat) [P, G]."""
    v = depthwise_tile(
        y_ptr, w2_ptr, image, p, pm, c, cm, out_pixels, height, width, M, R, D, NHWC, BP, BG
    )
    at = address(image, p, c + M, out_pixels, OUP, NHWC)
    mask = pm[:, None] & (c + M < OUP)[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dz = activate_gradient(v * scale[None, :] + shift[None, :], grad, slope, ACT)
    return dz, (v - mean[None, :]) * inverse[None, :]


@triton.jit
def cheap_sums_kernel(
    y_ptr,  # [N, m, Ho, Wo]
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUP, Ho, Wo]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [g] each; gamma and beta may be None
    part_ptr,  # [2, parts, g], written: sums of dz and of dz * vhat
    parts, pixels, out_pixels, height, width,
    M: tl.constexpr, G: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    ACT: tl.constexpr, NHWC: tl.constexpr, WIDE: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dbeta2 and dgamma2, as one partial sum a program.

    Tile map: as cheap_kernel. Binding resource: memory bandwidth (y and grad_out in).
    """
    block, group, image, first = locate(pixels, tl.cdiv(G, BG), BP, TILES, WIDE)
    c = block_channels(block, BG, WIDE)
    cm = c < G
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    mean = per_channel(mean_ptr, c, cm)
    inverse = inverse_deviation(var_ptr, c, cm, eps)
    sum_dz = tl.zeros((BG,), tl.float32)
    sum_dz_hat = tl.zeros((BG,), tl.float32)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        dz, hat = _ghost_gradient(
            y_ptr, w2_ptr, grad_ptr, image, p, pm, c, cm, scale, shift, mean, inverse, slope,
            out_pixels, height, width, M, OUP, R, D, ACT, NHWC, BP, BG,
        )  # fmt: skip
        sum_dz += tl.sum(dz, 0)
        sum_dz_hat += tl.sum(dz * hat, 0)
    row = group.to(tl.int64) * G
    plane = tl.cast(parts, tl.int64) * G
    tl.store(part_ptr + row + c, sum_dz, mask=cm)
    tl.store(part_ptr + plane + row + c, sum_dz_hat, mask=cm)


@triton.jit
def cheap_gradient_kernel(
    y_ptr,  # [N, m, Ho, Wo]
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUP, Ho, Wo]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [g] each; gamma and beta may be None
    dbeta_ptr, dgamma_ptr,  # [g], of the sums kernel
    dv_ptr,  # [N, g, Ho, Wo], written
    part_ptr,  # [parts, g, D, D], written: dw2
    per_value, pixels, out_pixels, height, width,
    M: tl.constexpr, G: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    TAPS: tl.constexpr, ACT: tl.constexpr, BATCH: tl.constexpr, NHWC: tl.constexpr,
    WIDE: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """dv, and dw2 as one partial sum a program.

    Tile map: as cheap_kernel; TAPS is D * D rounded up to a power of two, the rows of the register
    tile that dw2 is added up in. Binding resource: memory bandwidth (y and grad_out in, dv out);
    for D >= 5 loads from the L1 cache.
    """
    block, group, image, first = locate(pixels, tl.cdiv(G, BG), BP, TILES, WIDE)
    c = block_channels(block, BG, WIDE)
    cm = c < G
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    mean = per_channel(mean_ptr, c, cm)
    inverse = inverse_deviation(var_ptr, c, cm, eps)
    sum_dz = per_channel(dbeta_ptr, c, cm)
    sum_dz_hat = per_channel(dgamma_ptr, c, cm)
    Y_STEP: tl.constexpr = M if NHWC else 1
    tap = tl.arange(0, TAPS)
    dw2 = tl.zeros((TAPS, BG), tl.float32)
    for t in range(TILES):
        p = (first + t) * BP + tl.arange(0, BP)
        pm = p < pixels
        dz, hat = _ghost_gradient(
            y_ptr, w2_ptr, grad_ptr, image, p, pm, c, cm, scale, shift, mean, inverse, slope,
            out_pixels, height, width, M, OUP, R, D, ACT, NHWC, BP, BG,
        )  # fmt: skip
        dv = norm_gradient(
            dz, hat, scale[None, :], sum_dz[None, :], sum_dz_hat[None, :], per_value, BATCH
        )
        dv = tl.where(pm[:, None], dv, 0.0)
        at = address(image, p, c, out_pixels, G, NHWC)
        store(dv_ptr, at, dv, pm[:, None] & cm[None, :])
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
    at = group.to(tl.int64) * (G * D * D) + c[None, :] * (D * D) + tap[:, None]
    tl.store(part_ptr + at, dw2, mask=(tap < D * D)[:, None] & cm[None, :])


@triton.jit
def intrinsic_gradient_kernel(
    dv_ptr,  # [N, g, Ho, Wo]; not read if R is 0
    w2_ptr,  # [g, D, D]
    grad_ptr,  # [N, OUP, Ho, Wo]
    u_ptr,  # [N, m, Ho, Wo]
    gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, slope,  # [m] each; gamma and beta may be None
    da_ptr,  # [N, m, Ho, Wo], written
    part_ptr,  # [2, parts, m], written: sums of da and of da * uhat
    parts, pixels, out_pixels, height, width,
    M: tl.constexpr, OUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr,
    NHWC: tl.constexpr, WIDE: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """da, and dbeta1 and dgamma1 as one partial sum a program.

    Tile map: a program owns BM intrinsic channels and TILES tiles of BP consecutive pixels; it
    gathers the gradients of the R ghosts of its channels.
    Binding resource: memory bandwidth (dv, grad_out and u in, da out); as above for D >= 5.
    """
    block, group, image, first = locate(pixels, tl.cdiv(M, BM), BP, TILES, WIDE)
    c = block_channels(block, BM, WIDE)
    cm = c < M
    scale, shift = scale_shift(c, cm, gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps)
    mean = per_channel(mean_ptr, c, cm)
    inverse = inverse_deviation(var_ptr, c, cm, eps)
    DV_STEP: tl.constexpr = M * R if NHWC else 1
    sum_da = tl.zeros((BM,), tl.float32)
    sum_da_hat = tl.zeros((BM,), tl.float32)
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
        da = activate_gradient(u * scale[None, :] + shift[None, :], dy, slope, ACT)
        da = tl.where(mask, da, 0.0)
        store(da_ptr, at, da, mask)
        sum_da += tl.sum(da, 0)
        sum_da_hat += tl.sum(da * (u - mean[None, :]) * inverse[None, :], 0)
    row_at = group.to(tl.int64) * M
    plane = tl.cast(parts, tl.int64) * M
    tl.store(part_ptr + row_at + c, sum_da, mask=cm)
    tl.store(part_ptr + plane + row_at + c, sum_da_hat, mask=cm)
