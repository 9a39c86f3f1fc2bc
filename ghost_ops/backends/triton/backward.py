"""The backward operator in Triton.

u is computed anew (unless it was saved) and y from it, both into scratch memory that dies with the
call, and so do dv and da, the gradients at the two batch norms. Launches, with ghost maps:

1. u and y;  2. the sums of batch norm 2;  3. dv and dw2;  4. da and the sums of batch norm 1;
5. dx and dw1. Where a program can own an image (``plan.passes``), 1 and 2 are one launch, and so
are 3 and 4: three in all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...eager_ops import memory_format
from . import tuning
from .checks import check_cheap, check_image, check_primary, check_vectors
from .forward import problem_of
from .forward_launches import launch_primary
from .kernels.cheap_backward import (
    cheap_gradient_kernel,
    cheap_sums_kernel,
    intrinsic_gradient_kernel,
)
from .kernels.fused_backward import fused_gradient_kernel, fused_sums_kernel
from .kernels.primary_backward import primary_gradient_kernel
from .launch import (
    NO_PARTIAL,
    Cut,
    Norm,
    Partial,
    device_of,
    maps,
    on_device,
    options,
    precision,
    vectors,
)
from .plan import Device, Problem, Tile, passes, power_of_two, rounded_up, weight_tile

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def ghost_backward(
    grad_out: Tensor,
    x: Tensor,
    u: Tensor | None,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    mean1: Tensor,
    var1: Tensor,
    eps1: float,
    w2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    eps2: float,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    batch_stats: bool,
    need_dx: bool,
    need_dw1: bool,
) -> _Gradients:
    """(dx, dw1, dgamma1, dbeta1, dw2, dgamma2, dbeta2)."""
    m = mean1.size(0)
    check_primary(w1, x, m, x.size(1))
    g, d = check_cheap(w2, x, m)
    check_vectors(x, m, gamma1=gamma1, beta1=beta1, mean1=mean1, var1=var1)
    check_vectors(x, g, gamma2=gamma2, beta2=beta2, mean2=mean2, var2=var2)
    p = problem_of(
        x, m, g // m + 1, grad_out.size(1), d, stride, act1, slope1, act2, slope2, w1 is not None
    )
    _check_gradient(grad_out, x, p)
    need_dw1 = need_dw1 and w1 is not None
    dx = torch.empty_like(x, memory_format=memory_format(x)) if need_dx else x.new_empty(0)
    dw1 = torch.empty_like(w1) if w1 is not None and need_dw1 else x.new_empty(0)
    dw2 = torch.empty_like(w2)
    dgamma1, dbeta1 = vectors(x, m)
    dgamma2, dbeta2 = vectors(x, g)
    if x.numel() == 0:
        for t in (dx, dw1, dgamma1, dbeta1, dw2, dgamma2, dbeta2):
            t.zero_()
        return dx, dw1, dgamma1, dbeta1, dw2, dgamma2, dbeta2

    device = device_of(x)
    norm1 = Norm(gamma1, beta1, mean1, var1, eps1)
    norm2 = Norm(gamma2, beta2, mean2, var2, eps2)
    with on_device(x):
        # Expanded, sliced and transposed gradients exist; a copy is dearer than a read.
        grad = grad_out.contiguous(memory_format=memory_format(x))
        source, weight, q = _source(x, u, w1, p)
        u = maps(x, p, m) if u is None and w1 is not None else source
        kept = u if u is not source else None
        if g and passes(p, device, stores_z=False).one_pass:
            both = (w2, grad, norm1, norm2)
            y = _fused_sums(source, weight, *both, q, device, kept, dbeta2, dgamma2)
            da = _fused_gradient(
                y, u, *both, p, device, batch_stats, dbeta1, dgamma1, dbeta2, dgamma2, dw2
            )
        elif g:
            y = maps(x, p, m)
            launch_primary(source, weight, q, device, norm=norm1, u=kept, y=y)
            _cheap_sums(y, w2, grad, norm2, p, device, dbeta2, dgamma2)
            dv = _cheap_gradient(y, w2, grad, norm2, p, device, dbeta2, dgamma2, batch_stats, dw2)
            da = _intrinsic_gradient(dv, w2, grad, u, norm1, p, device, dbeta1, dgamma1)
        else:
            if kept is not None:
                launch_primary(source, weight, q, device, u=kept)
            da = _intrinsic_gradient(None, w2, grad, u, norm1, p, device, dbeta1, dgamma1)
        if need_dx or need_dw1:
            _primary_gradient(
                da, u, x, w1, norm1, p, device, dbeta1, dgamma1, batch_stats,
                dx if need_dx else None, dw1 if need_dw1 else None,
            )  # fmt: skip
    return dx, dw1, dgamma1, dbeta1, dw2, dgamma2, dbeta2


def _check_gradient(grad_out: Tensor, x: Tensor, p: Problem) -> None:
    shape = (p.n, p.out_channels, p.ho, p.wo)
    if grad_out.shape != shape or grad_out.dtype is not x.dtype or grad_out.device != x.device:
        raise RuntimeError(
            f"grad_out must be {x.dtype} of shape {list(shape)} on {x.device}, got "
            f"{grad_out.dtype} of shape {list(grad_out.shape)} on {grad_out.device}"
        )


def _source(
    x: Tensor, u: Tensor | None, w1: Tensor | None, p: Problem
) -> tuple[Tensor, Tensor | None, Problem]:
    """What u is made from: x and w1, or u itself where it was saved or is x."""
    if u is not None:
        check_image("u", u)
        return u.contiguous(memory_format=memory_format(x)), None, p.given_u()
    return x, w1, p


def _fused_sums(
    x: Tensor, w1: Tensor | None, w2: Tensor, grad: Tensor, norm1: Norm, norm2: Norm, p: Problem,
    device: Device, u: Tensor | None, dbeta: Tensor, dgamma: Tensor,
) -> Tensor:  # fmt: skip
    """y; u, dbeta2 and dgamma2 are written."""
    y = maps(x, p, p.m)

    def launch(tile: Tile) -> None:
        blocks = math.ceil(p.m / tile.channels)
        (part,) = Partial.room(x, p.n, (blocks, 2 * p.g))
        fused_sums_kernel[(p.n * blocks,)](
            x, w1, *norm1, p.slope1, w2, *norm2, p.slope2, grad, u, y, part.data, part.counters,
            dbeta, dgamma, part.parts, p.h * p.w, p.w, p.out_pixels, p.ho, p.wo,
            C=p.c, M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size, S=p.stride, ACT1=p.act1,
            ACT2=p.act2, NHWC=p.nhwc, WIDE=p.wide, PREC=precision(x.dtype, device),
            BP=tile.pixels, BM=tile.channels, BK=tile.depth,
            TILES=rounded_up(math.ceil(p.out_pixels / tile.pixels)), FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("fused", p, device, launch, "sums")
    return y


def _fused_gradient(
    y: Tensor, u: Tensor, w2: Tensor, grad: Tensor, norm1: Norm, norm2: Norm, p: Problem,
    device: Device, batch_stats: bool, dbeta1: Tensor, dgamma1: Tensor, dbeta2: Tensor,
    dgamma2: Tensor, dw2: Tensor,
) -> Tensor:  # fmt: skip
    """da; dw2, dbeta1 and dgamma1 are written."""
    dv, da = maps(grad, p, p.g), maps(grad, p, p.m)

    def launch(tile: Tile) -> None:
        blocks = math.ceil(p.m / tile.channels)
        sums, taps = Partial.room(grad, p.n, (blocks, 2 * p.m), (blocks * p.r, w2.numel()))
        fused_gradient_kernel[(p.n * blocks,)](
            y, u, w2, grad, *norm1, p.slope1, *norm2, p.slope2, dbeta2, dgamma2, _per_value(p),
            dv, da, sums.data, sums.counters, dbeta1, dgamma1, taps.data, taps.counters, dw2,
            sums.parts, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size,
            TAPS=power_of_two(p.dw_size * p.dw_size), ACT1=p.act1, ACT2=p.act2, BATCH=batch_stats,
            NHWC=p.nhwc, WIDE=p.wide, BP=tile.pixels, BM=tile.channels,
            TILES=rounded_up(math.ceil(p.out_pixels / tile.pixels)), FAN=sums.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("fused_gradient", p, device, launch)
    return da


def _cheap_sums(
    y: Tensor, w2: Tensor, grad: Tensor, norm2: Norm, p: Problem, device: Device,
    dbeta: Tensor, dgamma: Tensor,
) -> None:  # fmt: skip
    def launch(tile: Tile) -> None:
        cut = Cut.of("cheap_sums", p, tile, device)
        blocks = math.ceil(p.g / tile.channels)
        (part,) = Partial.room(grad, cut.groups, (blocks, 2 * p.g))
        cheap_sums_kernel[(cut.groups * blocks,)](
            y, w2, grad, *norm2, p.slope2, part.data, part.counters, dbeta, dgamma,
            part.parts, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size, ACT=p.act2, NHWC=p.nhwc,
            WIDE=p.wide, BP=tile.pixels, BG=tile.channels, TILES=cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("cheap_sums", p, device, launch)


def _cheap_gradient(
    y: Tensor, w2: Tensor, grad: Tensor, norm2: Norm, p: Problem, device: Device,
    dbeta: Tensor, dgamma: Tensor, batch_stats: bool, dw2: Tensor,
) -> Tensor:  # fmt: skip
    """dv; dw2 is written."""
    dv = maps(grad, p, p.g)

    def launch(tile: Tile) -> None:
        cut = Cut.of("cheap_gradient", p, tile, device)
        blocks = math.ceil(p.g / tile.channels)
        (part,) = Partial.room(grad, cut.groups, (blocks, w2.numel()))
        cheap_gradient_kernel[(cut.groups * blocks,)](
            y, w2, grad, *norm2, p.slope2, dbeta, dgamma, dv, part.data, part.counters, dw2,
            _per_value(p), part.parts, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size,
            TAPS=power_of_two(p.dw_size * p.dw_size), ACT=p.act2, BATCH=batch_stats, NHWC=p.nhwc,
            WIDE=p.wide, BP=tile.pixels, BG=tile.channels, TILES=cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("cheap_gradient", p, device, launch)
    return dv


def _intrinsic_gradient(
    dv: Tensor | None, w2: Tensor, grad: Tensor, u: Tensor, norm1: Norm, p: Problem,
    device: Device, dbeta: Tensor, dgamma: Tensor,
) -> Tensor:  # fmt: skip
    """da; dbeta1 and dgamma1 are written."""
    da = maps(grad, p, p.m)

    def launch(tile: Tile) -> None:
        cut = Cut.of("intrinsic_gradient", p, tile, device)
        blocks = math.ceil(p.m / tile.channels)
        (part,) = Partial.room(grad, cut.groups, (blocks, 2 * p.m))
        intrinsic_gradient_kernel[(cut.groups * blocks,)](
            dv, w2, grad, u, *norm1, p.slope1, da, part.data, part.counters, dbeta, dgamma,
            part.parts, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, OUP=p.out_channels, R=p.r, D=p.dw_size, ACT=p.act1, NHWC=p.nhwc, WIDE=p.wide,
            BP=tile.pixels, BM=tile.channels, TILES=cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("intrinsic_gradient", p, device, launch)
    return da


def _primary_gradient(
    da: Tensor, u: Tensor, x: Tensor, w1: Tensor | None, norm1: Norm, p: Problem, device: Device,
    dbeta: Tensor, dgamma: Tensor, batch_stats: bool, dx: Tensor | None, dw1: Tensor | None,
) -> None:  # fmt: skip
    """Write dx and dw1, or one of them."""
    kind = "input_gradient" if dx is not None else "weight_gradient"

    def launch(tile: Tile) -> None:
        of_weight = weight_tile(p, tile, device) if dx is not None else tile
        cut = Cut.of("input_gradient", p, tile, device, map_pixels=p.h * p.w)
        weight_cut = Cut.of("weight_gradient", p, of_weight, device)
        blocks = math.ceil(p.m / of_weight.channels) * math.ceil(p.c / of_weight.depth)
        weight_programs, part = 0, NO_PARTIAL
        if dw1 is not None:
            weight_programs = weight_cut.groups * blocks
            (part,) = Partial.room(x, weight_cut.groups, (blocks, dw1.numel()))
        programs = 0 if dx is None else cut.groups * math.ceil(p.c / tile.channels)
        primary_gradient_kernel[(weight_programs + programs,)](
            da, u, x, w1, norm1.gamma, norm1.mean, norm1.var, norm1.eps, dbeta, dgamma,
            _per_value(p), dx, part.data, part.counters, dw1, weight_programs, part.parts,
            cut.pixels, weight_cut.pixels, p.h * p.w, p.w, p.out_pixels, p.wo,
            C=p.c, M=p.m, S=p.stride, BATCH=batch_stats, NHWC=p.nhwc, WIDE=p.wide,
            PREC=precision(x.dtype, device),
            BP=tile.pixels, BC=tile.channels, BK=tile.depth, TILES=cut.tiles,
            W_BP=of_weight.pixels, W_BM=of_weight.channels, W_BC=of_weight.depth,
            W_TILES=weight_cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run(kind, p, device, launch, "both" if dx is not None and dw1 is not None else "")


def _per_value(p: Problem) -> float:
    """One over the number of values that a channel's statistics are of."""
    return 1.0 / (p.n * p.out_pixels)
