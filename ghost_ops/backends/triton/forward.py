"""The operators of the forward in Triton: ``eager_ops``, function for function.

Launches: pack 2; apply 1 or 2; a training forward 5 or 6 (a pass that ends in statistics leaves
partial ones, which one small kernel adds up in their order).

What no kernel computes is decided here: who allocates what, and how many programs run. Nothing per
channel is computed in PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...eager_ops import intrinsic_count, memory_format
from . import layout, tuning
from .checks import check_cheap, check_numbers, check_primary, check_same_shape, check_vectors
from .kernels.cheap import cheap_kernel
from .kernels.fold import pack_kernel, update_running_kernel
from .kernels.fused import fused_kernel
from .kernels.primary import primary_kernel
from .launch import (
    NO_NORM,
    Cut,
    Norm,
    Partial,
    device_of,
    fold_moments,
    maps,
    on_device,
    options,
    partial_moments,
    precision,
    vectors,
    zeros,
)
from .plan import Device, Problem, Tile, passes, rounded_up, stashes_u

_BLOCK = 256  # elements a program of the elementwise kernels takes


# ---------------------------------------------------------------- launches of single kernels


def launch_primary(
    x: Tensor, w1: Tensor | None, p: Problem, device: Device, *, norm: Norm = NO_NORM,
    u: Tensor | None = None, y: Tensor | None = None, out: Tensor | None = None,
    residual: Tensor | None = None, moments: bool = False,
) -> Partial | None:  # fmt: skip
    """Launch primary_kernel; the partial moments and their number, if asked for."""

    def launch(tile: Tile) -> Partial | None:
        cut = Cut.of("primary", p, tile, device)
        part = partial_moments(x, cut.groups, p.m) if moments else None
        primary_kernel[(cut.groups * math.ceil(p.m / tile.channels),)](
            x, w1, *norm, p.slope1, u, y, out, residual, part,
            cut.groups, cut.pixels, p.h * p.w, p.w, p.out_pixels, p.wo,
            C=p.c, M=p.m, Y_CH=p.m if y is None else y.size(1), OUP=p.out_channels, S=p.stride,
            ACT=p.act1, NHWC=p.nhwc, WIDE=p.wide, PREC=precision(x.dtype, device),
            BP=tile.pixels, BM=tile.channels, BK=tile.depth, TILES=cut.tiles,
            **options(tile),
        )  # fmt: skip
        return None if part is None else Partial(part, cut.groups)

    return tuning.run("primary", p, device, launch, "moments" if moments else "")


def launch_cheap(
    y: Tensor, w2: Tensor, p: Problem, device: Device, *, norm: Norm = NO_NORM,
    out: Tensor | None = None, residual: Tensor | None = None, moments: bool = False,
) -> Partial | None:  # fmt: skip
    """Launch cheap_kernel; the partial moments and their number, if asked for."""

    def launch(tile: Tile) -> Partial | None:
        cut = Cut.of("cheap", p, tile, device)
        part = partial_moments(y, cut.groups, p.g) if moments else None
        cheap_kernel[(cut.groups * math.ceil(p.g / tile.channels),)](
            y, w2, *norm, p.slope2, out, residual, part,
            cut.groups, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, Y_CH=y.size(1), OUP=p.out_channels, R=p.r, D=p.dw_size, ACT=p.act2,
            NHWC=p.nhwc, WIDE=p.wide, BP=tile.pixels, BG=tile.channels, TILES=cut.tiles,
            **options(tile),
        )  # fmt: skip
        return None if part is None else Partial(part, cut.groups)

    return tuning.run("cheap", p, device, launch, "moments" if moments else "")


def launch_fused(
    x: Tensor, w1: Tensor | None, w2: Tensor, p: Problem, device: Device, *,
    norm1: Norm, norm2: Norm = NO_NORM, y: Tensor,
    out: Tensor | None = None, moments: bool = False,
) -> Partial | None:  # fmt: skip
    """Launch fused_kernel; the partial moments and their number, if asked for."""

    def launch(tile: Tile) -> Partial | None:
        part = partial_moments(x, p.n, p.g) if moments else None
        fused_kernel[(p.n * math.ceil(p.m / tile.channels),)](
            x, w1, *norm1, p.slope1, w2, *norm2, p.slope2, y, out, part,
            p.n, p.h * p.w, p.w, p.out_pixels, p.ho, p.wo,
            C=p.c, M=p.m, G=p.g, Y_CH=y.size(1), OUP=p.out_channels, R=p.r, D=p.dw_size,
            S=p.stride, ACT1=p.act1, ACT2=p.act2, NHWC=p.nhwc, WIDE=p.wide,
            PREC=precision(x.dtype, device),
            BP=tile.pixels, BM=tile.channels, BK=tile.depth,
            TILES=rounded_up(math.ceil(p.out_pixels / tile.pixels)),
            **options(tile),
        )  # fmt: skip
        return None if part is None else Partial(part, p.n)

    return tuning.run("fused", p, device, launch, "moments" if moments else "")


# ---------------------------------------------------------------- the operators


def ghost_pack(
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    eps1: float,
    w2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps2: float,
    prelu1: Tensor | None = None,
    prelu2: Tensor | None = None,
) -> Tensor:
    """Both batch norms as scale and shift, and the weights: 1-D, as ``layout`` says."""
    if prelu1 is not None or prelu2 is not None:
        raise RuntimeError("ghost_pack: slopes per channel are not here yet")
    m = intrinsic_count(w1, gamma1, beta1, mean1, var1)
    channels = 0 if w1 is None else w1.size(1)
    check_primary(w1, w2, m, channels)
    g, d = check_cheap(w2, w2, m)
    check_vectors(w2, m, gamma1=gamma1, beta1=beta1, mean1=mean1, var1=var1)
    check_vectors(w2, g, gamma2=gamma2, beta2=beta2, mean2=mean2, var2=var2)
    numel = layout.packed_numel(channels, m, g, d, w2.dtype, w1 is not None)
    packed = w2.new_empty(numel, dtype=torch.float32)
    to = layout.split(packed, channels, m, g, d, w2.dtype, w1 is not None)
    norm1 = Norm(gamma1, beta1, mean1, var1, eps1)
    norm2 = Norm(gamma2, beta2, mean2, var2, eps2)
    with on_device(w2):
        _pack(w1, to.w1, norm1, to.scale1, to.shift1, m)
        if g:
            _pack(w2, to.w2, norm2, to.scale2, to.shift2, g)
    return packed


def _pack(
    w: Tensor | None, into: Tensor | None, norm: Norm, scale: Tensor, shift: Tensor, count: int
) -> None:
    size = 0 if w is None else w.numel()
    grid = (math.ceil(max(size, count) / _BLOCK),)
    pack_kernel[grid](w, into, *norm, scale, shift, size, count, B=_BLOCK, enable_fp_fusion=True)


def ghost_apply(
    x: Tensor,
    packed: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    intrinsic: int,
    out_channels: int,
    ratio: int,
    dw_size: int,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    has_primary: bool,
) -> Tensor:
    """The whole module with batch norms as scale and shift; plus the residual, if one is given."""
    if gate is not None:
        raise RuntimeError("ghost_apply: a gate is not here yet")
    p = problem_of(
        x, intrinsic, ratio, out_channels, dw_size, stride, act1, slope1, act2, slope2, has_primary
    )
    parts = layout.split(packed, p.c, p.m, p.g, p.dw_size, x.dtype, has_primary)
    norm1 = Norm(parts.scale1, parts.shift1, None, None, 0.0)
    norm2 = Norm(parts.scale2, parts.shift2, None, None, 0.0)
    out = maps(x, p, p.out_channels)
    if residual is not None:
        check_same_shape("residual", residual, out)
        residual = residual.contiguous(memory_format=memory_format(out))
    if out.numel() == 0:
        return out
    device = device_of(x)
    with on_device(x):
        if passes(p, device, stores_z=True, residual=residual is not None).one_pass:
            launch_fused(x, parts.w1, parts.w2, p, device, norm1=norm1, norm2=norm2, y=out, out=out)
            return out
        # y + residual goes into out, so y itself, which the ghosts are made from, does not.
        y = out if residual is None else maps(x, p, p.m)
        launch_primary(x, parts.w1, p, device, norm=norm1, y=y, out=out, residual=residual)
        if p.g:
            launch_cheap(y, parts.w2, p, device, norm=norm2, out=out, residual=residual)
    return out


def ghost_primary_stats(x: Tensor, w1: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [m] of u = conv(x, w1)."""
    m = w1.size(0)
    p = problem_of(x, m, 1, m, 1, stride, 0, 0.0, 0, 0.0, True)
    check_primary(w1, x, m, p.c)
    if x.numel() == 0:
        return zeros(x, m)
    with on_device(x):
        return fold_moments(launch_primary(x, w1, p, device_of(x), moments=True), m)


def ghost_cheap_stats(
    x: Tensor,
    packed: Tensor,
    intrinsic: int,
    ratio: int,
    dw_size: int,
    stride: int,
    act1: int,
    slope1: float,
    has_primary: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [g] of v; y lives in scratch memory that dies with the call."""
    p = problem_of(
        x, intrinsic, ratio, intrinsic * ratio, dw_size, stride, act1, slope1, 0, 0.0, has_primary
    )
    parts = layout.split(packed, p.c, p.m, p.g, p.dw_size, x.dtype, has_primary)
    if x.numel() == 0 or p.g == 0:
        return zeros(x, p.g)
    norm1 = Norm(parts.scale1, parts.shift1, None, None, 0.0)
    with on_device(x):
        y = maps(x, p, p.m)
        return _second_pass(x, parts.w1, parts.w2, p, device_of(x), norm1, y)


def _second_pass(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    p: Problem,
    device: Device,
    norm1: Norm,
    y: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write y, and return the statistics of v."""
    if passes(p, device, stores_z=False).one_pass:
        partial = launch_fused(x, w1, w2, p, device, norm1=norm1, y=y, moments=True)
    else:
        launch_primary(x, w1, p, device, norm=norm1, y=y)
        partial = launch_cheap(y, w2, p, device, moments=True)
    return fold_moments(partial, p.g)


def ghost_train_forward(
    x: Tensor,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    eps1: float,
    w2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    eps2: float,
    out_channels: int,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    keep_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, mean1, var1, mean2, var2, u or empty), normalised with the batch's statistics.

    Pass 1 computes u and its statistics, pass 2 y (into out) and the statistics of v, pass 3 z.
    """
    m = x.size(1) if w1 is None else w1.size(0)
    check_primary(w1, x, m, x.size(1))
    g, d = check_cheap(w2, x, m)
    check_vectors(x, m, gamma1=gamma1, beta1=beta1)
    check_vectors(x, g, gamma2=gamma2, beta2=beta2)
    p = problem_of(
        x, m, g // m + 1, out_channels, d, stride, act1, slope1, act2, slope2, w1 is not None
    )
    out = maps(x, p, p.out_channels)
    if x.numel() == 0:
        u = maps(x, p, m) if keep_u else x.new_empty(0)
        return out, *zeros(x, m), *zeros(x, g), u
    device = device_of(x)
    stash = maps(x, p, m) if keep_u or stashes_u(p) else None
    with on_device(x):
        mean1, var1 = fold_moments(launch_primary(x, w1, p, device, u=stash, moments=True), m)
        norm1 = Norm(gamma1, beta1, mean1, var1, eps1)
        source, weight, q = (x, w1, p) if stash is None else (stash, None, p.given_u())
        if g:
            mean2, var2 = _second_pass(source, weight, w2, q, device, norm1, out)
            norm2 = Norm(gamma2, beta2, mean2, var2, eps2)
            launch_cheap(out, w2, q, device, norm=norm2, out=out)
        else:
            launch_primary(source, weight, q, device, norm=norm1, y=out)
            mean2, var2 = vectors(x, 0)
    kept = stash if keep_u and stash is not None else x.new_empty(0)
    return out, mean1, var1, mean2, var2, kept


def ghost_update_running_(
    running_mean1: Tensor | None,
    running_var1: Tensor | None,
    batches1: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    momentum1: float | None,
    running_mean2: Tensor | None,
    running_var2: Tensor | None,
    batches2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    momentum2: float | None,
    count: int,
) -> None:
    """Running statistics and batch counters of both batch norms, in one launch."""
    arguments: list[Any] = []
    for running_mean, running_var, batches, mean, var, momentum in (
        (running_mean1, running_var1, batches1, mean1, var1, momentum1),
        (running_mean2, running_var2, batches2, mean2, var2, momentum2),
    ):
        size = mean.numel()
        if running_mean is None or running_var is None or count == 0 or size == 0:
            running_mean = running_var = None
            momentum = 0.0
        else:
            check_vectors(running_mean, size, running_mean=running_mean, running_var=running_var)
            check_vectors(running_mean, size, mean=mean, var=var)
            if momentum is None and batches is None:
                raise RuntimeError("a momentum of None needs the counter of batches")
        arguments += [running_mean, running_var, batches, mean, var, momentum, size]
    unbiased = count / (count - 1) if count > 1 else 1.0
    with on_device(mean1):
        update_running_kernel[(2,)](*arguments, unbiased, B=_BLOCK, enable_fp_fusion=True)


def problem_of(
    x: Tensor, m: int, ratio: int, out_channels: int, d: int, stride: int, act1: int,
    slope1: float, act2: int, slope2: float, has_primary: bool,
) -> Problem:  # fmt: skip
    """The problem that x and the numbers are, checked."""
    check_numbers(x, m, ratio, out_channels, d, stride, act1, act2, has_primary)
    n, c, h, w = x.shape
    nhwc = memory_format(x) is torch.channels_last
    return Problem(
        n, c, h, w, m, ratio, out_channels, d, stride, act1, slope1, act2, slope2, nhwc, x.dtype,
        has_primary,
    )  # fmt: skip
