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
from typing import Any

GRID = "grid"  # group of shapes that vary one thing at a time, of no network


@dataclass(frozen=True)
class Shape:
    """One Ghost module on square maps of ``size`` x ``size`` pixels."""

    inp: int  # input channels C
    oup: int  # output channels
    size: int
    activation: str = "relu"  # of both branches; none for a linear module
    kernel_size: int = 1
    ratio: int = 2
    dw_size: int = 3
    stride: int = 1
    eps: float = 1e-5  # of both batch norms
    count: int = 1  # how often the module occurs in its network
    group: str = "ghostnet"  # the network family, or GRID

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

    def explain(self, batch: int, **options: Any) -> Any:
        """The plan of this module for so many images; ``options`` as ``planner.explain`` has."""
        from ghost_ops import planner

        names = ("ratio", "dw_size", "stride", "activation")
        options |= {name: getattr(self, name) for name in names}
        return planner.explain((batch, self.inp, self.size, self.size), self.oup, **options)


def _ghostnet(word: str) -> Shape:
    name, _, count = word.partition("*")
    inp, oup, size, activation = name.replace("@", "-").split("-")
    activation = activation.replace("linear", "none")
    return Shape(int(inp), int(oup), int(size), activation, count=int(count or 1))


# Channels in and out, input size, activation, and how often it occurs if not once.
_GHOSTNET = """
    16-16@112-relu 16-16@112-linear 16-48@112-relu
    48-24@56-linear 24-72@56-relu*2 72-24@56-linear
    72-40@28-linear 40-120@28-relu 120-40@28-linear 40-240@28-relu
    240-80@14-linear 80-200@14-relu 200-80@14-linear 80-184@14-relu*2 184-80@14-linear*2
    80-480@14-relu 480-112@14-linear 112-672@14-relu*2 672-112@14-linear
    672-160@7-linear 160-960@7-relu*4 960-160@7-linear*4
"""
GHOSTNET: tuple[Shape, ...] = tuple(map(_ghostnet, _GHOSTNET.split()))
YOLO: tuple[Shape, ...] = tuple(
    Shape(inp, oup, size, "silu", dw_size=5, eps=1e-3, group="yolo")
    for inp, oup, size in ((64, 128, 80), (128, 128, 40), (256, 256, 20))
)
ALL: tuple[Shape, ...] = GHOSTNET + YOLO
# A handful that spans the memory-bound, the mixed and the GEMM-bound end.
_QUICK = "16-48@112-relu 72-24@56-linear 40-120@28-relu 80-184@14-relu 160-960@7-relu".split()
QUICK: tuple[Shape, ...] = (*(shape for shape in GHOSTNET if shape.name in _QUICK), YOLO[1])
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
