"""The Ghost module shapes that the benchmarks run on.

``GHOSTNET`` holds the 22 distinct modules of GhostNet 1.0x at 224x224 (Han et al., CVPR 2020, Table
1; 32 modules in all, ``count`` says how often each occurs). ``YOLO`` holds three GhostConv shapes
as Ultralytics models use them.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

GRID = "grid"  # group of shapes that vary one thing at a time, of no network


@dataclass(frozen=True)
class Shape:
    """One Ghost module on square maps of ``size`` x ``size`` pixels.

    Args:
        inp: input channels C.
        oup: output channels.
        size: height and width of the input in pixels.
        activation: name of the activation of both branches (``"none"`` for a linear module).
        kernel_size, ratio, dw_size, stride: as in the reference Ghost module.
        eps: epsilon of both batch norms.
        count: how often the module occurs in its network.
        group: the network family, or ``GRID``.
    """

    inp: int
    oup: int
    size: int
    activation: str = "relu"
    kernel_size: int = 1
    ratio: int = 2
    dw_size: int = 3
    stride: int = 1
    eps: float = 1e-5
    count: int = 1
    group: str = "ghostnet"

    @property
    def name(self) -> str:
        """Unique, shell-safe name: ``inp-oup@size-activation``; of grids, with k, ratio and d."""
        suffix = "linear" if self.activation == "none" else self.activation
        if self.group == GRID:
            suffix += f"-k{self.kernel_size}-s{self.ratio}-d{self.dw_size}"
        return f"{self.inp}-{self.oup}@{self.size}-{suffix}"

    @property
    def intrinsic(self) -> int:
        """Number of intrinsic maps, m = ceil(oup / ratio)."""
        return math.ceil(self.oup / self.ratio)

    @property
    def ghosts(self) -> int:
        """Number of ghost maps that are computed, g = m * (ratio - 1)."""
        return self.intrinsic * (self.ratio - 1)

    @property
    def out_size(self) -> int:
        """Height and width of the output in pixels (padding kernel_size // 2)."""
        padded = self.size + 2 * (self.kernel_size // 2)
        return (padded - self.kernel_size) // self.stride + 1


# Input size, channels in and out, activation, and how often it occurs.
GHOSTNET: tuple[Shape, ...] = tuple(
    Shape(inp, oup, size, activation, count=count)
    for size, inp, oup, activation, count in (
        (112, 16, 16, "relu", 1),
        (112, 16, 16, "none", 1),
        (112, 16, 48, "relu", 1),
        (56, 48, 24, "none", 1),
        (56, 24, 72, "relu", 2),
        (56, 72, 24, "none", 1),
        (28, 72, 40, "none", 1),
        (28, 40, 120, "relu", 1),
        (28, 120, 40, "none", 1),
        (28, 40, 240, "relu", 1),
        (14, 240, 80, "none", 1),
        (14, 80, 200, "relu", 1),
        (14, 200, 80, "none", 1),
        (14, 80, 184, "relu", 2),
        (14, 184, 80, "none", 2),
        (14, 80, 480, "relu", 1),
        (14, 480, 112, "none", 1),
        (14, 112, 672, "relu", 2),
        (14, 672, 112, "none", 1),
        (7, 672, 160, "none", 1),
        (7, 160, 960, "relu", 4),
        (7, 960, 160, "none", 4),
    )
)
YOLO: tuple[Shape, ...] = tuple(
    Shape(inp, oup, size, "silu", dw_size=5, eps=1e-3, group="yolo")
    for inp, oup, size in ((64, 128, 80), (128, 128, 40), (256, 256, 20))
)
ALL: tuple[Shape, ...] = GHOSTNET + YOLO
# A handful that spans the memory-bound, the mixed and the GEMM-bound end.
QUICK_NAMES = (
    "16-48@112-relu 72-24@56-linear 40-120@28-relu 80-184@14-relu 160-960@7-relu 128-128@40-silu"
)
QUICK: tuple[Shape, ...] = tuple(shape for shape in ALL if shape.name in QUICK_NAMES.split())
_GROUPS = {"all": ALL, "ghostnet": GHOSTNET, "yolo": YOLO, "quick": QUICK}


def select(patterns: Sequence[str]) -> tuple[Shape, ...]:
    """Shapes named by ``patterns``: group names (all, ghostnet, yolo, quick), shape names or globs
    of them.

    Raises:
        ValueError: a pattern matches nothing.
    """
    chosen: dict[str, Shape] = {}
    for pattern in patterns:
        matches = _GROUPS.get(pattern) or [s for s in ALL if fnmatch.fnmatchcase(s.name, pattern)]
        if not matches:
            known = ", ".join([*_GROUPS, *(s.name for s in ALL)])
            raise ValueError(f"shapes: {pattern!r} matches no shape; known are: {known}")
        chosen.update((s.name, s) for s in matches)
    return tuple(s for s in ALL if s.name in chosen)
