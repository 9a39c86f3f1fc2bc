"""How does the cost of one Ghost module grow with batch, map size, channels, ratio, d and threads?

    python -m benchmarks.scaling                    one module, one thing varied at a time
    python -m benchmarks.scaling --axis batch ratio
    python -m benchmarks.scaling --quick

Everything is varied around one module of GhostNet, 40 -> 120 channels on 28 x 28 maps at batch 16,
in eval mode: its shape binds neither on memory nor on arithmetic alone.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import harness, providers, report, session
from benchmarks.measure import Measurer, failures
from benchmarks.session import Task
from benchmarks.shapes import GRID, Shape

CENTRE = Shape(40, 120, 28, group=GRID)
BATCH = 16
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "size": (7, 14, 28, 56, 112, 224),
    "channels": (16, 32, 64, 128, 256, 512, 1024),
    "ratio": (2, 3, 4, 5),
    "d": (1, 3, 5, 7),
    "threads": tuple(range(1, harness.core_count() + 1)),
}
PROVIDERS = ("eager", "folded", "fused")


def values(axis: str, quick: bool) -> tuple[int, ...]:
    """What is measured along ``axis``; ends and middle with ``quick``."""
    every = AXES[axis]
    if not quick or len(every) <= 3:
        return every
    chosen = (every[0], every[len(every) // 2], every[-1])
    # The far ends of size and batch alone would take the minute.
    return chosen[:2] if axis in ("size", "batch", "channels") else chosen


def point(axis: str, value: int) -> tuple[Shape, int]:
    """Shape and batch at one point of an axis.

    Along ``channels`` the module is square (C -> C), on 14 x 14 maps; large maps are taken with
    smaller batches, so that memory stays below a gigabyte.
    """
    if axis == "batch":
        return CENTRE, value
    if axis == "size":
        return replace(CENTRE, size=value), max(1, min(BATCH, BATCH * 56 * 56 // value**2))
    if axis == "channels":
        return replace(CENTRE, inp=value, oup=value, size=14), BATCH
    if axis == "ratio":
        return replace(CENTRE, ratio=value), BATCH
    if axis == "d":
        return replace(CENTRE, dw_size=value), BATCH
    return CENTRE, BATCH


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = session.make_parser("scaling", __doc__.partition("\n\n")[0])
    parser.add_argument("--axis", nargs="+", choices=tuple(AXES), default=list(AXES))
    parser.add_argument(
        "--providers", nargs="+", default=list(PROVIDERS), help="names, families or globs"
    )

    def check(arguments: argparse.Namespace) -> None:
        arguments.providers = providers.select(arguments.providers)

    return session.parse(parser, argv, check)


def _on_threads(measurer: Measurer, threads: int) -> None:
    with measurer.on_threads(threads):
        shape, batch = point("threads", threads)
        measurer.eval(shape, batch, axis="threads", value=threads)


def tasks(measurer: Measurer, arguments: argparse.Namespace) -> list[Task]:
    """One task per point; threads last, since a larger thread pool stays."""
    work: list[Task] = []
    for axis in sorted(arguments.axis, key=list(AXES).index):
        if axis == "threads" and arguments.clock == "cpu":
            continue  # CPU time of one thread says nothing there
        for value in values(axis, arguments.quick):
            if axis == "threads":
                run = functools.partial(_on_threads, measurer, value)
            else:
                shape, batch = point(axis, value)
                run = functools.partial(measurer.eval, shape, batch, axis=axis, value=value)
            work.append((f"{axis} {value}", run))
    return work


def curves(
    rows: Sequence[report.Row],
) -> dict[str, dict[int, dict[str, report.Row]]]:
    """axis -> value -> provider -> timed row."""
    found: dict[str, dict[int, dict[str, report.Row]]] = {}
    for row in report.timed(rows):
        points = found.setdefault(row["axis"], {})
        points.setdefault(row["value"], {})[row["provider"]] = row
    return found


def summarize(rows: Sequence[report.Row]) -> list[dict[str, Any]]:
    """One line per point: microseconds an image of eager, the best of PyTorch and ours."""
    lines = []
    for axis, points in curves(rows).items():
        for value, cell in points.items():
            eager, ours = cell.get(providers.BASELINE), report.fastest(cell, "ours")
            best = report.fastest(cell, "pytorch")
            if eager is None or ours is None or best is None:
                continue
            lines.append(
                {
                    "axis": axis,
                    "value": value,
                    "batch": ours["batch"],
                    "eager_us": 1e6 * eager["median_s"] / eager["batch"],
                    "best_us": 1e6 * best["median_s"] / best["batch"],
                    "ours_us": 1e6 * ours["median_s"] / ours["batch"],
                    "floors": ours["floors"],
                    "over_eager": eager["median_s"] / ours["median_s"],
                    "over_best": best["median_s"] / ours["median_s"],
                }
            )
    return lines


def print_report(console: Any, lines: Sequence[dict[str, Any]]) -> None:
    """The lines of :func:`summarize` as a table."""
    headings = (
        "axis", "value", "batch", "eager", "best PyTorch", "ours", "ours, floors", "x eager",
        "x best",
    )  # fmt: skip
    table = report.plain_table("Microseconds an image, eval", headings)
    for line in lines:
        table.add_row(
            line["axis"],
            str(line["value"]),
            str(line["batch"]),
            *(f"{line[key]:.1f}" for key in ("eager_us", "best_us", "ours_us")),
            f"{line['floors']:.2f}",
            *(report.flag(line[key]) for key in ("over_eager", "over_best")),
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if ghost_ops failed a check, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    run = session.start("scaling", argv, arguments)
    if run is None:
        return 2
    measurer = Measurer(run, arguments.providers)
    status = run.run(tasks(measurer, arguments))
    lines = summarize(run.rows)
    print_report(run.console, lines)
    return session.finish(run, status, lines, failures(run.rows))


if __name__ == "__main__":
    raise SystemExit(main())
