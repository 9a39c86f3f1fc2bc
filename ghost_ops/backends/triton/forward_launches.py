"""The launches of the forward kernels, each with the tile that ``tuning`` chooses."""

from __future__ import annotations

import math

from torch import Tensor

from ...activations import NONE
from . import tuning
from .kernels.cheap import cheap_kernel
from .kernels.fused import fused_kernel
from .kernels.primary import primary_kernel
from .launch import (
    NO_EPILOGUE,
    NO_NORM,
    NO_PARTIAL,
    Cut,
    Epilogue,
    Norm,
    Partial,
    options,
    precision,
    vectors,
)
from .plan import Device, Problem, Tile, rounded_up

Moments = tuple[Tensor, Tensor]  # mean and biased variance


def launch_primary(
    x: Tensor, w1: Tensor | None, p: Problem, device: Device, *, norm: Norm = NO_NORM,
    u: Tensor | None = None, y: Tensor | None = None, out: Tensor | None = None,
    prelu: Tensor | None = None, epilogue: Epilogue = NO_EPILOGUE, moments: bool = False,
) -> Moments | None:  # fmt: skip
    """Launch primary_kernel; the moments of u, if asked for."""

    def launch(tile: Tile) -> Moments | None:
        cut = Cut.of("primary", p, tile, device)
        blocks = math.ceil(p.m / tile.channels)
        part, found = _room_for_moments(x, cut.groups, blocks, p.m, blocks, moments)
        primary_kernel[(cut.groups * blocks,)](
            x, w1, *norm, p.slope1 if prelu is None else prelu, u, y, out, *epilogue,
            part.data, part.counters, *found,
            part.parts, cut.pixels, p.h * p.w, p.w, p.out_pixels, p.wo,
            C=p.c, M=p.m, Y_CH=p.m if y is None else y.size(1), OUP=p.out_channels, S=p.stride,
            ACT=_act(p.act1, y, out), NHWC=p.nhwc, WIDE=p.wide or epilogue.wide,
            PREC=precision(x.dtype, device),
            BP=tile.pixels, BM=tile.channels, BK=tile.depth, TILES=cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip
        return found if moments else None

    return tuning.run("primary", p, device, launch, "moments" if moments else "")


def launch_cheap(
    y: Tensor, w2: Tensor, p: Problem, device: Device, *, norm: Norm = NO_NORM,
    out: Tensor | None = None, prelu: Tensor | None = None, epilogue: Epilogue = NO_EPILOGUE,
    moments: bool = False,
) -> Moments | None:  # fmt: skip
    """Launch cheap_kernel; the moments of v, if asked for."""

    def launch(tile: Tile) -> Moments | None:
        cut = Cut.of("cheap", p, tile, device)
        blocks = math.ceil(p.g / tile.channels)
        part, found = _room_for_moments(y, cut.groups, blocks, p.g, blocks, moments)
        cheap_kernel[(cut.groups * blocks,)](
            y, w2, *norm, p.slope2 if prelu is None else prelu, out, *epilogue,
            part.data, part.counters, *found, part.parts, cut.pixels, p.out_pixels, p.ho, p.wo,
            M=p.m, G=p.g, Y_CH=y.size(1), OUP=p.out_channels, R=p.r, D=p.dw_size,
            ACT=_act(p.act2, out), NHWC=p.nhwc, WIDE=p.wide or epilogue.wide,
            BP=tile.pixels, BG=tile.channels, TILES=cut.tiles, FAN=part.fan,
            **options(tile),
        )  # fmt: skip
        return found if moments else None

    return tuning.run("cheap", p, device, launch, "moments" if moments else "")


def launch_fused(
    x: Tensor, w1: Tensor | None, w2: Tensor, p: Problem, device: Device, *,
    norm1: Norm, norm2: Norm = NO_NORM, y: Tensor,
    out: Tensor | None = None, prelu1: Tensor | None = None, prelu2: Tensor | None = None,
    moments: bool = False,
) -> Moments | None:  # fmt: skip
    """Launch fused_kernel; the moments of v, if asked for."""

    def launch(tile: Tile) -> Moments | None:
        blocks = math.ceil(p.m / tile.channels)
        part, found = _room_for_moments(x, p.n, blocks, p.g, blocks * p.r, moments)
        fused_kernel[(p.n * blocks,)](
            x, w1, *norm1, p.slope1 if prelu1 is None else prelu1,
            w2, *norm2, p.slope2 if prelu2 is None else prelu2,
            y, out, part.data, part.counters, *found,
            part.parts, p.h * p.w, p.w, p.out_pixels, p.ho, p.wo,
            C=p.c, M=p.m, G=p.g, Y_CH=y.size(1), OUP=p.out_channels, R=p.r, D=p.dw_size,
            S=p.stride, ACT1=p.act1, ACT2=_act(p.act2, out), NHWC=p.nhwc, WIDE=p.wide,
            PREC=precision(x.dtype, device),
            BP=tile.pixels, BM=tile.channels, BK=tile.depth,
            TILES=rounded_up(math.ceil(p.out_pixels / tile.pixels)), FAN=part.fan,
            **options(tile),
        )  # fmt: skip
        return found if moments else None

    return tuning.run("fused", p, device, launch, "moments" if moments else "")


def _act(act: int, *results: Tensor | None) -> int:
    """The activation of a launch, none where it has no results: moments come before it."""
    return act if any(t is not None for t in results) else NONE


def _room_for_moments(
    like: Tensor, groups: int, blocks: int, channels: int, columns: int, wanted: bool
) -> tuple[Partial, Moments | tuple[None, None]]:
    """Room for partial moments with their counts, and for mean and variance [channels]."""
    if not wanted:
        return NO_PARTIAL, (None, None)
    mean, var = vectors(like, channels)
    (part,) = Partial.room(like, groups, (blocks, 2 * channels + columns))
    return part, (mean, var)
