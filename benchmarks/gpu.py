"""Everything about one GPU in eight minutes: correctness, times, networks, counters, tests.

    python benchmarks/gpu.py --out FOLDER                   builds the CUDA library, runs all steps
    python benchmarks/gpu.py --out FOLDER --library FILE    with a library built elsewhere
    python benchmarks/gpu.py --out FOLDER --resume          measures only what is missing
    python benchmarks/gpu.py --out FOLDER --steps           prints the table of FOLDER again
    python benchmarks/gpu.py --kit                          no GPU here: prepares what one needs
    python benchmarks/gpu.py --fit FILE [--write]           fits the plans' model of time to rows of
                                                            the steps plans-1, plans-2, plans-3

Each step runs in a process of its own under a time limit, and every row is appended to
FOLDER/rows.jsonl as it is measured: a crash or a time limit loses one step. ``ghost_ops._C`` is
compiled beside the first steps where it is missing; rows say whether it was there, since calls from
Python take longer without it.

Needs an NVIDIA GPU and a CUDA build of torch >= 2.10; nvcc, a C++ compiler and ninja where no
library is given; pytest, ncu and compute-sanitizer for the steps that use them. No network.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.machinery
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_table  # noqa: E402
from benchmarks.gpu_sheet import read_rows, write_row  # noqa: E402

LIBRARY = ROOT / "ghost_ops" / "_cuda.so"
KIT = ROOT / "build" / "gpu-kit"
KIT_ARCHS = "9.0"  # H100, H200
NO_GPU = 3  # exit status of a step
# Variables that would change what runs, or how.
NOT_PASSED_ON = (
    "CUDA_LAUNCH_BLOCKING GHOST_OPS_BACKEND GHOST_OPS_CUDA_PLAN GHOST_OPS_TRITON_AUTOTUNE "
    "PYTEST_ADDOPTS PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF TRITON_INTERPRET"
).split()


@dataclass(frozen=True)
class Step:
    """A step of the run.

    Args:
        seconds: what it should take on an H100; its time limit is half as much again.
        host: host time counts, so that the step wants ``ghost_ops._C`` and waits for its build.
        environment: of its process.
    """

    name: str
    purpose: str
    seconds: float
    host: bool = True
    environment: tuple[tuple[str, str], ...] = ()

    def command(self, arguments: argparse.Namespace) -> list[str]:
        given = ["--child", self.name, "--out", arguments.out, "--run", arguments.run]
        given += ["--plans", arguments.plans, "--commit", arguments.commit]
        given += ["--resume"] if arguments.resume else []
        return [sys.executable, str(Path(__file__).resolve()), *map(str, given)]


BLOCKING = (("CUDA_LAUNCH_BLOCKING", "1"),)
STEPS = (
    Step("correct", "three shapes against float64", 25, False, BLOCKING),
    Step("eval", "copy ceiling; every shape, float16, batch 256", 25, False),
    Step("network", "GhostNet 1.0x, eager and fused, batch 256 and 1, CUDA graphs", 40),
    Step("train", "forward + backward: network and shapes; kernels; memory", 75),
    Step("ncu", "hardware counters of five kernels", 40),
    Step("compile", "torch.compile, resnet18, mobilenet_v3_large", 90),
    Step("tests", "gpu-marked tests, memcheck, racecheck", 70),
    Step("more", "batch 1 and 32, Triton, YOLO shapes, NCHW, TF32, bfloat16", 75),
    Step("triton-tests", "gpu-marked tests of the Triton backend", 60),
    *(
        Step(
            f"plans-{rank}",
            f"every shape with the plan of rank {rank}, for --fit",
            15,
            environment=(("GHOST_OPS_CUDA_PLAN", rank),),
        )
        for rank in "123"
    ),
)


# ---------------------------------------------------------------- running steps


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start(
    command: Sequence[str], log: Path, cwd: Path, environment: dict[str, str]
) -> subprocess.Popen[Any]:
    """Start a program, the leader of a process group, with its output in a file."""
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def within_budget(steps: Sequence[Step], budget: float) -> tuple[list[Step], list[Step]]:
    """The first steps whose expected times fit the budget, and the others."""
    kept = list(steps)
    while kept and sum(step.seconds for step in kept) > budget:
        kept.pop()
    return kept, list(steps[len(kept) :])


def run_step(step: Step, arguments: argparse.Namespace, left: float) -> str | None:
    """Run one step. Returns None, or in a line why it ended early."""
    limit, log = min(1.5 * step.seconds, left), arguments.out / f"{step.name}.log"
    environment = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}
    environment |= {"PYTHONUNBUFFERED": "1", **dict(step.environment)}
    process = start(step.command(arguments), log, ROOT, environment)
    try:
        code: int | None = process.wait(timeout=max(limit, 0.1))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end_group(process)
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:300]
    if code == NO_GPU:
        raise SystemExit(f"benchmarks/gpu.py: {last}")
    if code is None:
        return f"time limit of {limit:.0f} s"
    return None if code == 0 else f"ended with {code}: {last}"


def run_steps(
    steps: Sequence[Step],
    arguments: argparse.Namespace,
    module: subprocess.Popen[Any] | None = None,
) -> int:
    """Run the steps in their order. Returns 1 if one of them ended early, else 0.

    Args:
        module: the build of ``ghost_ops._C`` that goes on beside the first steps.
    """
    started, status = time.monotonic(), 0
    kept, dropped = within_budget(steps, arguments.budget)
    for step in dropped:
        print(f"{step.name}: left out, the budget is {arguments.budget:.0f} s", flush=True)
    for step in kept:
        if step.host and module is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                module.wait(timeout=120)
        begun = time.monotonic()
        left = arguments.budget - (begun - started)
        reason = "no time left" if left < 0 else run_step(step, arguments, left)
        row = {"step": step.name, "run": arguments.run}
        row["seconds"] = took = round(time.monotonic() - begun, 1)
        if reason:
            status, row["note"] = 1, f"failed: {reason}"
        write_row(arguments.out / "rows.jsonl", row)
        print(f"{step.name}: {reason or 'done'}, {took:.0f} s", flush=True)
    return status


# ---------------------------------------------------------------- the libraries


def build(log: Path, *, cuda: str = "", folder: Path | None = None) -> subprocess.Popen[Any]:
    """Start a build: of the CUDA library for the architectures ``cuda``, else of ``ghost_ops._C``.

    It runs beside a link to the package, away from pyproject.toml, which an older setuptools cannot
    read. The result goes into ``folder``, or into the checkout.
    """
    beside = ROOT / "build" / "beside"
    beside.mkdir(parents=True, exist_ok=True)
    (beside / "ghost_ops").unlink(missing_ok=True)
    (beside / "ghost_ops").symlink_to(ROOT / "ghost_ops")
    command = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext"]
    command += ["--build-lib", str(folder)] if folder else ["--inplace"]
    choice = {"GHOST_OPS_BUILD_CPU": "0" if cuda else "1", "GHOST_OPS_BUILD_CUDA": "0"}
    if cuda:
        choice |= {"GHOST_OPS_BUILD_CUDA": "1", "GHOST_OPS_CUDA_ARCHS": cuda}
    return start(command, log, beside, {**os.environ, **choice})


def prepare_library(arguments: argparse.Namespace) -> str | None:
    """Put the CUDA library in place. Returns why there is none."""
    library: Path | None = arguments.library
    if library is not None:
        if not library.is_file():
            raise SystemExit(f"--library: {library} is not a file; `make gpu-kit` makes one")
        if library.resolve() != LIBRARY:
            LIBRARY.unlink(missing_ok=True)  # a process that has the old one mapped is unharmed
            shutil.copy2(library, LIBRARY)
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"benchmarks/gpu.py: no NVIDIA GPU is visible ({error})") from error
    log = arguments.out / "build.log"
    process = build(log, cuda=capability.split()[0])
    try:
        code = process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        code = -1
    finally:
        end_group(process)
    return None if code == 0 else f"the build ended with {code}: see {log}"


def has_native_module() -> bool:
    """Whether the checkout has ``ghost_ops._C`` for this Python."""
    names = (f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return any((ROOT / "ghost_ops" / name).exists() for name in names)


def make_kit(folder: Path) -> int:
    """Build the CUDA library for ``KIT_ARCHS`` and write the plan of every shape."""
    folder.mkdir(parents=True, exist_ok=True)
    started, log = time.monotonic(), folder / "build.log"
    if code := build(log, cuda=KIT_ARCHS, folder=folder).wait():
        print(log.read_text()[-2000:])
        return code
    library, plans = folder / "ghost_ops" / "_cuda.so", folder / "plans.json"
    plans.write_text(json.dumps(predictions(), indent=0))
    size, seconds = library.stat().st_size / 2**20, time.monotonic() - started
    print(f"{library}: {size:.1f} MiB for {KIT_ARCHS}, {seconds:.0f} s")
    print(f"{plans}: predicted microseconds of every shape")
    command = ["python3", "benchmarks/gpu.py", "--out", "results/gpu", "--library"]
    command.append(os.path.relpath(library, ROOT))
    print("On the GPU machine, in a copy of this checkout with these two files:")
    print("    " + shlex.join(command))
    return 0


def predictions() -> dict[str, float]:
    """Microseconds that the plan predicts, by mode, dtype, batch and shape or network
    (channels_last)."""
    import torch

    from benchmarks import networks, shapes
    from ghost_ops import planner

    found = {}
    for shape in shapes.ALL:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for batch in (1, 32, 256):
                plan = planner.explain(
                    (batch, shape.inp, shape.size, shape.size), shape.oup, ratio=shape.ratio,
                    dw_size=shape.dw_size, activation=shape.activation, dtype=dtype,
                    channels_last=True, device="sm_" + KIT_ARCHS.replace(".", ""),
                )  # fmt: skip
                found[f"eval {dtype} {batch} {shape.name}"] = round(plan.seconds * 1e6, 2)
    network = networks.NETWORKS["ghostnet-1.0"].plain(224)
    for batch in (1, 256):
        device = "sm_" + KIT_ARCHS.replace(".", "")
        whole = planner.explain(network, (batch, 3, 224, 224), device=device, dtype=torch.float16)
        found[f"eval {torch.float16} {batch} GhostNet 1.0x"] = round(whole.seconds * 1e6, 2)
    return found


# ---------------------------------------------------------------- the command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/gpu)")
    parser.add_argument("--steps", nargs="*", default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all steps")
    parser.add_argument("--library", type=Path, help="a _cuda.so built elsewhere, copied here")
    parser.add_argument("--plans", type=Path, default=KIT / "plans.json", help="predicted times")
    parser.add_argument("--resume", action="store_true", help="keep rows that are still valid")
    parser.add_argument("--commit", default="", help="recorded where there is no .git")
    parser.add_argument("--fit", type=Path, metavar="FILE", help="fit the model to measured plans")
    parser.add_argument("--write", action="store_true", help="and put the result into its table")
    parser.add_argument("--kit", action="store_true", help="prepare what a GPU machine needs")
    for hidden in ("--child", "--run"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.steps if name not in names]:
        parser.error(f"--steps: {', '.join(unknown)}: not one of {', '.join(names)}")
    if arguments.write and arguments.fit is None:
        parser.error("--write goes with --fit")
    if not arguments.budget > 0:
        parser.error(f"--budget: expected seconds above 0, got {arguments.budget}")
    default = KIT if arguments.kit else ROOT / "benchmarks" / "results" / "gpu"
    arguments.out = (arguments.out or default).resolve()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run steps, print the table. Returns 0; 1 if a step failed; 2 if nothing could be run."""
    arguments = parse(argv)
    if arguments.list:
        for step in STEPS:
            print(f"{step.name:13} {step.seconds:4.0f} s  {step.purpose}")
        return 0
    if arguments.fit is not None:
        from benchmarks import gpu_fit

        return gpu_fit.main(arguments.fit, arguments.write)
    rows = arguments.out / "rows.jsonl"
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "plans.json" if arguments.kit else rows).open("a").close()
    except OSError as error:
        print(f"--out: {arguments.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    if arguments.kit:
        return make_kit(arguments.out)
    if arguments.child:
        from benchmarks import gpu_steps

        run = {"run": arguments.run, "commit": arguments.commit}
        return gpu_steps.main(arguments.child, rows, arguments.plans, arguments.resume, run)
    status, module = 0, None
    if arguments.steps:
        from benchmarks import harness

        now = datetime.datetime.now(datetime.timezone.utc)
        arguments.run = now.isoformat(timespec="seconds")
        arguments.commit = arguments.commit or harness.git_commit()
        if reason := prepare_library(arguments):
            print(f"ours cannot run: {reason}", flush=True)
        steps = [step for step in STEPS if step.name in arguments.steps]
        if any(step.host for step in steps) and not has_native_module():
            module = build(arguments.out / "build_C.log")
        try:
            status = run_steps(steps, arguments, module)
        finally:
            if module is not None:
                end_group(module)
    print(gpu_table.render(read_rows(rows)))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
