"""The backward operator in Triton.

u (unless it was saved), y, dv and da are computed into scratch memory that is freed after the call;
dv is the gradient at the input of batch norm 2, da at the output of batch norm 1. Launches, with
ghost maps:

1. u and y;  2. the sums of batch norm 2;  3. dv and dw2;  4. da and the sums of batch norm 1;
5. dx and dw1. If ``plan.passes`` lets a program own an image, 1 and 2 are one launch, and 3 and 4
are one launch: three in all. A launch is omitted if no needed gradient depends on its results.
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
from .forward import either, problem_of
from .forward_launches import launch_primary
from .kernels.cheap_backward import (
    cheap_gradient_kernel,
    cheap_sums_kernel,
    intrinsic_gradient_kernel,
)
from .kernels.fused_backward import fused_gradient_kernel, fused_sums_kernel
from .kernels.primary_backward import primary_gradient_kernel
from .launch import (
    NO_ROWS,
    Blocks,
    Cut,
    Norm,
    Rows,
    Shape,
    Size,
    cheap_constants,
    device_of,
    maps,
    on_device,
    options,
    vectors,
)
from .plan import Device, Problem, Tile, passes, power_of_two, rounded_up, weight_tile

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Sums(NamedTuple):
    """The sums (or means) that a batch norm's gradient needs; None with constant statistics.

    Attributes:
        beta, gamma: sums of the gradient at the norm's output, and of its product with the
            normalised input: dbeta and dgamma. [channels]
        per_value: the factor from a sum to a mean; 1 if beta and gamma are means.
        slope: sums of a PReLU's slope gradient, or None. [channels]
    """

    beta: Tensor | None = None
    gamma: Tensor | None = None
    per_value: float = 1.0
    slope: Tensor | None = None

    @classmethod
    def room(cls, x: Tensor, channels: int, p: Problem, prelu: bool) -> Sums:
        """Uninitialised memory for the sums of this batch; a launch writes them."""
        beta, gamma, *slope = vectors(x, channels, 2 + prelu)
        return cls(beta, gamma, 1.0 / max(p.n * p.out_pixels, 1), slope[0] if prelu else None)

    @classmethod
    def of_means(cls, means: Tensor) -> Sums:
        """The given means [2, channels]."""
        return cls(means[0], means[1])

    @property
    def kinds(self) -> int:
        """Number of vectors that a launch sums."""
        return 2 if self.slope is None else 3


@dataclass(frozen=True)
class Layers:
    """The problem and the tensors that every launch of a backward reads."""

    p: Problem
    device: Device
    norm1: Norm
    norm2: Norm
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
    sizes, acts = (m, g // m + 1, grad_out.size(1), d, stride), (act1, slope1, act2, slope2)
    p = problem_of(x, *sizes, *acts, w1 is not None, prelu=True)
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
    read1 = sums1._replace(slope=None) if means1 is None else Sums.of_means(means1)
    read2 = sums2._replace(slope=None) if means2 is None else Sums.of_means(means2)
    device = device_of(x)
    with on_device(x):
        # Copies only an expanded, sliced or transposed gradient.
        grad = grad_out.contiguous(memory_format=memory_format(x))
        norm1 = Norm(gamma1, beta1, mean1, var1, eps1, either(slope1, prelu1))
        norm2 = Norm(gamma2, beta2, mean2, var2, eps2, either(slope2, prelu2))
        layers = Layers(p, device, norm1, norm2, w2, grad, batch_stats1, batch_stats2)
        source, weight, q = _source(x, u, w1, p)
        u = maps(x, p, m) if u is None and w1 is not None and of_y else source
        kept = u if u is not source else None
        one_pass = g > 0 and passes(p, device, stores_z=False).one_pass
        y = None
        if own2 and one_pass:
            y = _fused_sums(source, weight, q, layers, kept, sums2)
        elif own2 or of_v:
            y = maps(x, p, m)
            launch_primary(source, weight, q, device, norm=norm1, u=kept, y=y)
            if own2:
                _cheap_sums(y, layers, sums2)
        elif kept is not None:
            launch_primary(source, weight, q, device, u=kept)
        da = None
        written1 = sums1 if own1 else None
        needed_dw2 = dw2 if needed(NEEDS.DW2) else None
        if y is not None and of_y and one_pass:
            da = _fused_gradient(y, u, layers, read2, product, written1, needed_dw2)
        else:
            dv = None
            if y is not None and of_v:
                dv = _cheap_gradient(y, layers, read2, of_y, needed_dw2)
            if of_y:
                da = _intrinsic_gradient(dv, u, layers, product, written1)
        if da is not None:
            results = dx if needed(NEEDS.DX) else None, dw1 if dw1.numel() else None
            _primary_gradient(da, u, x, w1, layers, read1, *results)
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
    """(x, w1, p) from which u is recomputed, or (u, None, p of u) if u was saved."""
    if u is not None:
        check_image("u", u)
        return u.contiguous(memory_format=memory_format(x)), None, p.given_u()
    return x, w1, p


def _fused_sums(
    x: Tensor, w1: Tensor | None, p: Problem, layers: Layers, u: Tensor | None, sums: Sums
) -> Tensor:
    """Returns y; writes u, if it is not None, and the sums of batch norm 2.

    x, w1, p: as ``_source`` returns them.
    """
    y, device, n1, n2 = maps(x, p, p.m), layers.device, layers.norm1, layers.norm2
    w2, grad, acts = layers.w2, layers.grad, {"ACT1": p.act1, "ACT2": p.act2}
    shape = Shape.primary(p, x, device, Y_CH=p.m, **cheap_constants(p), **acts)

    def launch(tile: Tile) -> None:
        blocks, tiles = math.ceil(p.m / tile.channels), math.ceil(p.out_pixels / tile.pixels)
        (part,) = Rows.room(x, p.n, (blocks, sums.kinds * p.g))
        size, constants = Size.of(p, p.out_pixels), Blocks.of(tile, rounded_up(tiles), part)
        fused_sums_kernel[(p.n * blocks,)](
            x, w1, n1, w2, n2, grad, u, y, part, sums, size, shape, constants, **options(tile)
        )

    tuning.run("fused", p, device, launch, "sums")
    return y


def _gradient_shape(layers: Layers, dw2: Tensor | None, **more: int) -> Shape:
    """Constants of the kernels that compute dv and dw2."""
    p = layers.p
    taps, flags = power_of_two(p.dw_size**2), {"BATCH": layers.batch2, "WEIGHTS": dw2 is not None}
    return Shape.cheap(p, Y_CH=p.m, ACT2=p.act2, TAPS=taps, **flags, **more)


def _fused_gradient(
    y: Tensor,
    u: Tensor,
    layers: Layers,
    read: Sums,
    stores: bool,
    sums: Sums | None,
    dw2: Tensor | None,
) -> Tensor | None:
    """Returns da if ``stores``; writes the sums of batch norm 1 and dw2."""
    p, w2, grad, n1, n2 = layers.p, layers.w2, layers.grad, layers.norm1, layers.norm2
    dv, da = maps(grad, p, p.g), maps(grad, p, p.m) if stores else None
    found, shape = sums or Sums(), _gradient_shape(layers, dw2, ACT1=p.act1)

    def launch(tile: Tile) -> None:
        blocks, tiles = math.ceil(p.m / tile.channels), math.ceil(p.out_pixels / tile.pixels)
        needs = [] if sums is None else [(blocks, sums.kinds * p.m)]
        needs += [] if dw2 is None else [(blocks * p.ghosts_per_map, w2.numel())]
        rooms = Rows.room(grad, p.n, *needs) if needs else ()
        part = NO_ROWS if sums is None else rooms[0]
        taps = NO_ROWS if dw2 is None else rooms[-1]
        size = Size.of(p, p.out_pixels, False)
        constants = Blocks.of(tile, rounded_up(tiles), rooms[0] if rooms else NO_ROWS)
        results = dv, da, part, found, taps, dw2
        fused_gradient_kernel[(p.n * blocks,)](
            y, u, w2, grad, n1, n2, read, *results, size, shape, constants, **options(tile)
        )

    tuning.run("fused_gradient", p, layers.device, launch, _variant(weights=dw2, sums=sums, da=da))
    return da


def _cheap_sums(y: Tensor, layers: Layers, sums: Sums) -> None:
    """Writes the sums of batch norm 2."""
    p, w2, grad, norm = layers.p, layers.w2, layers.grad, layers.norm2
    shape = Shape.cheap(p, Y_CH=p.m, ACT2=p.act2)

    def launch(tile: Tile) -> None:
        cut = Cut.of("cheap_sums", p, tile, layers.device)
        blocks = math.ceil(p.g / tile.channels)
        (part,) = Rows.room(grad, cut.groups, (blocks, sums.kinds * p.g))
        size, constants = Size.of(p, cut.pixels, False), Blocks.of(tile, cut.tiles, part)
        cheap_sums_kernel[(cut.groups * blocks,)](
            y, w2, grad, norm, part, sums, size, shape, constants, **options(tile)
        )

    tuning.run("cheap_sums", p, layers.device, launch)


def _cheap_gradient(
    y: Tensor, layers: Layers, read: Sums, stores: bool, dw2: Tensor | None
) -> Tensor | None:
    """Returns dv if ``stores``; writes dw2."""
    p, w2, grad, norm = layers.p, layers.w2, layers.grad, layers.norm2
    dv = maps(grad, p, p.g) if stores else None
    shape = _gradient_shape(layers, dw2)

    def launch(tile: Tile) -> None:
        cut = Cut.of("cheap_gradient", p, tile, layers.device)
        blocks = math.ceil(p.g / tile.channels)
        part = NO_ROWS
        if dw2 is not None:
            (part,) = Rows.room(grad, cut.groups, (blocks, w2.numel()))
        size, constants = Size.of(p, cut.pixels, False), Blocks.of(tile, cut.tiles, part)
        cheap_gradient_kernel[(cut.groups * blocks,)](
            y, w2, grad, norm, read, dv, part, dw2, size, shape, constants, **options(tile)
        )

    tuning.run("cheap_gradient", p, layers.device, launch, _variant(weights=dw2, dv=dv))
    return dv


def _intrinsic_gradient(
    dv: Tensor | None, u: Tensor, layers: Layers, stores: bool, sums: Sums | None
) -> Tensor | None:
    """Returns da if ``stores``; writes the sums of batch norm 1."""
    p, w2, grad, norm = layers.p, layers.w2, layers.grad, layers.norm1
    da = maps(grad, p, p.m) if stores else None
    found, shape = sums or Sums(), Shape.cheap(p, ACT1=p.act1)

    def launch(tile: Tile) -> None:
        cut = Cut.of("intrinsic_gradient", p, tile, layers.device)
        blocks = math.ceil(p.m / tile.channels)
        part = NO_ROWS
        if sums is not None:
            (part,) = Rows.room(grad, cut.groups, (blocks, sums.kinds * p.m))
        size, constants = Size.of(p, cut.pixels, False), Blocks.of(tile, cut.tiles, part)
        intrinsic_gradient_kernel[(cut.groups * blocks,)](
            dv, w2, grad, u, norm, da, part, found, size, shape, constants, **options(tile)
        )

    tuning.run("intrinsic_gradient", p, layers.device, launch, _variant(sums=sums, da=da))
    return da


def _primary_gradient(
    da: Tensor,
    u: Tensor,
    x: Tensor,
    w1: Tensor | None,
    layers: Layers,
    read: Sums,
    dx: Tensor | None,
    dw1: Tensor | None,
) -> None:
    """Writes dx and dw1, or one of them."""
    p, device = layers.p, layers.device
    norm = layers.norm1._replace(beta=None, slope=0.0)
    kind = "input_gradient" if dx is not None else "weight_gradient"
    shape = Shape.primary(p, x, device, BATCH=layers.batch1)

    def launch(tile: Tile) -> None:
        of_weight = weight_tile(p, tile, device) if dx is not None else tile
        cut = Cut.of("input_gradient", p, tile, device, map_pixels=p.h * p.w)
        weight_cut = Cut.of("weight_gradient", p, of_weight, device)
        blocks = math.ceil(p.m / of_weight.channels) * math.ceil(p.c / of_weight.depth)
        weight_programs, part = 0, NO_ROWS
        if dw1 is not None:
            weight_programs = weight_cut.groups * blocks
            (part,) = Rows.room(x, weight_cut.groups, (blocks, dw1.numel()))
        programs = 0 if dx is None else cut.groups * math.ceil(p.c / tile.channels)
        sizes = Size.of(p, cut.pixels), Size.of(p, weight_cut.pixels)
        constants = Blocks.of(tile, cut.tiles), Blocks.of(of_weight, weight_cut.tiles, part)
        tensors = da, u, x, w1, norm, read, dx, part, dw1
        primary_gradient_kernel[(weight_programs + programs,)](
            *tensors, weight_programs, sizes, shape, *constants, **options(tile)
        )

    tuning.run(kind, p, device, launch, "both" if dx is not None and dw1 is not None else "")


def _variant(**results: object) -> str:
    """The name of a kernel without the results that are None."""
    return " ".join(f"no {name}" for name, value in results.items() if value is None)
