"""How does the cost of one Ghost module grow with batch, map size, channels, ratio, d and threads?

    python -m benchmarks scaling                    one module, one thing varied at a time
    python -m benchmarks scaling --axis batch ratio

Everything is varied around one module of GhostNet, 40 -> 120 channels on 28 x 28 maps at batch 16,
in eval mode: its shape binds neither on memory nor on arithmetic alone.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from benchmarks.harness import machine
from benchmarks.harness.measure import Measurer
from benchmarks.harness.rows import Point, Row, Versus, speedups, versus_each
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.shapes import GRID, Shape
from benchmarks.harness.subjects import Subject
from benchmarks.questions.question import Question
from benchmarks.report.table import Table, against_peers

CENTRE = Shape(40, 120, 28, group=GRID)
BATCH = 16
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "size": (7, 14, 28, 56, 112, 224),
    "channels": (16, 32, 64, 128, 256, 512, 1024),
    "ratio": (2, 3, 4, 5),
    "d": (1, 3, 5, 7),
    "threads": tuple(range(1, machine.CORE_COUNT + 1)),
}


def values(axis: str, quick: bool) -> tuple[int, ...]:
    """The measured values of ``axis``; ends and middle with ``quick``."""
    every = AXES[axis]
    if not quick or len(every) <= 3:
        return every
    # The far ends of size, batch and channels alone would take the minute.
    ends = () if axis in ("size", "batch", "channels") else every[-1:]
    return (every[0], every[len(every) // 2], *ends)


def point(axis: str, value: int) -> tuple[Shape, int]:
    """Shape and batch at one point of an axis.

    Along ``channels`` the module is square (C -> C), on 14 x 14 maps; large maps are taken with
    smaller batches, so that memory stays below a gigabyte.
    """
    points = {
        "batch": (CENTRE, value),
        "size": (replace(CENTRE, size=value), max(1, min(BATCH, BATCH * 56 * 56 // value**2))),
        "channels": (replace(CENTRE, inp=value, oup=value, size=14), BATCH),
        "ratio": (replace(CENTRE, ratio=value), BATCH),
        "d": (replace(CENTRE, dw_size=value), BATCH),
        "threads": (CENTRE, BATCH),
    }
    return points[axis]


def points(rows: Sequence[Row]) -> list[tuple[str, int, Versus]]:
    """Axis, value, and ours beside the best of PyTorch."""
    return [(*key, v) for key, v in versus_each(rows, "axis", "value")]


def per_image(row: Row) -> float:
    """Microseconds an image."""
    return 1e6 * row["median_s"] / row["batch"]


class Scaling(Question):
    name = "scaling"
    title = "How the cost grows"
    purpose = "how the cost grows with batch, size, channels, ratio, d, threads"
    default_providers = ("eager", "folded", "fused")
    with_engines = False

    def options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--axis", nargs="+", choices=tuple(AXES), default=list(AXES))

    def tasks(self, run: Session) -> list[Task]:
        """One task per point; threads last, since a larger thread pool stays."""
        measurer, arguments = Measurer(run), run.arguments

        def measure(axis: str, value: int) -> None:
            threads = value if axis == "threads" else arguments.threads
            with measurer.on_threads(threads):
                subject = Subject(*point(axis, value), arguments.dtype)
                measurer.eval(subject, axis=axis, value=value)

        axes = [axis for axis in AXES if axis in arguments.axis]
        if arguments.clock == "cpu":  # CPU time is that of one thread
            axes = [axis for axis in axes if axis != "threads"]
        return [
            (f"{axis} {value}", functools.partial(measure, axis, value))
            for axis in axes
            for value in values(axis, arguments.quick)
        ]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        pairs = ((f"{axis} {n}, batch {v.ours['batch']}", v) for axis, n, v in points(rows))
        show = lambda row: f"{per_image(row):.1f}" if row else ""  # noqa: E731
        return [against_peers("Microseconds an image, eval", pairs, show)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        for axis, value, v in points(rows):
            yield from speedups(f"along {axis}", v, f"{axis} {value}")
