"""Everything about one GPU in one command: build, tests, sanitizer, times, tables.

    python benchmarks/gpu_report.py                     all parts, 8.5 minutes at most
    python benchmarks/gpu_report.py                     again: goes on with the parts not done yet
    python benchmarks/gpu_report.py --part tests copy   only these (and the build), done or not
    python benchmarks/gpu_report.py --fresh             forgets an earlier report of this GPU

Needs a checkout, an NVIDIA GPU, a CUDA build of torch >= 2.10, nvcc, a C++ compiler and ninja;
pytest for the tests, compute-sanitizer for its part. No network. Writes <GPU>.json, <GPU>.md and
<GPU>.log under benchmarks/results/. A part that runs out of time keeps what it has and goes on next
time; so does one whose process crashes or hangs, past what brought it down.

First the build. Then side by side, as nothing is timed yet: the tests, the sanitizers, and the
compilers of torch.compile and Triton, which keep on disk what will be timed. Then the measurements,
alone on the device, in the order of what matters most.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # importing torch takes its time too
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_programs, harness, shapes  # noqa: E402
from benchmarks.gpu_session import MARGIN, MOST_LOSSES, Part, Report, slug  # noqa: E402
from benchmarks.gpu_worker import Lost, shape_fields  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("float16", "bfloat16", "float32")
BATCHES = (256, 1, 32)
SILENCE = 40.0  # seconds without a word from a worker that is not compiling
COMPILING = 150.0  # the same for one that is
WARM_SECONDS = 120.0


@dataclass(frozen=True)
class Measurement:
    """A part that times all shapes in one mode, dtype and batch.

    Args:
        label: mode of its rows.
        kind: time or memory.
        mode: eval, train or graph.
        candidates: names, timed in turn.
    """

    label: str
    kind: str
    mode: str
    dtype: str
    batch: int
    candidates: tuple[str, ...]
    compile_mode: str = "default"

    @property
    def compiles(self) -> bool:
        return not {"compile_cl", "triton_cl"}.isdisjoint(self.candidates)

    def job(self, shape: shapes.Shape, **more: Any) -> dict[str, Any]:
        """What a worker is asked."""
        return {
            "kind": self.kind, "label": self.label, "mode": self.mode, "dtype": self.dtype,
            "batch": self.batch, "shape": shape_fields(shape), "candidates": self.candidates,
            "compile_mode": self.compile_mode, "copy": {}, "avoid": {}, **more,
        }  # fmt: skip

    def of(self, row: Mapping[str, Any]) -> bool:
        """Whether it is one of this measurement's rows."""
        key = (row["mode"], row["dtype"], row["batch"])
        return key == (self.label, self.dtype, self.batch) and row["provider"] in self.candidates

    def failed(self, shape: shapes.Shape, note: str) -> list[dict[str, Any]]:
        """Rows that say why there are no others."""
        common = {
            "question": "gpu", "mode": self.label, "shape": shape.name, "group": shape.group,
            "dtype": self.dtype, "batch": self.batch, "median_s": None, "note": f"failed: {note}",
        }  # fmt: skip
        return [{**common, "provider": name} for name in self.candidates]

    def measured(self, report: Report, shape: shapes.Shape) -> bool:
        """Whether this shape has a row of every candidate."""
        rows = (row for row in report.rows if row["shape"] == shape.name and self.of(row))
        return {row["provider"] for row in rows}.issuperset(self.candidates)

    def complete(self, report: Report) -> bool:
        """Whether all shapes have."""
        return all(self.measured(report, shape) for shape in report.shapes)


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


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not found"


def sources_digest() -> str:
    """Of what is measured and how: a results file holds rows of one state of the sources only."""
    digest = hashlib.sha256()
    how = "gpu_clock gpu_timing gpu_worker providers floor harness measure shapes".split()
    files = [ROOT / "benchmarks" / f"{name}.py" for name in how]
    for folder in ("csrc", "ghost_ops"):
        files += sorted((ROOT / folder).rglob("*"))
    for path in files:
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh", ".inc"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Device, driver, versions, commit. Does not import ghost_ops, which is yet to be built."""
    properties = torch.cuda.get_device_properties(0)
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    nvcc = gpu_programs.find_tool("nvcc")
    release = re.search(r"V[\d.]+", output_of([nvcc, "--version"])) if nvcc else None
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        query: output_of(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]),
        "nvcc": release.group() if release else "not found",
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_benchmark": arguments.cudnn_benchmark,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": harness.processor_name(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python benchmarks/gpu_report.py", *sys.argv[1:]]),
        "commit": arguments.commit or harness.git_commit(),
        "sources": sources_digest(),
    }


# ---------------------------------------------------------------- parts that measure


def measure_copy(report: Report) -> str:
    known = report.ask({"kind": "copy", "avoid": {}}, SILENCE)["copy"]
    report.document["copy"] = known
    return (
        f"copy {known['bytes_per_s'][-1] / 1e9:.0f} GB/s counting bytes read and written, "
        f"float16 product {known['float16_flops'] / 1e12:.0f} TFLOP/s"
    )


def measure(report: Report, what: Measurement) -> str:
    """Measures the shapes that have no rows yet, and saves after each."""
    if not report.document["copy"]:
        measure_copy(report)
    last = 0.0
    for shape in report.shapes:
        if what.measured(report, shape):
            continue
        report.check_time(last)
        started = time.monotonic()
        job = what.job(shape, copy=report.document["copy"])
        try:
            rows = report.ask(job, COMPILING if what.compiles else SILENCE)["rows"]
        except RuntimeError as error:
            if report.losses >= MOST_LOSSES:
                raise
            rows = what.failed(shape, str(error).strip()[:300])
        last = time.monotonic() - started

        def replaced(row: Mapping[str, Any], shape: shapes.Shape = shape) -> bool:
            return what.of(row) and row["shape"] == shape.name

        report.drop(replaced)
        report.add(rows)
    rows = [row for row in report.rows if what.of(row)]
    counts = {
        word: sum(row.get("note", "").startswith(word) for row in rows)
        for word in ("skipped", "failed", "wrong")
    }
    found = [f"{count} {word}" for word, count in counts.items() if count]
    return ", ".join([f"{len(rows)} rows", *found])


def warm(report: Report) -> str:
    """Has several processes compile at once what one would compile later, bit by bit."""
    waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for what in measurements().values():
        if what.compiles and what.compile_mode == "default":
            for shape in report.shapes:
                if not what.measured(report, shape):
                    # Memory is measured in training mode: its kernels are those of the times.
                    waiting.put(what.job(shape, kind="warm"))
    total, until = waiting.qsize(), time.monotonic() + min(WARM_SECONDS, report.left())

    def work() -> int:
        done, worker = 0, None
        try:
            while time.monotonic() < until and not report.stopping:
                with contextlib.suppress(Lost, RuntimeError):  # it will be seen when it is timed
                    worker = worker or report.start_worker(TORCHINDUCTOR_COMPILE_THREADS="1")
                    worker.ask(waiting.get_nowait(), COMPILING, until)
                    done += 1
                if worker is not None and worker.process.poll() is not None:
                    report.end_worker(worker)
                    worker = None
        except (queue.Empty, TimeoutError):
            pass
        finally:
            if worker is not None:
                report.end_worker(worker)
        return done

    workers = min(max(1, (os.cpu_count() or 1) // 2), total)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        done = sum(pool.map(lambda _: work(), range(workers)))
    return f"{done} of {total} compiled ahead by {workers} processes"


PYTORCH_AND_NATIVE = ("eager_nchw", "eager_cl", "native_nchw", "native_cl")
BESIDE_COMPILE = ("eager_cl", "compile_cl", "native_cl")


@functools.cache
def measurements() -> dict[str, Measurement]:
    """The parts that measure, by name, in the order of what matters most."""
    found: dict[str, Measurement] = {}
    largest = BATCHES[0]

    def times(mode: str, dtype: str, batch: int) -> None:
        found[f"{mode}-{dtype}-{batch}"] = Measurement(
            mode, "time", mode, dtype, batch, PYTORCH_AND_NATIVE
        )

    def compiled(name: str, mode: str, dtype: str, compile_mode: str) -> None:
        # Beside eager and ours, in one run: their other rows are of other minutes.
        found[f"{name}-{mode}-{dtype}-{largest}"] = Measurement(
            f"{mode} beside {name}", "time", mode, dtype, largest, BESIDE_COMPILE, compile_mode
        )

    for dtype in DTYPES:
        for mode in ("eval", "train"):
            times(mode, dtype, largest)
        if dtype == DTYPES[0]:  # compiling takes long: only where the ratios are asked for
            for mode in ("eval", "train"):
                compiled("compile", mode, dtype, "default")
        times("graph", dtype, 1)
        found[f"memory-{dtype}-{largest}"] = Measurement(
            "memory", "memory", "train", dtype, largest, PYTORCH_AND_NATIVE[1:]
        )
        for batch in BATCHES[1:]:
            for mode in ("eval", "train"):
                times(mode, dtype, batch)
    for dtype in DTYPES:
        for batch in BATCHES:
            for mode in ("eval", "train", *(["graph"] if batch == 1 else [])):
                found[f"triton-{mode}-{dtype}-{batch}"] = Measurement(
                    mode, "time", mode, dtype, batch, ("triton_cl",)
                )
        found[f"triton-memory-{dtype}-{largest}"] = Measurement(
            "memory", "memory", "train", dtype, largest, ("triton_cl",)
        )
    for mode in ("eval", "train"):
        compiled("max-autotune", mode, DTYPES[0], "max-autotune-no-cudagraphs")
    return found


def all_parts() -> list[list[Part]]:
    """Groups of parts that run side by side, in the order of what matters most."""
    checks = [
        Part("primitives", gpu_programs.primitives),
        Part("tests", gpu_programs.tests),
        Part("memcheck", functools.partial(gpu_programs.sanitizer, tool="memcheck")),
        Part("racecheck", functools.partial(gpu_programs.sanitizer, tool="racecheck")),
        Part("warm", warm, always=True),
    ]
    parts = {
        name: Part(name, functools.partial(measure, what=what), complete=what.complete)
        for name, what in measurements().items()
    }
    last = [Part("triton-tests", gpu_programs.triton_tests)]
    return [
        [Part("build", gpu_programs.build, always=True)],
        checks,
        [Part("copy", measure_copy)],
        *([part] for part in parts.values()),
        last,
    ]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; argparse exits with a message on bad values."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu_report.py",
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [part.name for group in all_parts() for part in group]
    parser.add_argument(
        "--part", nargs="+", metavar="NAME", help="only these, done before or not; --list names all"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    parser.add_argument("--fresh", action="store_true", help="do not take over an earlier report")
    parser.add_argument("--shapes", nargs="+", default=["all"], help="groups, names or globs")
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="cuDNN tries its algorithms: takes longer"
    )
    parser.add_argument("--commit", help="written into the report where there is no .git")
    parser.add_argument("--out", type=Path, help="the JSON file (default: named after the GPU)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.part or ()) - set(names):
        parser.error(f"--part: unknown {', '.join(sorted(unknown))}; known: {', '.join(names)}")
    if not arguments.minutes * 60 > MARGIN:
        parser.error(f"--minutes: expected more than {MARGIN / 60:.2f}, got {arguments.minutes}")
    if arguments.out is not None and arguments.out.suffix in (".md", ".log"):
        parser.error(f"--out: expected a .json file, got {arguments.out}")
    try:
        arguments.shapes = shapes.select(arguments.shapes)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def choose(names: Sequence[str] | None, report: Report) -> list[list[Part]]:
    """The groups of parts to run. Those named begin anew, and the build goes before them."""
    groups = all_parts()
    if not names:
        return groups
    for name in names:
        if name in measurements():
            report.drop(measurements()[name].of)
    wanted = {"build", *names}
    return [[part for part in group if part.name in wanted] for group in groups]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, 1 if a part failed, 2 without a GPU."""
    arguments = parse_arguments(argv)
    if arguments.list:
        print("\n".join(part.name for group in all_parts() for part in group))
        return 0
    if (reason := no_gpu()) is not None:
        print(f"error: there is no GPU to report on: {reason}", file=sys.stderr)
        return 2
    meta = describe(arguments)
    path = arguments.out or RESULTS / f"{slug(meta['gpu'])}.json"
    try:
        path = harness.prepare_output(path)
    except OSError as error:
        print(f"error: {error}; --out names another file", file=sys.stderr)
        return 2
    # Children are ended, and what there is is written, also when a time limit ends this.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = Report(
        path, meta, arguments.minutes, arguments.shapes, arguments.fresh, started=STARTED
    )
    status = report.run(choose(arguments.part, report), again=bool(arguments.part))
    print(f"Written: {path}, {path.with_suffix('.md').name}, {report.log_path.name}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
