"""How much memory does a training step take at its peak, eager against fused?

    python -m benchmarks memory

Peak: by how much the resident memory of the process grows during forward + backward, beyond model,
input and grad_out, which exist before; from the kernel's high-water mark (Linux), so that scratch
of any library counts. The step before it has set up thread pools and workspaces, and freed heap
memory is given back first. Saved: bytes that autograd keeps between forward and backward. GhostNet
is run whole, the modules one by one.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.harness import machine, measure, providers, subjects, timing
from benchmarks.harness.rows import Point, Row, eager_and_ours
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.subjects import NetworkSubject, Subject
from benchmarks.questions.question import POSITIVE, Question, number
from benchmarks.report.table import Table, times

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{STATUS} has no {field}")


def unavailable() -> str | None:
    """Why peaks cannot be measured here, or None."""
    try:
        CLEAR.write_text("5")
        _kilobytes("VmHWM")
    except OSError as error:
        return f"peak memory is read from {STATUS.parent}, which does not work here: {error}"
    return None


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory rises at most during the second of two calls."""
    call()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # resets the high-water mark
    before = _kilobytes("VmRSS")
    call()
    return 1024 * max(0, _kilobytes("VmHWM") - before)


def measure_peak(run: Session, make: Callable[[], Subject]) -> None:
    """One subject: what its forward keeps and the peak of forward + backward, by provider."""
    subject = make()
    for provider in run.arguments.providers:
        module = providers.build(provider, subject.plain, training=True)
        bound = subject.bind(module, provider.input)
        saved = timing.saved_bytes(functools.partial(module, bound.x), module)["total"]
        peak = peak_growth(bound.backward)
        row = measure.common("peak", subject, provider)
        run.add({**row, "x_bytes": subject.x.nbytes, "saved_total": saved, "peak_bytes": peak})


KEYS = {"peak_bytes": "peak", "saved_total": "saved"}


class Memory(Question):
    name = "memory"
    title = "Memory of a training step"
    purpose = "peak memory of a training step, eager against fused"
    full = ()
    malloc = machine.LEAN_MALLOC
    measure_limits = False
    has_shapes = True
    default_providers = ("eager", "fused")
    with_engines = False

    def unavailable(self, _: argparse.Namespace) -> str | None:
        return unavailable()

    def options(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--batch", type=POSITIVE, help="images (16, or 4 with --quick)")
        width = number(0.01, kind=float)
        add("--width", type=width, help="of GhostNet (1.0, or 0.5 with --quick)")
        add("--size", type=POSITIVE, help="of its images (224, or 96 with --quick)")

    def check(self, arguments: argparse.Namespace) -> None:
        default = (4, 0.5, 96) if arguments.quick else (16, 1.0, 224)
        for name, value in zip(("batch", "width", "size"), default, strict=True):
            setattr(arguments, name, getattr(arguments, name) or value)
        # What torch.compile allocates passes no hook, and folded modules do not train.
        arguments.providers = [p for p in arguments.providers if p.family in ("eager", "fused")]

    def tasks(self, run: Session) -> list[Task]:
        given, network = run.arguments, subjects.ghostnet(run.arguments.width)
        more = given.batch, given.dtype
        whole = functools.partial(NetworkSubject, network, given.size, *more)
        make = {shape.name: functools.partial(Subject, shape, *more) for shape in given.shapes}
        parts = {network.title: whole, **make}.items()
        return [(name, functools.partial(measure_peak, run, one)) for name, one in parts]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        body: dict[str, list[str]] = {}
        for key in KEYS:
            for label, eager, ours in eager_and_ours(rows, key):
                mib = f"{eager / 2**20:.2f}", f"{ours / 2**20:.2f}"
                body.setdefault(label, [label]).extend((*mib, times(eager / max(ours, 1))))
        three = [(f"{name}, MiB: eager", "ours", "eager / ours") for name in KEYS.values()]
        headings = ("training step", *three[0], *three[1])
        return [Table("Memory of a training step", headings, list(body.values()))]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        for key, name in KEYS.items():
            for label, eager, ours in eager_and_ours(rows, key):
                if (ratio := eager / max(ours, 1)) > 0:
                    yield Point(f"memory: {name}, eager over ours", (ratio,) * 3, label)
