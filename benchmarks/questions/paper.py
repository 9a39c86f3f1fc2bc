"""The GhostNet paper's own question: how much faster is a Ghost module in practice?

    python -m benchmarks paper

A Ghost module of ratio s with d x d cheap operations (section 3.1) needs

    r_s = C k^2 n / (C k^2 n / s + d^2 n (s - 1) / s)

times fewer FLOPs than the convolution C -> n that it replaces, about s. Measured is the time of
that convolution with batch norm and ReLU, at PyTorch's best (both layouts, batch norm folded),
over that of the Ghost module, PyTorch's at its best and ours, for s in 2..5 and d in 1, 3, 5, 7.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from benchmarks.harness import floor, providers
from benchmarks.harness.measure import Measurer
from benchmarks.harness.rows import Point, Row, Triple, by_shape, fastest, ratio, split
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.shapes import GRID, Shape
from benchmarks.harness.subjects import Subject
from benchmarks.questions.question import Question, number
from benchmarks.report.table import Table, times

RATIOS, KERNELS = (2, 3, 4, 5), (1, 3, 5, 7)
BATCH = 16


def convolution(kernel_size: int) -> Shape:
    """The convolution that is replaced, as a Ghost module of ratio 1: no ghost maps."""
    return Shape(64, 128, 28, kernel_size=kernel_size, ratio=1, dw_size=1, group=GRID)


def theoretical_speedup(ghost: Shape) -> float:
    """r_s of section 3.1: FLOPs of the plain convolution over those of the Ghost module."""
    plain = replace(ghost, ratio=1)
    return floor.forward_flops(plain, 1) / floor.forward_flops(ghost, 1)


class Speedup(NamedTuple):
    """Times faster than the convolution: by FLOPs, with PyTorch's Ghost module and with ours."""

    k: int
    s: int
    d: int
    theory: float
    pytorch: Triple
    ours: Triple

    def __str__(self) -> str:
        return f"k={self.k} s={self.s} d={self.d}"


def summarize(rows: Sequence[Row]) -> list[Speedup]:
    """One line per k, s, d."""
    lines = []
    for (k, s), part in split((row for row in rows if "k" in row), "k", "s").items():
        cells = by_shape(part)
        plain = fastest(cells.get(convolution(k).name, {}), "pytorch")
        for d in KERNELS:
            shape = replace(convolution(k), ratio=s, dw_size=d)
            cell = cells.get(shape.name, {})
            eager, ours = fastest(cell, "pytorch"), fastest(cell, "ours")
            if plain and eager and ours:
                both = ratio(plain, eager), ratio(plain, ours)
                lines.append(Speedup(k, s, d, theoretical_speedup(shape), *both))
    return lines


class Paper(Question):
    name = "paper"
    title = "The paper's question"
    purpose = "the paper's question: speed-up over the convolution, by FLOPs and measured"

    def options(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--ratio", type=number(2), nargs="+", help="s (2 to 5; 2 and 4 with --quick)")
        add("--dw-size", type=int, nargs="+", choices=KERNELS, default=list(KERNELS))
        add("--kernel-size", type=int, nargs="+", choices=KERNELS, default=[1, 3], help="k")

    def check(self, arguments: argparse.Namespace) -> None:
        arguments.ratio = arguments.ratio or ([2, 4] if arguments.quick else list(RATIOS))

    def tasks(self, run: Session) -> list[Task]:
        """One task per k and s: the convolution and its Ghost modules of all d, interleaved."""
        given, work = run.arguments, []
        measurer = Measurer(run, providers.select(["eager", "folded", "fused"]))

        def measure(k: int, s: int, ghosts: list[Shape]) -> None:
            batch = 4 if given.quick else BATCH
            subjects = [Subject(shape, batch, given.dtype) for shape in (convolution(k), *ghosts)]
            measurer.eval(subjects, k=k, s=s)

        for k in given.kernel_size:
            for s in given.ratio:
                ghosts = [replace(convolution(k), ratio=s, dw_size=d) for d in given.dw_size]
                work.append((f"k={k} s={s}", functools.partial(measure, k, s, ghosts)))
        return work

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        body = [
            (str(p), f"{p.theory:.2f}x", times(p.pytorch[0]), times(p.ours[0]))
            for p in summarize(rows)
        ]
        headings = ("Ghost module", "r_s by FLOPs", "PyTorch's, measured", "ours")
        title = "Times faster than the convolution replaced (64 to 128 channels at 28)"
        return [Table(title, headings, body)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        for p in summarize(rows):
            for who, found in (("PyTorch", p.pytorch), ("ghost_ops", p.ours)):
                triple = found[0] / p.theory, found[1] / p.theory, found[2] / p.theory
                yield Point(f"paper, k={p.k}: {who}, measured over r_s", triple, str(p))
