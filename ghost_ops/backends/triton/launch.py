"""Parts of every launch: argument bundles of the kernels, the pixels of a program, scratch memory.

Triton specialises a kernel for each field of a bundle as for a plain argument. A field that a
kernel does not use keeps its default value, so that no second variant of the kernel is compiled.
"""

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
    """A batch norm, vectors [channels], and the slope of the activation after it.

    Without mean and var, gamma and beta are a scale and a shift. slope: a number, or the slopes
    [channels] of a PReLU.
    """

    gamma: Tensor | None = None
    beta: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 0.0
    slope: float | Tensor = 0.0


NO_NORM = Norm()


class Epilogue(NamedTuple):
    """Operands of the last step before a store: out = value * gate + residual.

    Attributes:
        gate: [N, out_channels, height, width], or None.
        row_scale, column_scale: height and width of the gate over those of the output.
        residual: like out, or None.
    """

    gate: Tensor | None = None
    height: int = 1
    width: int = 1
    row_scale: float = 1.0
    column_scale: float = 1.0
    residual: Tensor | None = None

    @classmethod
    def of(cls, gate: Tensor | None, residual: Tensor | None, out: Tensor) -> Epilogue:
        """The epilogue of a gate and a residual, which are made dense in the layout of out."""
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


class Rows(NamedTuple):
    """Memory for partial results, one row per group of tiles, which ``kernels.partial`` folds.

    Attributes:
        data: float32 rows.
        counters: int32 zeros; the kernel resets them to zero.
        parts: number of groups.
    """

    data: Tensor | None = None
    counters: Tensor | None = None
    parts: int = 0

    @classmethod
    def room(cls, like: Tensor, parts: int, *needs: tuple[int, int]) -> tuple[Rows, ...]:
        """Rows for each pair (channel blocks that fold separately, values of a row) of needs."""
        clusters = math.ceil(parts / fan_of(parts))
        sizes = [blocks * (clusters + 1) for blocks, _ in needs]
        counters = _counters(like, sum(sizes))[: sum(sizes)].split(sizes)
        rows = [like.new_empty((parts + clusters) * row, dtype=torch.float32) for _, row in needs]
        return tuple(cls(*room, parts) for room in zip(rows, counters, strict=True))


NO_ROWS = Rows()


def fan_of(parts: int) -> int:
    """The number of rows that are folded into one row of the next level; 1 without rows."""
    return min(max(power_of_two(math.isqrt(parts)), 8), 64) if parts else 1


class Size(NamedTuple):
    """Sizes of maps: output pixels, height and width; input pixels and width if x is read.

    pixels: as in ``Cut``.
    """

    pixels: int
    out_pixels: int
    height: int
    width: int
    in_pixels: int = 0
    in_width: int = 0

    @classmethod
    def of(cls, p: Problem, pixels: int, reads_input: bool = True) -> Size:
        inputs = (p.h * p.w, p.w) if reads_input else ()
        return cls(pixels, p.out_pixels, p.ho, p.wo, *inputs)


class Shape(NamedTuple):
    """Constants of a problem that a kernel is compiled for.

    Attributes:
        C, M, G: channels of x, intrinsic maps, ghost maps.
        Y_CH, OUT_CH: channels in memory of the tensor with y, and of out.
        D, S: depthwise kernel size, stride of the primary convolution.
        ACT1, ACT2: codes of the activations.
        NHWC, WIDE: channels_last; some offset needs 64 bits.
        PREC: ``tl.dot``'s input precision.
        TAPS: D * D rounded up to a power of two.
        BATCH: the norm whose gradient is computed has the batch's statistics.
        WEIGHTS: dw2 is computed.
    """

    NHWC: bool
    WIDE: bool
    C: int = 0
    M: int = 0
    G: int = 0
    GHOSTS_PER_MAP: int = 0
    Y_CH: int = 0
    OUT_CH: int = 0
    D: int = 0
    S: int = 0
    ACT1: int = 0
    ACT2: int = 0
    PREC: str = ""
    TAPS: int = 0
    BATCH: bool = False
    WEIGHTS: bool = False

    @classmethod
    def primary(cls, p: Problem, x: Tensor, device: Device, **more: int | bool) -> Shape:
        """Of a launch with the primary convolution or its gradients."""
        constants: dict = {"NHWC": p.nhwc, "WIDE": p.wide, "C": p.c, "M": p.m, "S": p.stride}
        return cls(**{**constants, "PREC": precision(x.dtype, device), **more})

    @classmethod
    def cheap(cls, p: Problem, **more: int | bool) -> Shape:
        """Of a launch with the cheap operation or its gradients."""
        constants: dict = {"NHWC": p.nhwc, "WIDE": p.wide, **cheap_constants(p)}
        return cls(**{**constants, **more})


def cheap_constants(p: Problem) -> dict[str, int]:
    """The fields of ``Shape`` that the cheap operation uses."""
    ghosts = {"M": p.m, "G": p.g, "GHOSTS_PER_MAP": p.ghosts_per_map, "D": p.dw_size}
    return {**ghosts, "OUT_CH": p.out_channels}


class Blocks(NamedTuple):
    """Constants of a program's work; see ``plan.Tile`` for the first three.

    Attributes:
        TILES: tiles of a program.
        FAN: see ``fan_of``.
    """

    PIXELS: int
    CHANNELS: int
    DEPTH: int
    TILES: int
    FAN: int

    @classmethod
    def of(cls, tile: Tile, tiles: int, part: Rows = NO_ROWS) -> Blocks:
        return cls(tile.pixels, tile.channels, tile.depth, tiles, fan_of(part.parts))


_zeros: dict[tuple[torch.device, int], Tensor] = {}


def _counters(like: Tensor, size: int) -> Tensor:
    """At least ``size`` zeros that no running kernel uses.

    The kernels of a stream run one after the other, and each resets its counters to zero. So one
    vector per stream is enough, and no launch clears it. A CUDA graph may be replayed on any
    stream, so each captured launch gets a new vector.
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
    """The ``plan.Device`` of x."""
    return INTERPRETER if INTERPRET.value else _gpu(x.device.index)


def on_device(x: Tensor) -> AbstractContextManager:
    """A context in which the device of x is current, because Triton launches on that device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def precision(dtype: torch.dtype, device: Device) -> str:
    """tl.dot's input precision: TF32 for float32 if torch's convolutions may use it, else exact."""
    if dtype is not torch.float32 or device.interpreter or device.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def options(tile: Tile) -> dict[str, int | bool]:
    """Compiler options of a launch. The default of fused multiply-adds differs by version."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Cut:
    """Division of the pixels of a pass: ``groups`` groups of ``tiles`` tiles.

    ``pixels`` is the number of pixels that follow each other in memory: those of one map, or in
    channels_last those of all images, so that several small maps fit into one tile.
    """

    pixels: int
    tiles: int
    groups: int

    @classmethod
    def of(
        cls, kind: str, p: Problem, tile: Tile, device: Device, map_pixels: int | None = None
    ) -> Cut:
        """The division for maps of ``map_pixels`` pixels; None: maps of the output's size."""
        per_map = p.out_pixels if map_pixels is None else map_pixels
        images, pixels = (1, p.n * per_map) if p.nhwc else (p.n, per_map)
        tiles = tiles_per_program(kind, p, tile, device, images, pixels)
        groups = images * math.ceil(math.ceil(pixels / tile.pixels) / tiles)
        return cls(pixels, tiles, groups)


def maps(x: Tensor, p: Problem, channels: int) -> Tensor:
    """An uninitialised [N, channels, Ho, Wo] of p, in the dtype of x and the layout of p."""
    fmt = torch.channels_last if p.nhwc else torch.contiguous_format
    shape = (p.n, channels, p.ho, p.wo)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)


def vectors(x: Tensor, size: int, count: int = 2) -> tuple[Tensor, ...]:
    """Uninitialised float32 vectors on the device of x."""
    return tuple(x.new_empty(size, dtype=torch.float32) for _ in range(count))


def zeros(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Two float32 vectors of zeros on the device of x."""
    zero = x.new_zeros(size, dtype=torch.float32)
    return zero, zero.clone()
