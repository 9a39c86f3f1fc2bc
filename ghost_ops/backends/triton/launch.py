"""What every launch shares: the device, the share of the pixels a program takes, scratch memory."""

from __future__ import annotations

import contextlib
import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...conventions import memory_format
from .kernels.common import INTERPRET
from .plan import (
    INTERPRETER,
    Device,
    Problem,
    Tile,
    needs_64_bits,
    power_of_two,
    tiles_per_program,
)


class Norm(NamedTuple):
    """A batch norm as the kernels take it; gamma and beta alone are a scale and a shift."""

    gamma: Tensor | None = None
    beta: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0


NO_NORM = Norm()


class Epilogue(NamedTuple):
    """What a pass does with its values before it stores them in out: times gate, plus residual."""

    gate: Tensor | None = None
    height: int = 1
    width: int = 1
    row_scale: float = 1.0
    column_scale: float = 1.0
    residual: Tensor | None = None

    @classmethod
    def of(cls, gate: Tensor | None, residual: Tensor | None, out: Tensor) -> Epilogue:
        """Of a gate [N, out_channels, any height, any width], made dense in the layout of out."""
        layout = memory_format(out)
        if residual is not None:
            residual = residual.contiguous(memory_format=layout)
        if gate is None:
            return cls(residual=residual)
        (height, width), (ho, wo) = gate.shape[2:], out.shape[2:]
        gate = gate.contiguous(memory_format=layout)
        return cls(gate, height, width, height / ho, width / wo, residual)

    @property
    def wide(self) -> bool:
        """Whether an offset in the gate may need 64 bits."""
        return self.gate is not None and needs_64_bits(self.gate.numel())


NO_EPILOGUE = Epilogue()


class Partial(NamedTuple):
    """Room for partial results, a row a group, and what ``kernels.partial`` folds them with.

    Attributes:
        data, counters: float32 rows, and int32 zeros that the kernel leaves zero.
        parts: groups, each with a row.
        fan: rows that are folded into one more row.
    """

    data: Tensor | None = None
    counters: Tensor | None = None
    parts: int = 0
    fan: int = 1

    @classmethod
    def room(cls, like: Tensor, parts: int, *needs: tuple[int, int]) -> tuple[Partial, ...]:
        """One for each (blocks that fold for themselves, values of a row in all) of a kernel."""
        fan = min(max(power_of_two(math.isqrt(parts)), 8), 64)
        clusters = math.ceil(parts / fan)
        sizes = [blocks * (clusters + 1) for blocks, _ in needs]
        counters = _counters(like, sum(sizes))[: sum(sizes)].split(sizes)
        rows = [like.new_empty((parts + clusters) * row, dtype=torch.float32) for _, row in needs]
        return tuple(cls(*room, parts, fan) for room in zip(rows, counters, strict=True))


NO_PARTIAL = Partial()

_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(like: Tensor, size: int) -> Tensor:
    """At least ``size`` zeros that no kernel at work counts with.

    Kernels of one stream run one after the other and leave zeros, so that a stream needs one vector
    and no launch clears it. A CUDA graph may be replayed on any stream: it has its own.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return like.new_zeros(size, dtype=torch.int32)
    key = (like.device, torch.cuda.current_stream(like.device).cuda_stream)
    found = _zeros.get(key)
    if found is None or found.numel() < size:
        found = like.new_zeros(max(power_of_two(size), 4096), dtype=torch.int32)
        _zeros[key] = found
    return found


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
