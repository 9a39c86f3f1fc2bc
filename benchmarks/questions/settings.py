"""What does each setting change: memory format, dtype, threads, allocator, compiler, mode, batch?

    python -m benchmarks settings                     the ratios, as a table
    python -m benchmarks settings --out benchmarks/results/settings.json --page docs/settings.md

A fused GhostNet 1.0x (batch 1 and 16) and a fused Ghost module (batch 16) run in eval mode as a
newcomer has them: NCHW, float32, all cores, glibc's allocator as it is, ``inference_mode``. Each
setting changes one of these. An allocator is chosen when a process starts: each allocator and
number of threads has a process of its own, and the processes take turns, one sample at a time.
Outputs are checked against float64 first. ``--page`` writes the table between two marks of a page.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import floor, machine, providers, timing
from benchmarks.harness.machine import require
from benchmarks.harness.measure import Measurer, common
from benchmarks.harness.providers import CHANNELS_LAST, NCHW, Provider
from benchmarks.harness.rows import Point, Row, load, ratio, timed
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.shapes import Shape
from benchmarks.harness.subjects import NetworkSubject, Subject, ghostnet
from benchmarks.questions.question import Question, number
from benchmarks.report.table import Table, untimed

GLIBC = "glibc"
# Environment of a process by allocator. The two libraries are those of Debian's packages
# libtcmalloc-minimal4 and libjemalloc2.
ALLOCATORS: dict[str, Mapping[str, str]] = {
    GLIBC: {},
    "tuned glibc": machine.TUNED_MALLOC,
    "tcmalloc": {"LD_PRELOAD": "libtcmalloc_minimal.so.4"},
    "jemalloc": {"LD_PRELOAD": "libjemalloc.so.2"},
}
MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": contextlib.nullcontext,
}
MARKS = ("<!-- settings: from here -->", "<!-- settings: to here -->")


@dataclass(frozen=True)
class Setting:
    """What a process and a call are set to; ``batch`` and ``threads`` 0: the column's, all."""

    title: str
    advice: str = ""
    layout: str = NCHW
    dtype: str = "float32"
    threads: int = 0
    allocator: str = GLIBC
    compiled: bool = False
    mode: str = "inference_mode"
    batch: int = 0

    @property
    def process(self) -> tuple[str, int]:
        """What a process is started with."""
        return self.allocator, self.threads or machine.CORE_COUNT


BASE = Setting("base")
SETTINGS = (
    Setting("channels_last", "where your data and other layers have it already", CHANNELS_LAST),
    Setting("bfloat16", "with AMX; else for the memory", dtype="bfloat16"),
    Setting("bfloat16, channels_last", "with AMX the fastest", CHANNELS_LAST, "bfloat16"),
    Setting("float16", "on a GPU; on a CPU for the memory", dtype="float16"),
    Setting("one thread", "for many processes side by side: one each", threads=1),
    Setting("tuned glibc", "modules with large maps", allocator="tuned glibc"),
    Setting("tcmalloc", "instead of tuning glibc", allocator="tcmalloc"),
    Setting("jemalloc", "not with its default settings", allocator="jemalloc"),
    Setting("torch.compile", "models fused in part only", compiled=True),
    Setting("no_grad", "where views of the output are changed in place", mode="no_grad"),
    Setting("gradients on", "never for inference: fuses module by module only", mode="grad"),
    Setting("batch 4", "images a second", batch=4),
    Setting("batch 64", "images a second; beyond the caches less", batch=64),
)


@dataclass(frozen=True)
class Column:
    """What is run; the batch of a setting replaces its own if ``many``."""

    title: str
    batch: int
    network: bool
    many: bool = False

    def subject(self, dtype: torch.dtype, batch: int, size: int) -> Subject:
        """The model and its input."""
        if self.network:
            return NetworkSubject(ghostnet(1.0), size, batch, dtype)
        return Subject(Shape(40, 240, 28), batch, dtype)


COLUMNS = (
    Column("GhostNet, batch 1", 1, True),
    Column("GhostNet, batch 16", 16, True, True),
    Column("40 -> 240 at 28x28, batch 16", 16, False, True),
)


def pairs(quick: bool) -> list[tuple[Setting, Column]]:
    """Every setting in every column that it changes, the base first; with ``quick`` without the
    compiler, without float16, whose peak takes long to measure, and without the second column."""
    slow = [s for s in SETTINGS if quick and (s.compiled or s.dtype == "float16")]
    chosen = [BASE, *(s for s in SETTINGS if s not in slow)]
    columns = COLUMNS[::2] if quick else COLUMNS
    return [(s, column) for column in columns for s in chosen if column.many or not s.batch]


# ---- a process of one allocator and one number of threads


class Worker:
    """Builds and times calls in a process of its own."""

    def __init__(self, allocator: str, threads: int, pin: bool, size: int) -> None:
        wanted = ALLOCATORS[allocator].get("LD_PRELOAD", "")
        maps = Path("/proc/self/maps")
        loaded = not wanted or (maps.exists() and wanted.split(".")[0] in maps.read_text())
        self.missing = "" if loaded else f"{wanted} is not installed"
        machine.set_threads(threads, pin=pin)
        self.size, self.calls = size, {}
        self.subject, self.module = map(functools.cache, (self.subject, self.module))
        self.errors = functools.cache(self.errors)

    def subject(self, column: Column, dtype: torch.dtype, batch: int) -> Subject:
        """Model and input of a column."""
        return column.subject(dtype, batch, self.size)

    def module(self, network: bool, layout: str, dtype: torch.dtype, compiled: bool) -> Any:
        """A fused model, the same for every batch."""
        column = next(c for c in COLUMNS if c.network == network)
        plain = self.subject(column, dtype, column.batch).plain
        module = providers.build(Provider("fused", layout), plain, training=False)
        return torch.compile(module, dynamic=False) if compiled else module

    def errors(self, column: Column, dtype: torch.dtype, batch: int) -> tuple[Any, list[float]]:
        """The first outputs in float64, and the error of plain PyTorch."""
        subject = self.subject(column, dtype, batch)
        plain, x = copy.deepcopy(subject.plain).eval(), subject.x[subject.images]
        with torch.no_grad():
            eager = plain(x)
            exact = plain.double()(x.double())
        return exact, timing.relative_errors([eager], [exact])

    def build(self, setting: Setting, column: Column) -> dict[str, Any]:
        """Build and check one call; its row without times."""
        dtype, batch = getattr(torch, setting.dtype), setting.batch or column.batch
        subject, provider = self.subject(column, dtype, batch), Provider("fused", setting.layout)
        row = common("eval", subject, provider)
        row |= {"bytes": subject.work[0], "flops": subject.work[1]}
        compiler = providers.compile_unavailable() if setting.compiled else None
        if reason := self.missing or compiler:
            return row | {"note": f"skipped: {reason}"}
        module = self.module(column.network, setting.layout, dtype, setting.compiled)
        x, (exact, eager) = provider.input(subject.x), self.errors(column, dtype, batch)
        with machine.unpinned() if setting.compiled else contextlib.nullcontext():
            self.timed(setting, module, x, 1)  # the first call compiles
        with MODES[setting.mode]():
            out = module(x)[subject.images].detach()
        errors = timing.relative_errors([out], [exact])
        check = timing.check_errors(errors, eager, subject.allowed(1))
        if not check.ok:
            return row | {"note": f"wrong result: error {check.error:.2e}"}
        seconds = self.timed(setting, module, x, 2)
        repeats = min(max(1, round(20e-3 / max(seconds, 1e-9))), timing.MOST_REPEATS)
        self.calls[setting, column] = functools.partial(self.timed, setting, module, x)
        return row | {**asdict(check), "repeats": repeats}

    @staticmethod
    def timed(setting: Setting, module: Any, x: torch.Tensor, repeats: int) -> float:
        """Seconds of a call; the result is freed as a user's is."""
        with MODES[setting.mode]():
            start = time.perf_counter()
            for _ in range(repeats):
                module(x)
            return (time.perf_counter() - start) / repeats

    def sample(self, setting: Setting, column: Column, repeats: int) -> float:
        """Seconds of a call in one sample, behind one call that warms caches and threads."""
        call = self.calls[setting, column]
        call(1)
        return call(repeats)


def serve(connection: Connection, *arguments: Any) -> None:
    """Answer requests until None comes."""
    worker = Worker(*arguments)
    while (request := connection.recv()) is not None:
        name, *given = request
        try:
            connection.send(getattr(worker, name)(*given))
        except Exception as error:
            connection.send({"failed": f"failed: {type(error).__name__}: {str(error)[:300]}"})


class Remote:
    """The other end: starts the process under its allocator."""

    def __init__(self, process: tuple[str, int], pin: bool, size: int) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = (theirs, *process, pin, size)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        before = dict(os.environ)
        for name in [*before]:
            if name.startswith("MALLOC_") or name == "LD_PRELOAD":
                del os.environ[name]
        os.environ.update(ALLOCATORS[process[0]])
        try:
            with machine.unpinned():
                self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def ask(self, *request: Any) -> Any:
        """The answer to one request."""
        self.connection.send(request)
        return self.connection.recv()

    def end(self) -> None:
        """Let the process end."""
        self.connection.send(None)
        self.process.join(10)


# ---- the question


class Settings(Question):
    name = "settings"
    title = "What to set"
    purpose = "memory format, dtype, threads, allocator, compiler, mode, batch: ratio of each"
    full = ("--rounds", "9")
    measure_limits = False

    def options(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--size", type=number(32), help="of the images (224, or 64 with --quick)")
        add("--page", type=Path, help="write the table between the marks of this page")

    def check(self, arguments: argparse.Namespace) -> None:
        arguments.size = arguments.size or (64 if arguments.quick else 224)
        # The settings say what is varied; the process that asks allocates nothing of interest.
        if arguments.clock != "wall" or arguments.threads != 1:
            raise ValueError("settings: threads are a setting, times are those of a wall clock")
        if arguments.dtype is not torch.float32:
            raise ValueError("settings: dtype is a setting")
        arguments.malloc = "default"
        if arguments.page is not None and not set(MARKS) <= {*lines_of(arguments.page)}:
            raise ValueError(f"page: expected a file with the lines {' and '.join(MARKS)}")

    def tasks(self, run: Session) -> list[Task]:
        """One task: what takes turns runs at once."""
        return [("all settings in turn", functools.partial(self.measure, run))]

    def measure(self, run: Session) -> None:
        """Build all calls, take the samples in rounds, add the rows."""
        given, found = run.arguments, pairs(run.arguments.quick)
        limits = {s: self.limits(s.process[1], s.dtype) for s, _ in found}
        started = dict.fromkeys(s.process for s, _ in found)
        remotes = {p: Remote(p, not given.no_pin, given.size) for p in started}
        rows = {}
        for setting, column in found:
            print(f"    {column.title}: {setting.title}", flush=True)
            row = remotes[setting.process].ask("build", setting, column)
            if "failed" in row:
                row = {**rows[BASE, column], "note": row["failed"]}
            fields = {"setting": setting.title, "column": column.title, "median_s": None}
            rows[setting, column] = run.add({**row, **fields})
        ready = [pair for pair in found if "note" not in rows[pair]]
        samples: dict[Any, list[float]] = {pair: [] for pair in ready}
        for _ in range(given.rounds):
            for pair in ready:
                time.sleep(5e-3)  # until the threads of the process before have stopped spinning
                remote, repeats = remotes[pair[0].process], rows[pair]["repeats"]
                samples[pair].append(remote.ask("sample", *pair, repeats))
        for remote in remotes.values():
            remote.end()
        numpy = require("numpy", "quantiles")
        for pair, seconds in samples.items():
            row, roofline = rows[pair], limits[pair[0]]
            row["floor_s"] = roofline.floor(row["bytes"], row["flops"])
            row["bound"] = roofline.bound(row["bytes"], row["flops"])
            quantiles = numpy.quantile(seconds, (0.5, 0.2, 0.8)).tolist()
            check = timing.Check(row["error"], row["eager_error"], row["allowed"])
            Measurer.fill(row, timing.Timing(*quantiles, given.rounds, row["repeats"]), check)
        if given.page is not None:
            into_page(given.page, {"meta": run.meta, "rows": list(rows.values())}, given.out)

    @functools.cache  # noqa: B019
    def limits(self, threads: int, dtype: str) -> floor.Roofline:
        """Peak and bandwidth, for the floors."""
        machine.set_threads(threads, pin=False)
        return floor.measure_roofline(getattr(torch, dtype), **floor.QUICK_LIMITS)

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        body = [[line[0], *line[1:-1]] for line in ratios(rows)]
        title = "Times as many images a second as the base; the base in milliseconds"
        return [Table(title, ["setting", *(c.title for c in COLUMNS)], body), untimed(rows)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        for row in timed(rows):
            base = base_of(rows, row)
            if base is not None and row["setting"] != BASE.title:
                value = tuple(r * row["batch"] / base["batch"] for r in ratio(base, row))
                yield Point(f"{row['setting']}: images a second", value, row["column"])


def base_of(rows: Iterable[Row], row: Row) -> Row | None:
    """The timed row of the base in the same column."""
    same = (r for r in timed(rows) if r["column"] == row["column"] and r["setting"] == BASE.title)
    return next(same, None)


def ratios(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each setting: its title, a cell for each column, its advice."""
    by = {(row["setting"], row["column"]): row for row in rows}
    lines = []
    for setting in (BASE, *SETTINGS):
        line = [setting.title]
        for column in COLUMNS:
            row = by.get((setting.title, column.title))
            base = by.get((BASE.title, column.title))
            if row is None or base is None or row["median_s"] is None or base["median_s"] is None:
                line.append("")
            elif setting is BASE:
                line.append(f"{1e3 * row['median_s']:.2f} ms")
            else:
                value = base["median_s"] / row["median_s"] * row["batch"] / base["batch"]
                line.append(f"{value:.2f}x")
        if any(line[1:]):
            lines.append([*line, setting.advice])
    return lines


# ---- the page


def lines_of(page: Path) -> list[str]:
    """The lines of a page; none if there is no such file."""
    return page.read_text().splitlines() if page.is_file() else []


def section(document: Mapping[str, Any], link: str) -> str:
    """The table of a results file in Markdown, with its machine and a link to its rows."""
    meta = document["meta"]
    cores = max(row["threads"] for row in document["rows"])
    isa = machine.instructions(meta)
    text = [f"{meta['cpu']}, {cores} cores, {isa}, torch {meta['torch']}, {meta['date'][:10]}"]
    text += [f"([rows]({link}), `{meta['command']}`):", ""]
    text += ["| " + " | ".join(["setting", *(c.title for c in COLUMNS), "take it"]) + " |"]
    text += ["|---" * (len(COLUMNS) + 2) + "|"]
    text += ["| " + " | ".join(line) + " |" for line in ratios(document["rows"])]
    return "\n".join(text)


def into_page(page: Path, document: Mapping[str, Any], rows_file: Path) -> None:
    """Write the table between the marks of a page."""
    link = os.path.relpath(rows_file, page.parent)
    begin, end = map(re.escape, MARKS)
    body = f"{MARKS[0]}\n\n{section(document, link)}\n\n{MARKS[1]}"
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: body, page.read_text(), flags=re.S))


def is_current(page: Path) -> bool:
    """Whether the table of a page is that of the rows that it links; true without a link."""
    text = page.read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    link = re.search(r"\[rows\]\(([^)]+)\)", text)
    return link is None or text.strip() == section(load(page.parent / link[1]), link[1])
