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
    NO_ROWS,
    Blocks,
    Cut,
    Epilogue,
    Norm,
    Rows,
    Shape,
    Size,
    cheap_constants,
    options,
    vectors,
)
from .plan import Device, Problem, Tile, rounded_up

Moments = tuple[Tensor, Tensor]  # mean and biased variance


def launch_primary(
    x: Tensor,
    w1: Tensor | None,
    p: Problem,
    device: Device,
    *,
    norm: Norm = NO_NORM,
    u: Tensor | None = None,
    y: Tensor | None = None,
    out: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
    moments: bool = False,
) -> Moments | None:
    """Launch primary_kernel; returns the moments of u if they are requested."""
    shape = Shape.primary(
        p,
        x,
        device,
        WIDE=p.wide or epilogue.wide,
        Y_CH=p.m if y is None else y.size(1),
        OUT_CH=p.out_channels,
        ACT1=_act(p.act1, y, out),
    )

    def launch(tile: Tile) -> Moments | None:
        cut = Cut.of("primary", p, tile, device)
        blocks = math.ceil(p.m / tile.channels)
        part, found = _room_for_moments(x, cut.groups, blocks, p.m, blocks, moments)
        size, constants = Size.of(p, cut.pixels), Blocks.of(tile, cut.tiles, part)
        primary_kernel[(cut.groups * blocks,)](
            x, w1, norm, u, y, out, epilogue, part, found, size, shape, constants, **options(tile)
        )
        return found if moments else None

    return tuning.run("primary", p, device, launch, "moments" if moments else "")


def launch_cheap(
    y: Tensor,
    w2: Tensor,
    p: Problem,
    device: Device,
    *,
    norm: Norm = NO_NORM,
    out: Tensor | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
    moments: bool = False,
) -> Moments | None:
    """Launch cheap_kernel; returns the moments of v if they are requested."""
    wide, act2 = p.wide or epilogue.wide, _act(p.act2, out)
    shape = Shape.cheap(p, WIDE=wide, Y_CH=y.size(1), ACT2=act2)

    def launch(tile: Tile) -> Moments | None:
        cut = Cut.of("cheap", p, tile, device)
        blocks = math.ceil(p.g / tile.channels)
        part, found = _room_for_moments(y, cut.groups, blocks, p.g, blocks, moments)
        size, constants = Size.of(p, cut.pixels, False), Blocks.of(tile, cut.tiles, part)
        cheap_kernel[(cut.groups * blocks,)](
            y, w2, norm, out, epilogue, part, found, size, shape, constants, **options(tile)
        )
        return found if moments else None

    return tuning.run("cheap", p, device, launch, "moments" if moments else "")


def launch_fused(
    x: Tensor,
    w1: Tensor | None,
    w2: Tensor,
    p: Problem,
    device: Device,
    *,
    norm1: Norm,
    norm2: Norm = NO_NORM,
    y: Tensor,
    out: Tensor | None = None,
    moments: bool = False,
) -> Moments | None:
    """Launch fused_kernel; returns the moments of v if they are requested."""
    acts = {"ACT1": p.act1, "ACT2": _act(p.act2, out)}
    shape = Shape.primary(p, x, device, Y_CH=y.size(1), **cheap_constants(p), **acts)

    def launch(tile: Tile) -> Moments | None:
        blocks, tiles = math.ceil(p.m / tile.channels), math.ceil(p.out_pixels / tile.pixels)
        columns = blocks * p.ghosts_per_map
        part, found = _room_for_moments(x, p.n, blocks, p.g, columns, moments)
        size, constants = Size.of(p, p.out_pixels), Blocks.of(tile, rounded_up(tiles), part)
        fused_kernel[(p.n * blocks,)](
            x, w1, norm1, w2, norm2, y, out, part, found, size, shape, constants, **options(tile)
        )
        return found if moments else None

    return tuning.run("fused", p, device, launch, "moments" if moments else "")


def _act(act: int, *results: Tensor | None) -> int:
    """The activation of a launch; NONE if it writes moments only, which precede the activation."""
    return act if any(t is not None for t in results) else NONE


def _room_for_moments(
    like: Tensor, groups: int, blocks: int, channels: int, columns: int, requested: bool
) -> tuple[Rows, Moments | tuple[None, None]]:
    """Memory for partial moments with their counts, and for mean and variance [channels]."""
    if not requested:
        return NO_ROWS, (None, None)
    mean, var = vectors(like, channels)
    (part,) = Rows.room(like, groups, (blocks, 2 * channels + columns))
    return part, (mean, var)
