"""The class of all questions: command line, measurement, tables."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import engines, machine, runner, shapes, timing
from benchmarks.harness.extras import MissingExtra, require
from benchmarks.harness.measure import failures
from benchmarks.harness.rows import Mean, Point, Row, means
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.shapes import Shape
from benchmarks.harness.subjects import Subject
from benchmarks.report.table import Table, of_means, text

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}


def number(least: float, most: float = math.inf, kind: type = int) -> Callable[[str], Any]:
    """A type for argparse: a number from ``least`` to ``most``."""
    limits = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
    name = "a positive integer" if limits == "at least 1" else limits

    def parse(word: str) -> Any:
        with contextlib.suppress(ValueError):
            if least <= (value := kind(word)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"expected {name}, got {word}")

    return parse


POSITIVE = number(1)


def add_batches(parser: argparse.ArgumentParser) -> None:
    """``--batch``: several batch sizes."""
    sizes = "batch sizes (train: the largest)"
    parser.add_argument("--batch", type=POSITIVE, nargs="+", default=[1, 16], help=sizes)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """``--shapes``: Ghost modules, as :func:`benchmarks.harness.shapes.select` takes them."""
    parser.add_argument(
        "--shapes",
        nargs="+",
        help="all, ghostnet, yolo, quick, names or globs (default: all, or quick with --quick)",
    )


def add_providers(parser: argparse.ArgumentParser, *default: str) -> None:
    """``--providers``: by default those named and the engines that are installed."""
    parser.add_argument(
        "--providers",
        nargs="+",
        help=f"names, families or globs; all: PyTorch and ours (default: {', '.join(default)} and "
        "the engines that are installed)",
    )
    parser.set_defaults(default_providers=default)


def add_compile(parser: argparse.ArgumentParser, default: str) -> None:
    """``--compile`` and ``--compile-minutes``, for questions in which torch.compile takes part."""
    modes = f"modes in which torch.compile runs too (default: {default}, none with --quick)"
    parser.add_argument("--compile", choices=("none", "eval", "all"), help=modes)
    minutes = (
        "leave torch.compile out once compiling has taken as long; its cache serves later runs"
    )
    kind = number(0, kind=float)
    parser.add_argument("--compile-minutes", type=kind, default=math.inf, help=minutes)
    parser.set_defaults(default_compile=default)


class Question:
    """One question: how it is measured, and what its rows say."""

    name: str  # of its command and of its results file, <name>.json
    title: str  # of its section in the report
    purpose: str  # one line for the list
    full: tuple[str, ...] = ("--rounds", "9")  # its arguments in ``python -m benchmarks all``
    quick: tuple[str, ...] = ("--quick",)  # and with --quick
    malloc: Mapping[str, str] = machine.TUNED_MALLOC  # the allocator that it runs with
    measure_limits = True  # GEMM peak and bandwidth

    def options(self, parser: argparse.ArgumentParser) -> None:
        """Add its own options."""

    def check(self, arguments: argparse.Namespace) -> None:
        """Complete its parsed options; ValueError for bad ones."""

    def unavailable(self, arguments: argparse.Namespace) -> str | None:
        """Why it cannot be measured here, or None."""
        return None

    def tasks(self, run: Session) -> list[Task]:
        """Its work in one session."""
        raise NotImplementedError

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """What its rows say, for the console and the report."""
        raise NotImplementedError

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        """The values behind its geometric means."""
        raise NotImplementedError

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Its command line; argparse exits with a message on bad values."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks {self.name}",
            description=self.purpose,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        add = parser.add_argument
        add("--quick", action="store_true", help="less of everything, in a minute")
        add("--threads", type=POSITIVE, default=1)
        add("--dtype", choices=tuple(DTYPES), default="float32")
        add("--rounds", type=POSITIVE, help="samples per provider (15, or 5 with --quick)")
        add("--malloc", choices=("tuned", "default"), default="tuned", help="allocator, for all")
        add("--no-pin", action="store_true", help="do not pin the threads to cores")
        clock = "cpu: CPU time, for a machine that others use too (one thread only)"
        add("--clock", choices=tuple(timing.CLOCKS), default="wall", help=clock)
        add("--fresh", action="store_true", help="forget an interrupted earlier run")
        out = Path(f"results/{self.name}.json")
        add("--out", type=Path, default=out, help="JSON rows go here")
        self.options(parser)
        arguments = parser.parse_args(argv)
        try:
            self._complete(arguments)
        except ValueError as error:
            parser.error(str(error))
        return arguments

    def _complete(self, arguments: argparse.Namespace) -> None:
        quick = arguments.quick
        if arguments.clock == "cpu" and arguments.threads != 1:
            raise ValueError(f"clock: cpu time needs --threads 1, got {arguments.threads}")
        arguments.rounds = arguments.rounds or (5 if quick else 15)
        arguments.dtype = DTYPES[arguments.dtype]
        if isinstance(getattr(arguments, "batch", None), list):
            arguments.batch = sorted(set(arguments.batch))
        if "shapes" in arguments:
            arguments.shapes = shapes.select(arguments.shapes or ["quick" if quick else "all"])
        if "default_providers" in arguments:
            default = arguments.default_providers
            arguments.providers = engines.choose(arguments.providers, default)
        if "default_compile" in arguments:
            default = "none" if quick else arguments.default_compile
            arguments.compile = arguments.compile or default
        self.check(arguments)

    def means(self, rows: Sequence[Row]) -> dict[str, Mean]:
        """All geometric means of its rows."""
        return means(self.ratios(rows))

    def main(self, argv: Sequence[str]) -> int:
        """Measure, print the tables; 1 if ghost_ops failed a check, 130 if interrupted, 2 if
        nothing could be measured."""
        arguments = self.parse(argv)
        try:
            require("numpy", "quantiles")
            if reason := self.unavailable(arguments):
                raise ValueError(reason)
            options = {"malloc": self.malloc, "measure_limits": self.measure_limits}
            run = runner.start(self.name, argv, arguments, **options)
        except (MissingExtra, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if "default_providers" in arguments:
            engines.print_missing()
        status = run.run(self.tasks(run))
        run.save(complete=status == 0)
        print(text([*self.tables(run.rows), of_means(self.means(run.rows))]))
        for failure in failures(run.rows):
            print(f"FAILED {failure}")
            status = status or 1
        print(f"Rows written to {run.path}")
        return status


def each(
    name: str, given: argparse.Namespace, batches: Sequence[int], work: Callable[[Subject], None]
) -> list[Task]:
    """``work`` on every shape at every batch size, one task each."""

    def task(shape: Shape, batch: int) -> None:
        work(Subject(shape, batch, given.dtype))

    return [
        (f"{name}b{batch} {shape.name}", functools.partial(task, shape, batch))
        for batch in batches
        for shape in given.shapes
    ]
