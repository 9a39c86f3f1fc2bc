"""What the scripts share: command line, machine set-up, progress, rows that survive interruption.

A script is a list of named tasks that add rows. Rows are written after each task; a run that was
interrupted goes on with the tasks that are missing when the same command is given again on the
same commit and machine (``--fresh`` starts over).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import floor, harness, report
from benchmarks.extras import MissingExtra, require

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
Task = tuple[str, Callable[[], None]]

# The contract of a row: what every row has, and what a row that was timed has besides.
ROW_FIELDS: dict[str, type | tuple[type, ...]] = {
    "question": str,
    "mode": str,
    "shape": str,
    "dtype": str,
    "layout": str,
    "batch": int,
    "threads": int,
    "provider": str,
}
TIMED_FIELDS: dict[str, type | tuple[type, ...]] = {
    "median_s": float,
    "p20_s": float,
    "p80_s": float,
    "rounds": int,
    "repeats": int,
    "bytes": int,
    "flops": int,
    "gbytes_per_s": float,
    "gflops": float,
    "floor_s": float,
    "floors": float,
    "bound": str,
}
META_FIELDS = ("date", "command", "cpu", "cores", "torch", "python", "commit", "threads", "clock")


def check_row(row: Mapping[str, Any]) -> None:
    """Refuse a row that readers of the results could not use.

    Raises:
        ValueError: naming the field, what it holds and what was expected; a row without time says
            why in ``note`` or holds bytes instead (``saved_total``, ``peak_bytes``) or an error.
    """
    fields = dict(ROW_FIELDS)
    if row.get("median_s") is not None:
        fields |= TIMED_FIELDS
    elif not {"note", "saved_total", "peak_bytes", "mse"} & set(row):
        raise ValueError(f"row without median_s, bytes or note: {dict(row)}")
    for name, kind in fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"row field {name!r}: expected {kind}, got {value!r} in {dict(row)}")
    if row.get("median_s") is not None and not row["p20_s"] <= row["median_s"] <= row["p80_s"]:
        raise ValueError(f"row quantiles out of order in {dict(row)}")


def check_document(document: Mapping[str, Any]) -> None:
    """Check a results file of any script that uses a session.

    Raises:
        ValueError: a part or a field is missing or of the wrong type.
    """
    for part in ("meta", "rows", "question", "complete", "done"):
        if part not in document:
            raise ValueError(f"results: no {part!r} in it")
    missing = [name for name in META_FIELDS if name not in document["meta"]]
    if missing:
        raise ValueError(f"results: meta lacks {', '.join(missing)}")
    for row in document["rows"]:
        check_row(row)


def make_parser(question: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{question}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="less of everything, in a minute")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, help="samples per provider (15, or 5 with --quick)")
    parser.add_argument(
        "--malloc", choices=("tuned", "default"), default="tuned", help="allocator, for all"
    )
    parser.add_argument("--no-pin", action="store_true", help="do not pin the threads to cores")
    parser.add_argument(
        "--clock",
        choices=tuple(harness.CLOCKS),
        default="wall",
        help="cpu: CPU time, for a machine that others use too (one thread only)",
    )
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted earlier run")
    parser.add_argument(
        "--out", type=Path, default=Path(f"results/{question}.json"), help="JSON rows go here"
    )
    return parser


def add_compile_options(parser: argparse.ArgumentParser, default: str) -> None:
    """``--compile`` and ``--compile-minutes``, for scripts in which torch.compile takes part.

    Args:
        parser: gets the options.
        default: of ``--compile``, without ``--quick``.
    """
    parser.add_argument(
        "--compile",
        choices=("none", "eval", "all"),
        help=f"modes in which torch.compile runs too (default: {default}, none with --quick)",
    )
    parser.add_argument(
        "--compile-minutes",
        type=float,
        default=math.inf,
        help="leave torch.compile out once compiling has taken as long (its cache makes the next "
        "run cheaper)",
    )


def check_compile_options(arguments: argparse.Namespace, default: str) -> None:
    """Fill in ``--compile``; ValueError for minutes below zero."""
    if not arguments.compile_minutes >= 0:
        got = arguments.compile_minutes
        raise ValueError(f"compile-minutes: expected a number from 0 up, got {got}")
    arguments.compile = arguments.compile or ("none" if arguments.quick else default)


def compile_modes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The modes that ``--compile`` names."""
    return {"none": (), "eval": ("eval",), "all": ("eval", "train")}[arguments.compile]


def parse(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    check: Callable[[argparse.Namespace], None] = lambda arguments: None,
) -> argparse.Namespace:
    """Parse and check; argparse exits with a message where ``check`` raises ValueError."""
    arguments = parser.parse_args(argv)
    try:
        for name in ("rounds", "threads"):
            value = getattr(arguments, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if arguments.clock == "cpu" and arguments.threads != 1:
            raise ValueError(f"clock: cpu time needs --threads 1, got {arguments.threads}")
        if arguments.rounds is None:
            arguments.rounds = 5 if arguments.quick else 15
        arguments.dtype = DTYPES[arguments.dtype]
        check(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _fingerprint(meta: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped."""
    given = {k: str(v) for k, v in sorted(vars(arguments).items()) if k not in ("out", "fresh")}
    machine = {key: str(meta.get(key)) for key in ("cpu", "torch", "commit", "allocation")}
    return {**machine, "instructions": harness.instructions(meta), "arguments": given}


def _earlier(path: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The unfinished results of the same command, if ``path`` holds them."""
    try:
        document = json.loads(path.read_text())
        check_document(document)
    except (OSError, ValueError):
        return None
    unfinished = not document["complete"] and document["rows"]
    return document if unfinished and document.get("fingerprint") == fingerprint else None


class Session:
    """One run of one script: its machine, its limits, its rows.

    Args:
        question: name of the script; every row carries it.
        arguments: the parsed command line.
        console: where to print.
        meta: see :func:`benchmarks.harness.metadata`.
        roofline: limits measured in this run, or None for scripts that time nothing.
        out: results file.
    """

    def __init__(
        self,
        question: str,
        arguments: argparse.Namespace,
        console: Any,
        meta: dict[str, Any],
        roofline: floor.Roofline | None,
        out: Path,
    ) -> None:
        self.question, self.arguments, self.console = question, arguments, console
        self.meta, self.roofline, self.out = meta, roofline, out
        self.fingerprint = _fingerprint(meta, arguments)
        self.rows: list[dict[str, Any]] = []
        self.done: list[str] = []
        self._fresh_rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._earlier_seconds = 0.0
        earlier = None if arguments.fresh else _earlier(out, self.fingerprint)
        if earlier is not None:
            self.rows, self.done = earlier["rows"], earlier["done"]
            self._earlier_seconds = earlier["meta"].get("seconds", 0.0)
            console.print(f"Going on with {out}: {len(self.done)} tasks were done before")

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add a row; it is checked and written when its task ends."""
        row = {"question": self.question, **row}
        self._fresh_rows.append(row)
        return row

    def unsaved(self) -> list[dict[str, Any]]:
        """The rows that the task in progress has added so far."""
        return self._fresh_rows

    def save(self, *, complete: bool = False, summary: Any = None) -> None:
        """Write everything so far."""
        seconds = self._earlier_seconds + time.monotonic() - self._started
        harness.write_json(
            self.out,
            {
                "question": self.question,
                "meta": {**self.meta, "seconds": round(seconds, 1)},
                "fingerprint": self.fingerprint,
                "complete": complete,
                "done": self.done,
                "roofline": None if self.roofline is None else self.roofline.to_json(),
                "summary": summary,
                "rows": self.rows,
            },
        )

    def run(self, tasks: Iterable[Task]) -> int:
        """Run the tasks that are not done yet; returns 0, or 130 if interrupted."""
        tasks = list(tasks)
        try:
            with self._progress(len(tasks)) as report_start:
                for name, work in tasks:
                    report_start(name)
                    if name not in self.done:
                        self._run_one(name, work)
        except KeyboardInterrupt:
            self._fresh_rows.clear()
            self.save()
            self.console.print(
                f"[yellow]interrupted: {len(self.done)} of {len(tasks)} tasks are kept; the same "
                "command goes on from there[/]"
            )
            return 130
        return 0

    @contextlib.contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[str], None]]:
        """A bar on a terminal, a line a task elsewhere; gives what to call as a task starts."""
        if not self.console.is_terminal:
            count = itertools.count(1)

            def line(name: str) -> None:
                seconds = time.monotonic() - self._started
                self.console.print(f"  {next(count)} of {total}, after {seconds:.0f} s: {name}")

            yield line
            return
        progress = require("rich.progress", "the progress bar")
        columns = (*progress.Progress.get_default_columns(), progress.TimeElapsedColumn())
        with progress.Progress(*columns, console=self.console, transient=True) as bar:
            shown = bar.add_task("", total=total, completed=-1)

            def start(name: str) -> None:
                bar.advance(shown)
                bar.update(shown, description=name)

            yield start

    def _run_one(self, name: str, work: Callable[[], None]) -> None:
        self._fresh_rows.clear()
        work()
        for row in self._fresh_rows:
            check_row(row)
        self.rows += self._fresh_rows
        self._fresh_rows.clear()
        self.done.append(name)
        self.save()


def start(
    question: str,
    argv: Sequence[str],
    arguments: argparse.Namespace,
    *,
    settings: Mapping[str, str] = harness.TUNED_MALLOC,
    extras: Sequence[tuple[str, str, str]] = (),
    measure_limits: bool = True,
) -> Session | None:
    """Set up the machine and print what it is; None if that failed (the reason is on stderr).

    Args:
        question: name of the script, a module of this package.
        argv: its command line, for the re-execution with another allocator.
        arguments: the same, parsed.
        settings: the allocator's environment.
        extras: (module, purpose, pip extra) needed besides NumPy and rich.
        measure_limits: measure GEMM peak and bandwidth.
    """
    try:
        console = report.console_for_tables()
        for name, purpose, extra in (("numpy", "quantiles", "bench"), *extras):
            require(name, purpose, extra=extra)
        out = harness.prepare_output(arguments.out)
        allocation = "default allocator, untouched (--malloc default)"
        if arguments.malloc == "tuned":
            allocation = harness.use_tuned_malloc(f"benchmarks.{question}", argv, settings)
        cores = harness.set_threads(arguments.threads, pin=not arguments.no_pin)
    except (MissingExtra, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
    meta = harness.metadata(
        threads=arguments.threads, cores=cores, allocation=allocation, clock=arguments.clock
    )
    harness.print_header(console, meta)
    roofline = None
    if measure_limits:
        console.print("Measuring GEMM peak and bandwidth ...")
        roofline = floor.measure_roofline(
            arguments.dtype, **floor.QUICK_LIMITS if arguments.quick else {}
        )
        rates = zip(roofline.copy_bytes, roofline.bandwidth, strict=True)
        console.print(
            f"GEMM peak {roofline.gemm_peak / 1e9:.1f} GFLOP/s (n = {roofline.gemm_size}); copy "
            "GB/s: " + ", ".join(f"{size >> 10} KiB {rate / 1e9:.0f}" for size, rate in rates)
        )
        console.print(f"Copies: torch, memcpy and vector loops ({floor.native_copies()[1]})")
    return Session(question, arguments, console, meta, roofline, out)


def finish(session: Session, status: int, summary: Any, failures: Sequence[str] = ()) -> int:
    """Write the final results, print failures; returns the exit status (1 if ours failed)."""
    session.save(complete=status == 0, summary=summary)
    for failure in failures:
        session.console.print(f"[red]FAILED[/] {report.escape(failure)}")
        status = status or 1
    session.console.print(f"Rows written to {session.out}")
    return status
