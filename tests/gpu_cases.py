"""What the tests of the GPU report share: made-up rows, a report, stand-ins for its workers.

Every number in the rows is made up by this file.
"""

from __future__ import annotations

import pathlib
import sys
import time
from typing import Any

import fake_gpu
import pytest

from benchmarks import (
    gpu_report,
    gpu_session,
    gpu_timing,
    gpu_worker,
    shapes,
)
from benchmarks.gpu_session import Part, Report

ROOT = pathlib.Path(__file__).resolve().parent.parent
META = {"gpu": "No GPU at all", "torch": "0", "sources": "abc", "synthetic": "a test's fixture"}
COPY = {"bytes": [1 << 10, 1 << 20], "bytes_per_s": [1e9, 3e9], "float16_flops": 1e12}


def synthetic_row(shape: str, provider: str, seconds: float | None, **more: Any) -> dict[str, Any]:
    """A row as time_shape makes them, with a time that nobody measured."""
    row = {
        "question": "gpu", "mode": "eval", "shape": shape, "group": "ghostnet", "count": 1,
        "dtype": "float16", "layout": "nchw", "batch": 256, "provider": provider, "bytes": 1000,
        "median_s": seconds,
    }  # fmt: skip
    if seconds is not None:
        share = 1e-6 / seconds
        row |= {"call_s": 2 * seconds, "share_of_copy": share, "share_of_largest_copy": share / 2}
        row |= {"queued_ahead": provider != "eager_cl"}
    return {**row, **more}


SYNTHETIC = [
    synthetic_row("a", "eager_nchw", 8e-6),
    synthetic_row("a", "eager_cl", 4e-6),
    synthetic_row("a", "native_cl", 1e-6),
    synthetic_row("a", "compile_cl", 2e-6),
    synthetic_row("b", "eager_nchw", 9e-6),
    synthetic_row("b", "native_cl", 9e-6),
    synthetic_row("b", "compile_cl", 3e-6),
    synthetic_row("b", "triton_cl", None, note="skipped: not there"),
    synthetic_row("a", "eager_cl", None, mode="memory", kept=8 * 2**20, peak=9 * 2**20),
    synthetic_row("a", "native_cl", None, mode="memory", kept=2**20, peak=3 * 2**20),
]


def new_report(path: pathlib.Path, minutes: float = 1.0, **more: Any) -> Report:
    chosen = more.pop("chosen", shapes.QUICK[:3])
    return Report(path, more.pop("meta", META), minutes, chosen, **more)


SMALL = shapes.Shape(8, 12, 7)


# Its child outlives it and holds its output open, as ninja and nvcc do.
PATIENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; a moment later, as it may just be ending."""
    for _ in range(50):
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


SANITIZER = """#!/usr/bin/env python3
import sys
print("29 right, {wrong} wrong")
print("========= {summary}")
raise SystemExit({code})
"""


def workers(monkeypatch: pytest.MonkeyPatch, *command: str) -> None:
    """Has the report start another program as its worker."""
    whole = (sys.executable, *command)
    monkeypatch.setattr(gpu_session, "Worker", lambda *g: gpu_worker.Worker(*g, command=whole))


def eval_part(*names: str) -> Part:
    what = gpu_report.Measurement("eval", "time", "eval", "float32", 1, names)
    return Part("p", lambda report: gpu_report.measure(report, what))


def failing(monkeypatch: pytest.MonkeyPatch, name: str, lose: bool = False) -> None:
    build = gpu_timing.build

    def fail(candidate: Any, *rest: Any) -> Any:
        if candidate.name == name:
            fake_gpu.Device.lost = lose
            raise RuntimeError("no kernel image")
        return build(candidate, *rest)

    monkeypatch.setattr(gpu_timing, "build", fail)
