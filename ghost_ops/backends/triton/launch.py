"""What every launch shares: the device, the share of the pixels a program takes, scratch, folds."""

from __future__ import annotations

import contextlib
import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.common import INTERPRET
from .kernels.fold import fold_moments_kernel, fold_sums_kernel
from .plan import INTERPRETER, Device, Problem, Tile, power_of_two, tiles_per_program


class Norm(NamedTuple):
    """A batch norm as the kernels take it; gamma and beta alone are a scale and a shift."""

    gamma: Tensor | None = None
    beta: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0


NO_NORM = Norm()


class Partial(NamedTuple):
    """Partial results, one row a group of tiles."""

    data: Tensor
    parts: int


@functools.cache
def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    l2_bytes = getattr(found, "L2_cache_size", 0) or 2**22
    hip = torch.version.hip is not None
    return Device(found.name, found.multi_processor_count, l2_bytes, hip)


def device_of(x: Tensor) -> Device:
    """What the plan needs to know of the device of x."""
    return INTERPRETER if INTERPRET.value else _gpu(x.device.index)


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it that of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def precision(dtype: torch.dtype, device: Device) -> str:
    """How tl.dot multiplies: float32 as torch's convolutions are told to, in TF32 or exactly."""
    if dtype is not torch.float32 or device.interpreter or device.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def options(tile: Tile) -> dict[str, int | bool]:
    """Compiler options of a launch; fused multiply-adds are asked for, as defaults differ."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Cut:
    """How the pixels of a pass are shared out: ``groups`` groups of ``tiles`` tiles.

    ``pixels`` is the number of pixels that follow each other in memory: those of one map, or in
    channels_last those of all images, so that small maps share a tile.
    """

    pixels: int
    tiles: int
    groups: int

    @classmethod
    def of(
        cls, kind: str, p: Problem, tile: Tile, device: Device, map_pixels: int | None = None
    ) -> Cut:
        """For maps of the output's size, or of ``map_pixels`` pixels."""
        per_map = p.out_pixels if map_pixels is None else map_pixels
        images, pixels = (1, p.n * per_map) if p.nhwc else (p.n, per_map)
        tiles = tiles_per_program(kind, p, tile, device, images, pixels)
        groups = images * math.ceil(math.ceil(pixels / tile.pixels) / tiles)
        return cls(pixels, tiles, groups)


def maps(x: Tensor, p: Problem, channels: int) -> Tensor:
    """An uninitialised [N, channels, Ho, Wo] in the dtype and layout of x."""
    fmt = torch.channels_last if p.nhwc else torch.contiguous_format
    shape = (p.n, channels, p.ho, p.wo)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)


def vectors(x: Tensor, size: int, count: int = 2) -> tuple[Tensor, ...]:
    """Uninitialised float32 vectors on the device of x."""
    return tuple(x.new_empty(size, dtype=torch.float32) for _ in range(count))


def zeros(x: Tensor, size: int, count: int = 2) -> tuple[Tensor, ...]:
    """The same, of zeros."""
    return tuple(x.new_zeros(size, dtype=torch.float32) for _ in range(count))


def partial_moments(like: Tensor, parts: int, channels: int) -> Tensor:
    """Room for mean [parts, channels], M2 [parts, channels] and count [parts]."""
    return like.new_empty((2 * channels + 1) * parts, dtype=torch.float32)


def fold_moments(partial: Partial | None, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [channels] of everything."""
    assert partial is not None
    mean, var = vectors(partial.data, channels)
    fold_moments_kernel[(math.ceil(channels / 16),)](
        partial.data, mean, var, partial.parts,
        CH=channels, BP=min(power_of_two(partial.parts), 64), BC=16, enable_fp_fusion=True,
    )  # fmt: skip
    return mean, var


def fold_sums(partial: Partial, *into: Tensor) -> None:
    """Sums over the parts of data [len(into), parts, size] into one or two tensors of that size."""
    size = into[0].numel()
    fold_sums_kernel[(math.ceil(size / 64), len(into))](
        partial.data, into[0], into[1] if len(into) > 1 else None, partial.parts, size,
        BP=min(power_of_two(partial.parts), 64), BS=64, enable_fp_fusion=True,
    )  # fmt: skip
