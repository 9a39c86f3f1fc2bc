"""The backward operator in Triton.

u is computed anew (unless it was saved) and y from it, both into scratch memory that dies with the
call, and so do dv and da, the gradients at the two batch norms. Launches, with ghost maps:

1. u and y;  2. the sums of batch norm 2;  3. dv and dw2;  4. da and the sums of batch norm 1;
5. dx and dw1. Where a program can own an image (``plan.passes``), 1 and 2 are one launch, and so
are 3 and 4: three in all. What only gradients that are not needed would read is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...activations import PRELU
from ...conventions import NEEDS, memory_format
from . import tuning
from .checks import (
    check_cheap,
    check_image,
    check_means,
    check_primary,
    check_slopes,
    check_vectors,
)
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

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Sums(NamedTuple):
    """The sums that a batch norm's gradient needs, or means; None: constant statistics.

    Attributes:
        beta, gamma: sums of the gradient at the norm's output, and of its product with the
            normalised input: dbeta and dgamma. [channels]
        per_value: what makes a mean of a sum, 1 for means.
        slope: sums of a PReLU's slope gradient, or None. [channels]
    """

    beta: Tensor | None = None
    gamma: Tensor | None = None
    per_value: float = 1.0
    slope: Tensor | None = None

    @classmethod
    def room(cls, x: Tensor, channels: int, p: Problem, prelu: bool) -> Sums:
        """Of this batch, to be written by a launch."""
        beta, gamma, *slope = vectors(x, channels, 2 + prelu)
        return cls(beta, gamma, 1.0 / max(p.n * p.out_pixels, 1), slope[0] if prelu else None)

    @classmethod
    def of_means(cls, means: Tensor) -> Sums:
        """Given means [2, channels]."""
        return cls(means[0], means[1])

    @property
    def kinds(self) -> int:
        """Vectors that a launch sums up."""
        return 2 if self.slope is None else 3


@dataclass(frozen=True)
class Layers:
    """What every launch of a backward reads; ``slopes``: one number, or a PReLU's [channels]."""

    p: Problem
    device: Device
    norm1: Norm
    norm2: Norm
    slopes1: float | Tensor
    slopes2: float | Tensor
    w2: Tensor
    grad: Tensor  # [N, out_channels, Ho, Wo] in the layout of x
    batch1: bool
    batch2: bool


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
    prelu1: Tensor | None,
    means1: Tensor | None,
    w2: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor,
    var2: Tensor,
    eps2: float,
    prelu2: Tensor | None,
    means2: Tensor | None,
    stride: int,
    act1: int,
    slope1: float,
    act2: int,
    slope2: float,
    batch_stats1: bool,
    batch_stats2: bool,
    needs: int,
) -> _Gradients:
    """(dx, dw1, dgamma1, dbeta1, dprelu1, dw2, dgamma2, dbeta2, dprelu2); empty if not needed."""
    m = mean1.size(0)
    check_primary(w1, x, m, x.size(1))
    g, d = check_cheap(w2, x, m)
    check_vectors(x, m, gamma1=gamma1, beta1=beta1, mean1=mean1, var1=var1)
    check_vectors(x, g, gamma2=gamma2, beta2=beta2, mean2=mean2, var2=var2)
    check_slopes(x, act1, m, prelu1=prelu1)
    check_slopes(x, act2, g, prelu2=prelu2)
    check_means(x, m, batch_stats1, means1=means1)
    check_means(x, g, batch_stats2, means2=means2)
    p = problem_of(
        x, m, g // m + 1, grad_out.size(1), d, stride, act1, slope1, act2, slope2, w1 is not None,
        prelu=True,
    )  # fmt: skip
    _check_gradient(grad_out, x, p)

    def needed(what: int) -> bool:
        return bool(needs & what)

    def room(like: Tensor | None, what: int) -> Tensor:
        if like is None or not needed(what):
            return x.new_empty(0)
        return torch.empty_like(like, memory_format=memory_format(like))

    dx, dw1, dw2 = room(x, NEEDS.DX), room(w1, NEEDS.DW1), room(w2, NEEDS.DW2)
    want1 = needed(NEEDS.PRELU1) and act1 == PRELU
    want2 = needed(NEEDS.PRELU2) and act2 == PRELU
    sums1, sums2 = Sums.room(x, m, p, want1), Sums.room(x, g, p, want2)

    def gradients() -> _Gradients:
        found: list[Tensor] = []
        for sums, norm in ((sums1, NEEDS.NORM1), (sums2, NEEDS.NORM2)):
            pair = (sums.gamma, sums.beta) if needed(norm) else (None, None)
            found += [vectors(x, 0, 1)[0] if t is None else t for t in (*pair, sums.slope)]
        return dx, dw1, *found[:3], dw2, *found[3:]  # type: ignore[return-value]

    if x.numel() == 0:
        for t in (dx, dw1, dw2, *(t for s in (sums1, sums2) for t in s if isinstance(t, Tensor))):
            t.zero_()
        return gradients()

    product = dx.numel() + dw1.numel() > 0
    of_y = product or needed(NEEDS.NORM1) or want1
    of_v = g > 0 and (of_y or needed(NEEDS.DW2))
    own2 = g > 0 and (needed(NEEDS.NORM2) or want2 or (of_v and batch_stats2 and means2 is None))
    own1 = needed(NEEDS.NORM1) or want1 or (product and batch_stats1 and means1 is None)
    if not (own2 or of_v or of_y):
        return gradients()
    read1 = sums1 if means1 is None else Sums.of_means(means1)
    read2 = sums2 if means2 is None else Sums.of_means(means2)
    device = device_of(x)
    with on_device(x):
        # Expanded, sliced and transposed gradients exist; a copy is dearer than a read.
        grad = grad_out.contiguous(memory_format=memory_format(x))
        layers = Layers(
            p, device, Norm(gamma1, beta1, mean1, var1, eps1),
            Norm(gamma2, beta2, mean2, var2, eps2), slope1 if prelu1 is None else prelu1,
            slope2 if prelu2 is None else prelu2, w2, grad, batch_stats1, batch_stats2,
        )  # fmt: skip
        source, weight, q = _source(x, u, w1, p)
        u = maps(x, p, m) if u is None and w1 is not None and of_y else source
        kept = u if u is not source else None
        one_pass = g > 0 and passes(p, device, stores_z=False).one_pass
        y = None
        if own2 and one_pass:
            y = _fused_sums(source, weight, q, layers, kept, sums2)
        elif own2 or of_v:
            y = maps(x, p, m)
            launch_primary(source, weight, q, device, norm=layers.norm1, u=kept, y=y, prelu=prelu1)
            if own2:
                _cheap_sums(y, layers, sums2)
        elif kept is not None:
            launch_primary(source, weight, q, device, u=kept)
        da = None
        if y is not None and of_y and one_pass:
            da = _fused_gradient(
                y, u, layers, read2, product, sums1 if own1 else None,
                dw2 if needed(NEEDS.DW2) else None,
            )  # fmt: skip
        else:
            dv = None
            if y is not None and of_v:
                dv = _cheap_gradient(y, layers, read2, of_y, dw2 if needed(NEEDS.DW2) else None)
            if of_y:
                da = _intrinsic_gradient(dv, u, layers, product, sums1 if own1 else None)
        if da is not None:
            _primary_gradient(
                da, u, x, w1, layers, read1, dx if needed(NEEDS.DX) else None,
                dw1 if dw1.numel() else None,
            )  # fmt: skip
    return gradients()


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
    x: Tensor, w1: Tensor | None, p: Problem, layers: Layers, u: Tensor | None, sums: Sums
) -> Tensor:
    """y of p, which is the problem with u given or without; u and the sums are written."""
    y, device = maps(x, p, p.m), layers.device

    def launch(tile: Tile) -> None:
        blocks = math.ceil(p.m / tile.channels)
        (part,) = Partial.room(x, p.n, (blocks, sums.kinds * p.g))
        fused_sums_kernel[(p.n * blocks,)](
            x, w1, *layers.norm1, layers.slopes1, layers.w2, *layers.norm2, layers.slopes2,
            layers.grad, u, y, part.data, part.counters, sums.beta, sums.gamma, sums.slope,
            part.parts, p.h * p.w, p.w, p.out_pixels, p.ho, p.wo,
            C=p.c, M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size, S=p.stride, ACT1=p.act1,
            ACT2=p.act2, NHWC=p.nhwc, WIDE=p.wide, PREC=precision(x.dtype, device),
            BP=tile.pixels, BM=tile.channels, BK=tile.depth,
            TILES=rounded_up(math.ceil(p.out_pixels / tile.pixels)), FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("fused", p, device, launch, "sums")
    return y


def _fused_gradient(
    y: Tensor, u: Tensor, layers: Layers, read: Sums, stores: bool, sums: Sums | None,
    dw2: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """da, if it is to be stored; the sums of batch norm 1 and dw2 are written."""
    p, w2, grad = layers.p, layers.w2, layers.grad
    dv, da = maps(grad, p, p.g), maps(grad, p, p.m) if stores else None
    found = sums or Sums()

    def launch(tile: Tile) -> None:
        blocks = math.ceil(p.m / tile.channels)
        needs = [] if sums is None else [(blocks, sums.kinds * p.m)]
        needs += [] if dw2 is None else [(blocks * p.r, w2.numel())]
        rooms = Partial.room(grad, p.n, *needs) if needs else ()
        part = NO_PARTIAL if sums is None else rooms[0]
        taps = NO_PARTIAL if dw2 is None else rooms[-1]
        fused_gradient_kernel[(p.n * blocks,)](
            y, u, w2, grad, *layers.norm1, layers.slopes1, *layers.norm2, layers.slopes2,
            read.beta, read.gamma, read.per_value, dv, da, part.data, part.counters,
            found.beta, found.gamma, found.slope, taps.data, taps.counters, dw2,
            p.n, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size,
            TAPS=power_of_two(p.dw_size * p.dw_size), ACT1=p.act1, ACT2=p.act2,
            BATCH=layers.batch2, NHWC=p.nhwc, WIDE=p.wide, BP=tile.pixels, BM=tile.channels,
            TILES=rounded_up(math.ceil(p.out_pixels / tile.pixels)),
            FAN=(rooms[0] if rooms else NO_PARTIAL).fan, **options(tile),
        )  # fmt: skip

    tuning.run("fused_gradient", p, layers.device, launch, _variant(weights=dw2, sums=sums, da=da))
    return da


def _cheap_sums(y: Tensor, layers: Layers, sums: Sums) -> None:
    p, grad = layers.p, layers.grad

    def launch(tile: Tile) -> None:
        cut = Cut.of("cheap_sums", p, tile, layers.device)
        blocks = math.ceil(p.g / tile.channels)
        (part,) = Partial.room(grad, cut.groups, (blocks, sums.kinds * p.g))
        cheap_sums_kernel[(cut.groups * blocks,)](
            y, layers.w2, grad, *layers.norm2, layers.slopes2, part.data, part.counters,
            sums.beta, sums.gamma, sums.slope, part.parts, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size, ACT=p.act2, NHWC=p.nhwc,
            WIDE=p.wide, BP=tile.pixels, BG=tile.channels, TILES=cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("cheap_sums", p, layers.device, launch)


def _cheap_gradient(
    y: Tensor, layers: Layers, read: Sums, stores: bool, dw2: Tensor | None
) -> Tensor | None:
    """dv, if it is to be stored; dw2 is written."""
    p, w2, grad = layers.p, layers.w2, layers.grad
    dv = maps(grad, p, p.g) if stores else None

    def launch(tile: Tile) -> None:
        cut = Cut.of("cheap_gradient", p, tile, layers.device)
        blocks = math.ceil(p.g / tile.channels)
        part = NO_PARTIAL
        if dw2 is not None:
            (part,) = Partial.room(grad, cut.groups, (blocks, w2.numel()))
        cheap_gradient_kernel[(cut.groups * blocks,)](
            y, w2, grad, *layers.norm2, layers.slopes2, read.beta, read.gamma, dv, part.data,
            part.counters, dw2, read.per_value, part.parts, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, OUP=p.out_channels, R=p.r, D=p.dw_size,
            TAPS=power_of_two(p.dw_size * p.dw_size), ACT=p.act2, BATCH=layers.batch2,
            NHWC=p.nhwc, WIDE=p.wide, BP=tile.pixels, BG=tile.channels, TILES=cut.tiles,
            FAN=part.fan, **options(tile),
        )  # fmt: skip

    tuning.run("cheap_gradient", p, layers.device, launch, _variant(weights=dw2, dv=dv))
    return dv


def _intrinsic_gradient(
    dv: Tensor | None, u: Tensor, layers: Layers, stores: bool, sums: Sums | None
) -> Tensor | None:
    """da, if it is to be stored; the sums of batch norm 1 are written."""
    p, grad = layers.p, layers.grad
    da = maps(grad, p, p.m) if stores else None
    found = sums or Sums()

    def launch(tile: Tile) -> None:
        cut = Cut.of("intrinsic_gradient", p, tile, layers.device)
        blocks = math.ceil(p.m / tile.channels)
        part = NO_PARTIAL
        if sums is not None:
            (part,) = Partial.room(grad, cut.groups, (blocks, sums.kinds * p.m))
        intrinsic_gradient_kernel[(cut.groups * blocks,)](
            dv, layers.w2, grad, u, *layers.norm1, layers.slopes1, da, part.data, part.counters,
            found.beta, found.gamma, found.slope, part.parts, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, OUP=p.out_channels, R=p.r, D=p.dw_size, ACT=p.act1, NHWC=p.nhwc, WIDE=p.wide,
            BP=tile.pixels, BM=tile.channels, TILES=cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run("intrinsic_gradient", p, layers.device, launch, _variant(sums=sums, da=da))
    return da


def _primary_gradient(
    da: Tensor, u: Tensor, x: Tensor, w1: Tensor | None, layers: Layers, read: Sums,
    dx: Tensor | None, dw1: Tensor | None,
) -> None:  # fmt: skip
    """Write dx and dw1, or one of them."""
    p, device, norm1 = layers.p, layers.device, layers.norm1
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
            da, u, x, w1, norm1.gamma, norm1.mean, norm1.var, norm1.eps, read.beta, read.gamma,
            read.per_value, dx, part.data, part.counters, dw1, weight_programs, part.parts,
            cut.pixels, weight_cut.pixels, p.h * p.w, p.w, p.out_pixels, p.wo,
            C=p.c, M=p.m, S=p.stride, BATCH=layers.batch1, NHWC=p.nhwc, WIDE=p.wide,
            PREC=precision(x.dtype, device),
            BP=tile.pixels, BC=tile.channels, BK=tile.depth, TILES=cut.tiles,
            W_BP=of_weight.pixels, W_BM=of_weight.channels, W_BC=of_weight.depth,
            W_TILES=weight_cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip

    tuning.run(kind, p, device, launch, "both" if dx is not None and dw1 is not None else "")


def _variant(**wanted: object) -> str:
    """The name of a kernel that leaves out what is None."""
    return " ".join(f"no {name}" for name, value in wanted.items() if value is None)
