"""The parts of ``gpu_report`` that are other programs: the build, the tests, compute-sanitizer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_worker import OWN_GROUP, ROOT, end_group

if TYPE_CHECKING:
    from benchmarks.gpu_session import Report

SCRATCH = ROOT / "build" / "gpu_report"
KEPT_OUTPUT = 200_000  # characters of a program's output in the log
KEPT_REASON = 4000  # characters of it in the results file, if it failed
# What would change what runs, or how.
NOT_PASSED_ON = (
    "CUDA_LAUNCH_BLOCKING", "GHOST_OPS_BACKEND", "GHOST_OPS_TRITON_AUTOTUNE",
    "PYTEST_ADDOPTS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET",
)  # fmt: skip


class OutOfTime(Exception):
    """The time is up; what the part has so far is kept."""


# ---------------------------------------------------------------- the machine


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: from CUDA_HOME, the PATH or the usual place."""
    homes = [os.environ.get(key) for key in ("CUDA_HOME", "CUDA_PATH")]
    for folder in (*(f"{home}/bin" for home in homes if home), None, "/usr/local/cuda/bin"):
        if found := shutil.which(name, path=folder):
            return found
    return None


def scratch() -> Path:
    """A folder for caches and outputs; the same every time, where the checkout can be written."""
    try:
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=SCRATCH):
            return SCRATCH
    except OSError:
        fallback = Path(tempfile.gettempdir()) / f"gpu_report-{os.getuid()}"
        fallback.mkdir(exist_ok=True)
        return fallback


def environment() -> dict[str, str]:
    """That of all programs: this checkout, the toolkit's programs, caches that last."""
    found = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}
    paths = [str(ROOT), *filter(None, [found.get("PYTHONPATH")])]
    found["PYTHONPATH"] = os.pathsep.join(paths)
    if nvcc := find_tool("nvcc"):
        found["PATH"] = os.pathsep.join([found.get("PATH", os.defpath), str(Path(nvcc).parent)])
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    for key, name in caches.items():
        found.setdefault(key, str(scratch() / name))
    found["PYTHONUNBUFFERED"] = "1"
    return found


def processes() -> int:
    """How many processes the tests, and the compilers beside them, get."""
    return max(1, 3 * (os.cpu_count() or 1) // 8)


_log_lock = threading.Lock()


def log(report: Report, title: str, text: str) -> None:
    """Adds a program's output to the report's log."""
    with _log_lock, report.log_path.open("a") as file:
        file.write(f"\n======== {title}\n{text[-KEPT_OUTPUT:]}\n")


def run_program(
    report: Report,
    name: str,
    command: Sequence[str],
    limit: float,
    more: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Runs a program for at most ``limit`` seconds. Returns its output, which also goes into the
    log.

    Args:
        name: of its output file and in the log.
        more: added to its environment.
        folder: where it runs; the checkout by default.

    Raises:
        OutOfTime: it took longer than this report has.
        RuntimeError: it failed, with the end of its output.
    """
    seconds = min(limit, report.left())
    if seconds <= 0:
        raise OutOfTime
    path = scratch() / f"{name}.out"
    code: int | None = None
    # Into a file, not a pipe: what was printed before the time ran out stays, whoever holds it.
    with path.open("w") as file:
        process = subprocess.Popen(
            command, cwd=folder or ROOT, env={**environment(), **(more or {})},
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **OWN_GROUP,
        )  # fmt: skip
        report.children.add(process)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=seconds)
        finally:
            end_group(process)  # and what it has started
            report.children.discard(process)
    out = path.read_text(errors="replace")
    log(report, f"{name}: {' '.join(command)}", out)
    if code is None:
        if seconds < limit:
            raise OutOfTime
        raise RuntimeError(f"{out[-KEPT_REASON:]}\n{name} took longer than {limit:.0f} s")
    if code:
        last = (out.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{out[-KEPT_REASON:]}\n{name}: exit {code}: {last}")
    return out


# ---------------------------------------------------------------- the parts


def architecture() -> str:
    """GHOST_OPS_CUDA_ARCHS for this device alone."""
    return ".".join(map(str, torch.cuda.get_device_capability()))


def build(report: Report) -> str:
    """The CUDA library alone, in place. Only what changed is compiled again."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("nvcc was not found: put it on the PATH or set CUDA_HOME")
    started = time.monotonic()
    # Beside a link to the package, away from pyproject.toml: an older setuptools cannot read it.
    folder = scratch() / "setup"
    folder.mkdir(exist_ok=True)
    (folder / "ghost_ops").unlink(missing_ok=True)
    (folder / "ghost_ops").symlink_to(ROOT / "ghost_ops")
    run_program(
        report,
        "build",
        [sys.executable, str(ROOT / "setup.py"), "build_ext", "--inplace"],
        240,
        {
            "CUDA_HOME": str(Path(nvcc).parent.parent),
            "GHOST_OPS_BUILD_CPU": "0",
            "GHOST_OPS_BUILD_CUDA": "1",
            "GHOST_OPS_CUDA_ARCHS": architecture(),
        },
        folder,
    )
    code = "from ghost_ops.backends import cuda; print('library', cuda.load(), cuda.reason())"
    out = run_program(report, "load", [sys.executable, "-c", code], 60)
    loaded = re.search(r"^library (True|False) (.*)", out, re.MULTILINE)
    if loaded is None or loaded.group(1) != "True":
        raise RuntimeError(f"built, but: {loaded.group(2) if loaded else out[-500:]}")
    return f"built for {architecture()} in {time.monotonic() - started:.0f} s; {loaded.group(2)}"


def run_pytest(
    report: Report, name: str, arguments: Sequence[str], limit: float, workers: int = 1
) -> str:
    """Tests marked gpu; returns pytest's last line."""
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: pip install pytest")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-p", "xdist", "-n", str(workers), "--dist", "worksteal"]
    # Other packages' plugins have no part in this.
    more = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    out = run_program(report, name, [*command, *arguments], limit, more)
    last = out.strip().splitlines()[-1].strip("= ")
    if "passed" not in last:
        raise RuntimeError(f"no test ran: {last}")
    return last


def primitives(report: Report) -> str:
    return run_pytest(report, "primitives", ["tests/test_cuda_prims.py"], 120)


def gpu_test_files(triton: bool) -> list[str]:
    """The files with tests for a GPU, of the Triton backend or of the rest; those of the primitives
    have a part of their own."""
    found = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        text = path.read_text()
        of_triton = re.search(r"^def test_.*\btriton_device\b", text, re.MULTILINE) is not None
        marked = re.search(r"^(@|pytestmark = )pytest\.mark\.gpu", text, re.MULTILINE) is not None
        if (of_triton if triton else marked) and path.name != "test_cuda_prims.py":
            found.append(f"tests/{path.name}")
    return found


def tests(report: Report) -> str:
    return run_pytest(report, "tests", gpu_test_files(triton=False), 180, processes())


def triton_tests(report: Report) -> str:
    workers = max(1, (os.cpu_count() or 1) - 2)
    return run_pytest(report, "triton-tests", gpu_test_files(triton=True), 400, workers)


SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)")


def sanitizer(report: Report, tool: str) -> str:
    program = find_tool("compute-sanitizer")
    if program is None:
        raise RuntimeError("compute-sanitizer was not found: it comes with the CUDA toolkit")
    # torch asks the driver for functions that it may not have: calls that fail are no finding.
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    driver = [sys.executable, "tests/cuda_driver.py", "--gpu", "--cases", "small"]
    # The caching allocator would hide accesses past the end of a tensor.
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    out = run_program(report, tool, [program, *options, *driver], 180, more)
    found = SUMMARY.findall(out)
    right = re.search(r"(\d+) right, 0 wrong", out)
    if not found or right is None or not all(line.startswith("0 ") for line in found):
        reason = "; ".join(found) if found else "no summary"
        raise RuntimeError(f"{out[-KEPT_REASON:]}\n{tool}: {reason}")
    return f"{right.group(1)} cases, {found[-1]}"
