"""The backward operator in Triton.

u is computed anew (unless it was saved) and y from it, both into scratch memory that dies with the
call, and so do dv and da, the gradients at the two batch norms. Launches, with ghost maps and batch
statistics: u and y; sums of batch norm 2 and their fold; dv and dw2, and its fold; da and the sums
of batch norm 1, and their fold; dx; dw1 and its fold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...eager_ops import memory_format
from . import tuning
from .checks import check_cheap, check_image, check_primary, check_vectors
from .forward import launch_primary, problem_of
from .kernels.cheap_backward import (
    cheap_gradient_kernel,
    cheap_sums_kernel,
    intrinsic_gradient_kernel,
)
from .kernels.primary_backward import input_gradient_kernel, weight_gradient_kernel
from .launch import (
    Cut,
    Norm,
    Partial,
    device_of,
    fold_sums,
    maps,
    on_device,
    options,
    precision,
    vectors,
)
from .plan import Device, Problem, Tile, power_of_two

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
        grad_out = grad_out.contiguous(memory_format=memory_format(x))
        u, y = _recompute(x, u, w1, norm1, p, device)
        if g:
            _cheap_sums(y, w2, grad_out, norm2, p, device, dbeta2, dgamma2)
            dv = _cheap_gradient(
                y, w2, grad_out, norm2, p, device, dbeta2, dgamma2, batch_stats, dw2
            )
        else:
            dv = None
        da = _intrinsic_gradient(dv, w2, grad_out, u, norm1, p, device, dbeta1, dgamma1)
        after = (norm1, p, device, dbeta1, dgamma1, batch_stats)
        if need_dx:
            _input_gradient(da, u, w1, *after, dx)
        if need_dw1:
            _weight_gradient(da, u, x, *after, dw1)
    return dx, dw1, dgamma1, dbeta1, dw2, dgamma2, dbeta2


def _check_gradient(grad_out: Tensor, x: Tensor, p: Problem) -> None:
    shape = (p.n, p.out_channels, p.ho, p.wo)
    if grad_out.shape != shape or grad_out.dtype is not x.dtype or grad_out.device != x.device:
        raise RuntimeError(
            f"grad_out must be {x.dtype} of shape {list(shape)} on {x.device}, got "
            f"{grad_out.dtype} of shape {list(grad_out.shape)} on {grad_out.device}"
        )


def _recompute(
    x: Tensor, u: Tensor | None, w1: Tensor | None, norm1: Norm, p: Problem, device: Device
) -> tuple[Tensor, Tensor | None]:
    """(u, y); y is None where no ghost map reads it."""
    y = maps(x, p, p.m) if p.g else None
    if u is None and w1 is None:
        u = x
    if u is None:
        u = maps(x, p, p.m)
        launch_primary(x, w1, p, device, norm=norm1, u=u, y=y)
    else:
        check_image("u", u)
        u = u.contiguous(memory_format=memory_format(x))
        if y is not None:
            launch_primary(u, None, p.given_u(), device, norm=norm1, y=y)
    return u, y


def _cheap_sums(
    y: Tensor | None, w2: Tensor, grad: Tensor, norm2: Norm, p: Problem, device: Device,
    dbeta: Tensor, dgamma: Tensor,
) -> None:  # fmt: skip
    def launch(tile: Tile) -> Partial:
        cut = Cut.of("cheap_sums", p, tile, device)
        (part,) = vectors(grad, 2 * cut.groups * p.g, 1)
        cheap_sums_kernel[(cut.groups * math.ceil(p.g / tile.channels),)](
            y, w2, grad, *norm2, p.slope2, part, cut.groups, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size, ACT=p.act2, NHWC=p.nhwc,
            WIDE=p.wide, BP=tile.pixels, BG=tile.channels, TILES=cut.tiles,
            **options(tile),
        )  # fmt: skip
        return Partial(part, cut.groups)

    fold_sums(tuning.run("cheap_sums", p, device, launch), dbeta, dgamma)


def _cheap_gradient(
    y: Tensor | None, w2: Tensor, grad: Tensor, norm2: Norm, p: Problem, device: Device,
    dbeta: Tensor, dgamma: Tensor, batch_stats: bool, dw2: Tensor,
) -> Tensor:  # fmt: skip
    """dv; dw2 is written."""
    dv = maps(grad, p, p.g)

    def launch(tile: Tile) -> Partial:
        cut = Cut.of("cheap_gradient", p, tile, device)
        (part,) = vectors(grad, cut.groups * w2.numel(), 1)
        cheap_gradient_kernel[(cut.groups * math.ceil(p.g / tile.channels),)](
            y, w2, grad, *norm2, p.slope2, dbeta, dgamma, dv, part, _per_value(p),
            cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size,
            TAPS=power_of_two(p.dw_size * p.dw_size), ACT=p.act2, BATCH=batch_stats, NHWC=p.nhwc,
            WIDE=p.wide, BP=tile.pixels, BG=tile.channels, TILES=cut.tiles,
            **options(tile),
        )  # fmt: skip
        return Partial(part, cut.groups)

    fold_sums(tuning.run("cheap_gradient", p, device, launch), dw2)
    return dv


def _intrinsic_gradient(
    dv: Tensor | None, w2: Tensor, grad: Tensor, u: Tensor, norm1: Norm, p: Problem,
    device: Device, dbeta: Tensor, dgamma: Tensor,
) -> Tensor:  # fmt: skip
    """da; dbeta and dgamma are written."""
    da = maps(grad, p, p.m)

    def launch(tile: Tile) -> Partial:
        cut = Cut.of("intrinsic_gradient", p, tile, device)
        (part,) = vectors(grad, 2 * cut.groups * p.m, 1)
        intrinsic_gradient_kernel[(cut.groups * math.ceil(p.m / tile.channels),)](
            dv, w2, grad, u, *norm1, p.slope1, da, part,
            cut.groups, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, OUP=p.out_channels, R=p.r, D=p.dw_size, ACT=p.act1, NHWC=p.nhwc, WIDE=p.wide,
            BP=tile.pixels, BM=tile.channels, TILES=cut.tiles,
            **options(tile),
        )  # fmt: skip
        return Partial(part, cut.groups)

    fold_sums(tuning.run("intrinsic_gradient", p, device, launch), dbeta, dgamma)
    return da


def _input_gradient(
    da: Tensor, u: Tensor, w1: Tensor | None, norm1: Norm, p: Problem, device: Device,
    dbeta: Tensor, dgamma: Tensor, batch_stats: bool, dx: Tensor,
) -> None:  # fmt: skip
    def launch(tile: Tile) -> None:
        cut = Cut.of("input_gradient", p, tile, device, map_pixels=p.h * p.w)
        input_gradient_kernel[(cut.groups * math.ceil(p.c / tile.channels),)](
            da, u, w1, norm1.gamma, norm1.mean, norm1.var, norm1.eps, dbeta, dgamma, _per_value(p),
            dx, cut.pixels, p.h * p.w, p.w, p.out_pixels, p.wo,
            C=p.c, M=p.m, S=p.stride, BATCH=batch_stats, NHWC=p.nhwc, WIDE=p.wide,
            PREC=precision(dx.dtype, device),
            BP=tile.pixels, BC=tile.channels, BK=tile.depth, TILES=cut.tiles,
            **options(tile),
        )  # fmt: skip

    tuning.run("input_gradient", p, device, launch)


def _weight_gradient(
    da: Tensor, u: Tensor, x: Tensor, norm1: Norm, p: Problem, device: Device,
    dbeta: Tensor, dgamma: Tensor, batch_stats: bool, dw1: Tensor,
) -> None:  # fmt: skip
    def launch(tile: Tile) -> Partial:
        cut = Cut.of("weight_gradient", p, tile, device)
        (part,) = vectors(x, cut.groups * dw1.numel(), 1)
        blocks = math.ceil(p.m / tile.channels) * math.ceil(p.c / tile.depth)
        weight_gradient_kernel[(cut.groups * blocks,)](
            da, u, x, norm1.gamma, norm1.mean, norm1.var, norm1.eps, dbeta, dgamma, _per_value(p),
            part, cut.pixels, p.h * p.w, p.w, p.out_pixels, p.wo,
            C=p.c, M=p.m, S=p.stride, BATCH=batch_stats, NHWC=p.nhwc, WIDE=p.wide,
            PREC=precision(x.dtype, device),
            BP=tile.pixels, BM=tile.channels, BC=tile.depth, TILES=cut.tiles,
            **options(tile),
        )  # fmt: skip
        return Partial(part, cut.groups)

    fold_sums(tuning.run("weight_gradient", p, device, launch), dw1)


def _per_value(p: Problem) -> float:
    """One over the number of values that a channel's statistics are of."""
    return 1.0 / (p.n * p.out_pixels)
