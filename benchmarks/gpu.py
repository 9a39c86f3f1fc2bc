"""Everything about one GPU in eight minutes: correctness, times, networks, counters, tests.

    python benchmarks/gpu.py --out FOLDER                   builds the CUDA library, runs all steps
    python benchmarks/gpu.py --out FOLDER --library FILE    with a library built elsewhere
    python benchmarks/gpu.py --out FOLDER --resume          measures only what is missing
    python benchmarks/gpu.py --out FOLDER --steps           prints the table of FOLDER again
    python benchmarks/gpu.py --kit                          no GPU here: prepares what one needs
    python benchmarks/gpu.py --fit FILE [--write]           fits the plans' model of time to rows of
                                                            the steps plans-1, plans-2, plans-3

Each step runs in a separate process under a time limit, and every row is appended to
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
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a file, not as a module
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu_steps.sheet import read_rows, render, write_row  # noqa: E402
from benchmarks.harness import machine  # noqa: E402
from benchmarks.harness.runner import Failure, Runner  # noqa: E402

LIBRARY = ROOT / "ghost_ops" / "_cuda.so"
KIT = ROOT / "build" / "gpu-kit"
KIT_ARCHS = "9.0"  # H100, H200
LEADER = {"start_new_session": True}  # of a process group, which is ended as a whole
NO_GPU = 3  # exit status of a step
# Variables that would change what runs, or how.
NOT_PASSED_ON = (
    "CUDA_LAUNCH_BLOCKING GHOST_OPS_BACKEND GHOST_OPS_CUDA_PLAN GHOST_OPS_TRITON_AUTOTUNE "
    "PYTEST_ADDOPTS PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF TRITON_INTERPRET"
).split()


@dataclass(frozen=True)
class Step:
    """A step of the run."""

    name: str
    purpose: str
    seconds: float  # on an H100; its time limit is half as much again
    host: bool = True  # host time counts: the step needs ghost_ops._C and waits for its build
    environment: tuple[tuple[str, str], ...] = ()  # of its process

    def command(self, arguments: argparse.Namespace) -> list[str]:
        given = ["--child", self.name, "--out", arguments.out, "--run", arguments.run]
        given += ["--plans", arguments.plans, "--commit", arguments.commit]
        given += ["--resume"] if arguments.resume else []
        return [sys.executable, str(Path(__file__).resolve()), *map(str, given)]


PLANS = "every shape with the plan of rank {}, for --fit"
STEPS = (
    Step("correct", "three shapes against float64", 25, False, (("CUDA_LAUNCH_BLOCKING", "1"),)),
    Step("eval", "copy ceiling; every shape, float16, batch 256", 25, False),
    Step("network", "GhostNet 1.0x, eager and fused, batch 256 and 1, CUDA graphs", 40),
    Step("train", "forward + backward: network and shapes; kernels; memory", 75),
    Step("ncu", "hardware counters of five kernels", 40),
    Step("compile", "torch.compile, resnet18, mobilenet_v3_large", 90),
    Step("tests", "gpu-marked tests, memcheck, racecheck", 70),
    Step("more", "batch 1 and 32, Triton, YOLO shapes, NCHW, TF32, bfloat16", 75),
    Step("triton-tests", "gpu-marked tests of the Triton backend", 60),
    *(
        Step(f"plans-{rank}", PLANS.format(rank), 15, True, (("GHOST_OPS_CUDA_PLAN", rank),))
        for rank in "123"
    ),
)


def end_group(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished(process: subprocess.Popen[Any], seconds: float) -> int | None:
    """The exit status of a process, which ends within these seconds; None if it had to be ended."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


class StepRunner(Runner):
    """Runs the steps within the budget; each leaves a row with its seconds, and why it failed.

    ``module`` is the build of ``ghost_ops._C`` that goes on beside the first steps.
    """

    def __init__(
        self, arguments: argparse.Namespace, module: subprocess.Popen[Any] | None = None
    ) -> None:
        super().__init__(None, {})
        self.arguments, self.module, self.started = arguments, module, time.monotonic()

    def step(self, step: Step) -> str | None:
        """Run a step in the rest of the budget. Returns why it ended early, or None."""
        if step.host and self.module is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.module.wait(timeout=120)
        left = self.arguments.budget - (time.monotonic() - self.started)
        if left < 0:
            return "no time left"
        limit, log = min(1.5 * step.seconds, left), self.arguments.out / f"{step.name}.log"
        environment = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON}
        environment |= {"PYTHONUNBUFFERED": "1", **dict(step.environment)}
        command = step.command(self.arguments)
        code = finished(machine.start(command, log, ROOT, environment, **LEADER), max(limit, 0.1))
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:300]
        if code == NO_GPU:
            raise SystemExit(f"benchmarks/gpu.py: {last}")
        if code is None:
            return f"time limit of {limit:.0f} s"
        return None if code == 0 else f"ended with {code}: {last}"

    def finish(self, name: str, failure: Failure) -> None:
        row = {"step": name, "run": self.arguments.run, "seconds": self.seconds[name]}
        row |= {"note": f"failed: {failure}"} if failure else {}
        write_row(self.arguments.out / "rows.jsonl", row)
        print(f"{name}: {failure or 'done'}, {self.seconds[name]:.0f} s", flush=True)

    def run_steps(self, steps: Sequence[Step]) -> int:
        """Run the first steps that fit the budget. Returns 1 if one ended early, 130 if
        interrupted."""
        kept, budget = list(steps), self.arguments.budget
        while kept and sum(step.seconds for step in kept) > budget:
            kept.pop()
        for step in steps[len(kept) :]:
            print(f"{step.name}: left out, the budget is {budget:.0f} s", flush=True)
        return self.run([(step.name, functools.partial(self.step, step)) for step in kept])


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
    return machine.start(command, log, beside, {**os.environ, **choice}, **LEADER)


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
    code = finished(build(log, cuda=capability.split()[0]), 300)
    return None if code == 0 else f"the build ended with {code}: see {log}"


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
    print("On the GPU machine, in a copy of this checkout with these two files:")
    relative = shlex.quote(os.path.relpath(library, ROOT))
    print(f"    python3 benchmarks/gpu.py --out results/gpu --library {relative}")
    return 0


def predictions() -> dict[str, float]:
    """Microseconds that the plan predicts, by mode, dtype, batch and shape or network
    (channels_last)."""
    import torch

    from benchmarks.harness import shapes, subjects
    from ghost_ops import planner

    device, found = "sm_" + KIT_ARCHS.replace(".", ""), {}
    for shape in shapes.ALL:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for batch in (1, 32, 256):
                plan = shape.explain(batch, dtype=dtype, channels_last=True, device=device)
                found[f"eval {dtype} {batch} {shape.name}"] = round(plan.seconds * 1e6, 2)
    network = subjects.NETWORKS["ghostnet-1.0"].plain(224)
    for batch in (1, 256):
        whole = planner.explain(network, (batch, 3, 224, 224), device=device, dtype=torch.float16)
        found[f"eval {torch.float16} {batch} GhostNet 1.0x"] = round(whole.seconds * 1e6, 2)
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="folder (default: benchmarks/results/gpu)")
    add("--steps", nargs="*", default=names, metavar="NAME", help=", ".join(names))
    add("--list", action="store_true", help="print the steps and stop")
    add("--budget", type=float, default=480, help="seconds for all steps")
    add("--library", type=Path, help="a _cuda.so built elsewhere, copied here")
    add("--plans", type=Path, default=KIT / "plans.json", help="predicted times")
    add("--resume", action="store_true", help="keep rows that are still valid")
    add("--commit", default="", help="recorded where there is no .git")
    add("--fit", type=Path, metavar="FILE", help="fit the model to measured plans")
    add("--write", action="store_true", help="and put the result into its table")
    add("--kit", action="store_true", help="prepare what a GPU machine needs")
    for hidden in ("--child", "--run"):
        add(hidden, default="", help=argparse.SUPPRESS)
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
        from benchmarks.gpu_steps import fit

        return fit.main(arguments.fit, arguments.write)
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
        from benchmarks.gpu_steps import steps

        run = {"run": arguments.run, "commit": arguments.commit}
        return steps.main(arguments.child, rows, arguments.plans, arguments.resume, run)
    status, module = 0, None
    if arguments.steps:
        now = datetime.datetime.now(datetime.timezone.utc)
        arguments.run = now.isoformat(timespec="seconds")
        arguments.commit = arguments.commit or machine.git_commit()
        if reason := prepare_library(arguments):
            print(f"ours cannot run: {reason}", flush=True)
        chosen = [step for step in STEPS if step.name in arguments.steps]
        native = ROOT / "ghost_ops" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        if any(step.host for step in chosen) and not native.exists():
            module = build(arguments.out / "build_C.log")
        try:
            status = StepRunner(arguments, module).run_steps(chosen)
        finally:
            if module is not None:
                end_group(module)
    print(render(read_rows(rows)))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
