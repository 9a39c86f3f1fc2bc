"""Everything about one GPU in one command: build, tests, sanitizer, times, tables.

    python benchmarks/gpu_report.py                     all parts, 8.5 minutes at most
    python benchmarks/gpu_report.py                     again: goes on with the parts not done yet
    python benchmarks/gpu_report.py --part build tests  only these
    python benchmarks/gpu_report.py --fresh             forgets an earlier report of this GPU

Needs a checkout, an NVIDIA GPU, a CUDA build of torch >= 2.10, nvcc, a C++ compiler and ninja;
pytest for the tests, compute-sanitizer for its part. No network. Writes <GPU>.json and <GPU>.md
under benchmarks/results/. A part that runs out of time keeps what it has and goes on next time.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_tables, harness, shapes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("float16", "bfloat16", "float32")
BATCHES = (256, 1, 32)
MARGIN = 15.0  # seconds kept for writing the tables
COMPILE_SECONDS = 12.0  # what max-autotune takes for a shape, about


class OutOfTime(Exception):
    """The time is up; what the part has so far is kept."""


@dataclass
class Part:
    """One resumable piece of the report.

    Args:
        name: as in ``--part`` and in the results file.
        run: does it; returns a summary in words. Raises OutOfTime, or RuntimeError on failure.
    """

    name: str
    run: Callable[[Report], str]


class Report:
    """The results file, the clock and the rows.

    Args:
        path: the JSON file; its rows and finished parts are taken over unless ``fresh``.
        meta: what identifies this run; a file of another device, torch or source is not taken over.
        minutes: time for everything.
        chosen: the shapes to time.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Any],
        minutes: float,
        chosen: Sequence[shapes.Shape],
        fresh: bool = False,
    ) -> None:
        self.path = path
        self.shapes = list(chosen)
        self.deadline = time.monotonic() + 60 * minutes
        self.document: dict[str, Any] = {"meta": dict(meta), "parts": {}, "rows": []}
        if not fresh and (earlier := load_earlier(path, meta)) is not None:
            self.document.update(parts=earlier["parts"], rows=earlier["rows"])
            self.document["copy"] = earlier.get("copy")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.document["rows"]

    def left(self) -> float:
        """Seconds until the tables have to be written."""
        return self.deadline - MARGIN - time.monotonic()

    def check_time(self, needed: float = 0.0) -> None:
        if self.left() < needed:
            raise OutOfTime

    def save(self) -> None:
        harness.write_json(self.path, self.document)
        self.path.with_suffix(".md").write_text(gpu_tables.render(self.document))

    def has(self, mode: str, dtype: str, batch: int, shape: str) -> bool:
        """Whether an earlier run has this shape's rows."""
        key = (mode, dtype, batch, shape)
        return any(
            (row["mode"], row["dtype"], row["batch"], row["shape"]) == key for row in self.rows
        )

    def run(self, parts: Sequence[Part], again: bool) -> int:
        """Runs what is not done yet; ``again``: also what is. Returns the exit status."""
        status = 0
        for part in parts:
            state = self.document["parts"].get(part.name, {})
            if state.get("status") == "done" and not again:
                print(f"{part.name}: done before ({state['summary']})", flush=True)
                continue
            started = time.monotonic()
            try:
                self.check_time()
                print(f"{part.name} ...", flush=True)
                state = {"status": "done", "summary": part.run(self)}
            except OutOfTime:
                state = {"status": "out of time", "summary": "run the command again to go on"}
            except Exception as error:  # the other parts are worth having all the same
                message = f"{type(error).__name__}: {str(error).strip()}"
                state = {"status": "failed", "summary": message.splitlines()[-1]}
                state["log"] = message + "\n" + traceback.format_exc()
                status = 1
            state["seconds"] = time.monotonic() - started
            self.document["parts"][part.name] = state
            self.save()
            print(f"{part.name}: {state['status']}, {state['summary']}", flush=True)
        return status


def load_earlier(path: Path, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """An earlier report of this device, torch and source, or None."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    same = all(document["meta"].get(key) == meta.get(key) for key in ("gpu", "sources", "torch"))
    if not same:
        print(f"{path.name} is of another GPU, torch or source: starting anew", flush=True)
    return document if same else None


# ---------------------------------------------------------------- the machine


def no_gpu() -> str | None:
    """Why there is nothing to report on, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; install a CUDA build of PyTorch"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no CUDA device"
    return None


def output_of(command: Sequence[str]) -> str:
    """What a tool prints, or why it cannot be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"
    return done.stdout.strip()


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def sources_digest() -> str:
    """Of what is measured: a results file holds rows of one state of the sources only."""
    digest = hashlib.sha256()
    for folder in ("csrc", "ghost_ops", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".inc"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(commit: str | None) -> dict[str, Any]:
    """Device, driver, versions, commit. Does not import ghost_ops, which is yet to be built."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    nvcc = find_nvcc()
    release = re.search(r"V[\d.]+", output_of([nvcc, "--version"])) if nvcc else None
    triton = importlib.util.find_spec("triton")
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": output_of(query),
        "nvcc": release.group() if release else "not found",
        "triton": __import__("triton").__version__ if triton else "not found",
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": harness.processor_name(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/gpu_report.py", *sys.argv[1:]]),
        "commit": commit or harness.git_commit(),
        "sources": sources_digest(),
    }


def slug(name: str) -> str:
    """A file name for a device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---------------------------------------------------------------- parts that are other programs


def run_program(
    report: Report, command: Sequence[str], limit: float, environment: Mapping[str, str] | None
) -> str:
    """Runs a program in the checkout, for at most ``limit`` seconds. Returns its output.

    Raises:
        OutOfTime: it took longer than this report has.
        RuntimeError: it failed, with the end of its output.
    """
    seconds = min(limit, report.left())
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        if seconds < limit:
            raise OutOfTime from expired
        raise RuntimeError(f"{command[0]} took longer than {limit:.0f} s") from expired
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-4000:]}\n{' '.join(command)}: exit {done.returncode}")
    return done.stdout


def architecture() -> str:
    """GHOST_OPS_CUDA_ARCHS for this device alone."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def build(report: Report) -> str:
    if find_nvcc() is None:
        raise RuntimeError("nvcc was not found: put it on the PATH or set CUDA_HOME")
    started = time.monotonic()
    run_program(
        report,
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        300,
        {"GHOST_OPS_BUILD_CUDA": "1", "GHOST_OPS_CUDA_ARCHS": architecture()},
    )
    importlib.invalidate_caches()
    return f"built for {architecture()} in {time.monotonic() - started:.0f} s"


def run_pytest(report: Report, arguments: Sequence[str], limit: float) -> str:
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: pip install pytest")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    out = run_program(report, [*command, *arguments], limit, {"PYTHONPATH": str(ROOT)})
    last = out.strip().splitlines()[-1].strip("= ")
    if "passed" not in last:
        raise RuntimeError(f"no test ran: {last}")
    return last


def primitives(report: Report) -> str:
    return run_pytest(report, ["tests/test_cuda_prims.py"], 120)


def gpu_test_files() -> list[str]:
    """The files with tests for a GPU, those of the primitives aside, which have a part."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        f"tests/{path.name}"
        for path in files
        if "pytest.mark.gpu" in path.read_text() and path.name != "test_cuda_prims.py"
    ]


def tests(report: Report) -> str:
    return run_pytest(report, gpu_test_files(), 240)


def sanitizer(report: Report, tool: str) -> str:
    program = shutil.which("compute-sanitizer") or shutil.which(
        "/usr/local/cuda/bin/compute-sanitizer"
    )
    if program is None:
        raise RuntimeError("compute-sanitizer was not found: it comes with the CUDA toolkit")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable]
    out = run_program(
        report,
        [*command, "tests/cuda_driver.py", "--gpu", "--cases", "small"],
        120,
        # The caching allocator would hide accesses past the end of a tensor.
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)},
    )
    found = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", out)
    if not found or not found[-1].startswith("0 "):
        raise RuntimeError(f"{out[-2000:]}\n{tool}: {found[-1] if found else 'no summary'}")
    return found[-1]


# ---------------------------------------------------------------- parts that measure


def measure_copy(report: Report) -> str:
    from benchmarks import gpu_timing

    roofline = gpu_timing.measure_roofline()
    report.document["copy"] = roofline.to_json()
    return (
        f"copy {roofline.bandwidth[-1] / 1e9:.0f} GB/s counting bytes read and written, "
        f"float16 product {roofline.gemm_peak / 1e12:.0f} TFLOP/s"
    )


def roofline_of(report: Report) -> Any:
    from benchmarks import floor

    if not report.document.get("copy"):
        measure_copy(report)
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in report.document["copy"].items()}
    return floor.Roofline(**known)


def each_shape(
    report: Report, mode: str, dtype: str, batch: int, measure: Callable[[shapes.Shape], list[Any]]
) -> str:
    """Measures the shapes that have no rows yet, and saves after each."""
    report.document["meta"]["ghost_ops"] = harness.library_info()
    last = 0.0
    for shape in report.shapes:
        if report.has(mode, dtype, batch, shape.name):
            continue
        report.check_time(last)
        started = time.monotonic()
        report.rows.extend(measure(shape))
        last = time.monotonic() - started
        report.save()
    rows = [r for r in report.rows if (r["mode"], r["dtype"], r["batch"]) == (mode, dtype, batch)]
    wrong = sum("note" in row and not row["note"].startswith("skipped") for row in rows)
    return f"{len(rows)} rows" + (f", {wrong} failed or wrong" if wrong else "")


def times(report: Report, mode: str, dtype: str, batch: int) -> str:
    from benchmarks import gpu_timing

    roofline = roofline_of(report)

    def measure(shape: shapes.Shape) -> list[Any]:
        return gpu_timing.time_shape(
            mode, shape, batch, getattr(torch, dtype), gpu_timing.CANDIDATES, roofline
        )

    return each_shape(report, mode, dtype, batch, measure)


def graphs(report: Report, dtype: str) -> str:
    from benchmarks import gpu_timing

    roofline = roofline_of(report)

    def measure(shape: shapes.Shape) -> list[Any]:
        candidates = gpu_timing.CANDIDATES
        return gpu_timing.time_shape(
            "graph", shape, 1, getattr(torch, dtype), candidates, roofline, wrap=gpu_timing.in_graph
        )

    return each_shape(report, "graph", dtype, 1, measure)


def memory(report: Report, dtype: str, batch: int) -> str:
    from benchmarks import gpu_timing

    def measure(shape: shapes.Shape) -> list[Any]:
        return gpu_timing.memory_shape(
            shape, batch, getattr(torch, dtype), gpu_timing.CANDIDATES[1:]
        )

    return each_shape(report, "memory", dtype, batch, measure)


def compiled(report: Report, mode: str, dtype: str, batch: int) -> str:
    """torch.compile beside eager and ours, in one run: their other rows are of other minutes."""
    from benchmarks import gpu_timing

    roofline = roofline_of(report)
    candidates = (
        gpu_timing.EAGER_CL,
        gpu_timing.COMPILE,
        *(c for c in gpu_timing.CANDIDATES if c.ours and c.layout != "nchw"),
    )
    label = f"{mode} beside compile"
    waiting = [s for s in report.shapes if not report.has(label, dtype, batch, s.name)]

    def measure(shape: shapes.Shape) -> list[Any]:
        behind = len(waiting) - waiting.index(shape)
        enough = report.left() / behind > COMPILE_SECONDS
        rows = gpu_timing.time_shape(
            mode, shape, batch, getattr(torch, dtype), candidates, roofline,
            compile_mode="max-autotune-no-cudagraphs" if enough else "default",
        )  # fmt: skip
        torch._dynamo.reset()
        return [{**row, "mode": label} for row in rows]

    return each_shape(report, label, dtype, batch, measure)


def all_parts() -> list[Part]:
    """In the order of what matters most, since the time may not suffice for all."""
    parts = [
        Part("build", build),
        Part("primitives", primitives),
        Part("tests", tests),
        Part("memcheck", functools.partial(sanitizer, tool="memcheck")),
        Part("racecheck", functools.partial(sanitizer, tool="racecheck")),
        Part("copy", measure_copy),
    ]

    def add(name: str, function: Callable[..., str], *arguments: Any) -> None:
        parts.append(Part(name, lambda report: function(report, *arguments)))

    for dtype in DTYPES:
        for batch in BATCHES:
            for mode in ("eval", "train"):
                add(f"{mode}-{dtype}-{batch}", times, mode, dtype, batch)
        add(f"graph-{dtype}-1", graphs, dtype)
        add(f"memory-{dtype}-{BATCHES[0]}", memory, dtype, BATCHES[0])
        if dtype == DTYPES[0]:  # compiling takes long: only where the ratios are asked for
            for mode in ("eval", "train"):
                add(f"compile-{mode}-{dtype}-{BATCHES[0]}", compiled, mode, dtype, BATCHES[0])
    return parts


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; argparse exits with a message on bad values."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu_report.py",
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [part.name for part in all_parts()]
    parser.add_argument(
        "--part", nargs="+", metavar="NAME", help="only these, done before or not; --list names all"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--fresh", action="store_true", help="do not take over an earlier report")
    parser.add_argument("--shapes", nargs="+", default=["all"], help="groups, names or globs")
    parser.add_argument("--commit", help="written into the report where there is no .git")
    parser.add_argument("--out", type=Path, help="the JSON file (default: named after the GPU)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.part or ()) - set(names):
        parser.error(f"--part: unknown {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    if arguments.minutes * 60 <= MARGIN:
        parser.error(f"--minutes: expected more than {MARGIN / 60}, got {arguments.minutes}")
    try:
        arguments.shapes = shapes.select(arguments.shapes)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, 1 if a part failed, 2 without a GPU."""
    arguments = parse_arguments(argv)
    parts = all_parts()
    if arguments.list:
        print("\n".join(part.name for part in parts))
        return 0
    if (reason := no_gpu()) is not None:
        print(f"error: there is no GPU to report on: {reason}", file=sys.stderr)
        return 2
    meta = describe(arguments.commit)
    path = arguments.out or RESULTS / f"{slug(meta['gpu'])}.json"
    try:
        path = harness.prepare_output(path)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report(path, meta, arguments.minutes, arguments.shapes, arguments.fresh)
    if arguments.part:
        parts = [part for part in parts if part.name in arguments.part]
    status = report.run(parts, again=bool(arguments.part))
    print(f"Written: {path} and {path.with_suffix('.md').name}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
