"""The class of all questions: command line, measurement, tables."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import engines, floor, machine, providers, shapes, timing
from benchmarks.harness.machine import MissingExtra, require
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


class Question:
    """One question: its options, its measurement and its tables."""

    name: str  # of its command and of its results file, <name>.json
    title: str  # of its section in the report
    purpose: str  # one line for the list
    full: tuple[str, ...] = ("--rounds", "9")  # its arguments in ``python -m benchmarks all``
    quick: tuple[str, ...] = ("--quick",)  # and with --quick
    malloc: Mapping[str, str] = machine.TUNED_MALLOC  # the allocator that it runs with
    measure_limits = True  # GEMM peak and bandwidth
    has_batches = has_shapes = False  # whether it takes --batch, several sizes, and --shapes
    default_providers: tuple[str, ...] = ()  # default of --providers
    with_engines = True  # whether engines that are installed are among its providers
    default_compile = ""  # default of --compile, where torch.compile takes part

    def options(self, parser: argparse.ArgumentParser) -> None:
        """Add its own options."""

    def check(self, arguments: argparse.Namespace) -> None:
        """Complete its parsed options; ValueError for bad ones."""

    def unavailable(self, arguments: argparse.Namespace) -> str | None:
        """Why it cannot be measured here, or None."""
        return None

    def tasks(self, run: Session) -> list[Task]:
        """Its work in one session."""

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """The tables of its rows, for the console and the report."""

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        """The values behind its geometric means."""

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
        if self.has_batches:
            sizes = "batch sizes (train: the largest)"
            add("--batch", type=POSITIVE, nargs="+", default=[1, 16], help=sizes)
        if self.has_shapes:
            names = "all, ghostnet, yolo, quick, names or globs (default: all; --quick: quick)"
            add("--shapes", nargs="+", help=names)
        if self.default_providers:
            default = ", ".join(self.default_providers)
            default += ", and the engines that are installed" if self.with_engines else ""
            names = f"names, families, globs or all (default: {default})"
            add("--providers", nargs="+", help=names)
        if self.default_compile:
            modes = f"modes of torch.compile (default: {self.default_compile}; --quick: none)"
            add("--compile", choices=("none", "eval", "all"), help=modes)
            kind, most = number(0, kind=float), "no more compiling once it has taken as long"
            add("--compile-minutes", type=kind, default=math.inf, help=most)
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
        if self.default_providers:
            named = arguments.providers
            if self.with_engines:
                arguments.providers = engines.choose(named, self.default_providers)
            else:
                arguments.providers = providers.select(named or self.default_providers)
        if self.default_compile:
            arguments.compile = arguments.compile or ("none" if quick else self.default_compile)
        self.check(arguments)

    def start(self, argv: Sequence[str], arguments: argparse.Namespace) -> Session:
        """Set up the machine, print what it is and measure its limits.

        Raises OSError if the results file cannot be written, ValueError for too many threads.
        """
        machine.prepare_output(arguments.out)
        words = [self.name, *argv]
        allocation = "default allocator, untouched (--malloc default)"
        if arguments.malloc == "tuned":
            allocation = machine.use_malloc(self.malloc, words)
        cores = machine.set_threads(arguments.threads, pin=not arguments.no_pin)
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
        meta = machine.metadata(words, cores=cores, allocation=allocation, clock=arguments.clock)
        machine.print_header(meta)
        roofline = None
        if self.measure_limits:
            print("Measuring GEMM peak and bandwidth ...", flush=True)
            less = floor.QUICK_LIMITS if arguments.quick else {}
            roofline = floor.measure_roofline(arguments.dtype, **less)
            print(roofline)
            print(f"Copies: torch, memcpy and vector loops ({floor.native_copies()[1]})")
        return Session(self.name, arguments, meta, roofline)

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
            run = self.start(argv, arguments)
        except (MissingExtra, OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if self.default_providers and self.with_engines:
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

    def task(shape: Shape, batch: int) -> Task:
        label = f"{name}b{batch} {shape.name}"
        return label, lambda: work(Subject(shape, batch, given.dtype))

    return [task(shape, batch) for batch in batches for shape in given.shapes]
