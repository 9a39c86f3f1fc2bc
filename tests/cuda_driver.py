"""Runs checks of the CUDA operators in a separate process, which a faulty kernel may crash.

    python tests/cuda_driver.py --library build/emulator/ops/lib.so --cases small --schedules all
    python tests/cuda_driver.py --gpu --cases small

Used by the tests with sanitizers and with planted mistakes. Exit status: 0 if all checks pass, 1 if
one fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from cuda_cases import (  # noqa: E402
    World,
    check_eval,
    check_extras,
    check_train,
    misaligned,
    norm_arguments,
    operands,
    poisoned_memory,
)
from cuda_layer_cases import check_depthwise, check_gate, check_pooled, check_stem  # noqa: E402
from cuda_statistics_cases import check_far_statistics, check_statistics  # noqa: E402
from helpers import Case  # noqa: E402

HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# Ragged everywhere: odd channels, tiles that end inside a vector, halo on all sides.
NHWC = Case(3, 24, 9, 11, 44, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
VECTORS = NHWC.replace(oup=40)  # whole 16-byte vectors of channels
NCHW = Case(2, 20, 11, 13, 26, layout="nchw", dtype=HALF, d=5, act1="silu", act2="none")
ODD = Case(2, 13, 7, 7, 21, layout="nhwc", dtype=BF16, ratio=3, act1="hardswish", act2="silu")
WIDE = Case(1, 40, 30, 34, 32, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
DEEP = Case(2, 150, 7, 7, 60, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
HUGE = Case(1, 7304, 3, 3, 20, layout="nhwc", dtype=HALF)  # w1 does not fit into shared memory
MANY = Case(30, 16, 14, 14, 24, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
SLICES = Case(2, 272, 5, 4, 70, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
BANDS = Case(4, 16, 44, 60, 16, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
LEAN = NHWC.replace(act1="relu", act2="relu")  # what Scope::kLean is for
RATIO = Case(2, 16, 7, 7, 33, ratio=3, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
SINGLE = Case(2, 9, 8, 10, 14, layout="nhwc", act1="silu", act2="gelu")
CHANNELS = Case(2, 12, 3, 3, 800, layout="nhwc", dtype=HALF, act1="silu", act2="silu")
GHOSTS = Case(4, 3, 5, 5, 50, ratio=17, d=7, dtype=FP64, act1="silu", act2="gelu")
DOUBLE = Case(2, 6, 9, 7, 10, dtype=FP64, act1="silu", act2="gelu", stride=2)

LAYER = {"dtype": HALF, "act": "silu", "layout": "nhwc", "stride": 2}
DEPTHWISE = {**LAYER, "shape": (2, 40, 9, 11), "k": 3}
GATE = {**LAYER, "shape": (3, 200, 5, 5), "reduced": 37, "gate": 0, "sums": False}
STEM = {**LAYER, "shape": (2, 3, 13, 10), "out_channels": 20, "layouts": ("nhwc", "nhwc")}
IMAGES = Case(9, 72, 5, 5, 40, layout="nhwc", dtype=HALF, act1="silu", act2="silu")

Check = Callable[[World], object]


def spawn(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, with some more environment variables."""
    command, env = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def with_nan(world: World, case: Case = NHWC) -> None:
    """NaN in x gives NaN at every output pixel that depends on it, and at no other."""
    case = case.replace(act1="relu", act2="relu")
    x = torch.randn(case.n, case.c, case.h, case.w, dtype=torch.float64).to(case.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    clean = check_eval(world, case, x=x)
    x[1, 3, 4, 5] = float("nan")
    got = nan_output(world, case, x)
    want = torch.zeros_like(got, dtype=torch.bool)
    want[1, : case.m, 4, 5] = True
    want[1, case.m :, 3:6, 4:7] = True
    assert torch.equal(got.isnan(), want), "where NaN comes out"
    off = ((got != clean) & ~want).nonzero()
    some = [(*at, got[tuple(at)].item(), clean[tuple(at)].item()) for at in off[:3].tolist()]
    assert not len(off), f"what NaN does not reach: {len(off)} numbers differ, such as {some}"


def nan_output(world: World, case: Case, x: torch.Tensor) -> torch.Tensor:
    """The output of ``ghost_apply`` for a given x and the seeded parameters of a case."""
    o = operands(case)
    bn1, bn2 = norm_arguments(o)
    packed = world.pack(o.w1, *bn1, 1e-5, o.p.w2.detach(), *bn2, 1e-5)
    return world.call("ghost_apply", x, packed, None, None, *o.shape, *o.acts, True)


SMALL: dict[str, Check] = {
    "eval nhwc": lambda w: check_eval(w, NHWC),
    "eval nchw": lambda w: check_eval(w, NCHW, residual=True),
    "eval odd": lambda w: check_eval(w, ODD),
    "eval wide": lambda w: check_eval(w, WIDE),
    "eval deep": lambda w: check_eval(w, DEEP),
    "eval huge": lambda w: check_eval(w, HUGE),
    "eval many": lambda w: check_eval(w, MANY),
    "eval bands": lambda w: check_eval(w, BANDS),
    "eval lean": lambda w: check_eval(w, LEAN),
    "eval lean bands": lambda w: check_eval(w, BANDS.replace(act1="relu", act2="none")),
    "eval ratio relu": lambda w: check_eval(w, RATIO.replace(oup=48, act1="relu", act2="relu")),
    "eval misaligned": lambda w: check_eval(w, NHWC, x=misaligned(operands(NHWC).x)),
    "eval ratio": lambda w: check_eval(w, RATIO),
    "eval single": lambda w: check_eval(w, SINGLE),
    "eval tf32": lambda w: check_eval(w, SINGLE, use_tf32=True),
    "eval staged": lambda w: check_eval(w, WIDE.replace(dtype=FP32), use_tf32=True),
    "eval staged deep": lambda w: check_eval(w, DEEP.replace(dtype=FP32), use_tf32=True),
    "eval double": lambda w: check_eval(w, DOUBLE),
    "eval u": lambda w: check_eval(w, NHWC, has_primary=False),
    "eval prelu": lambda w: check_extras(w, NHWC, prelu=(True, True)),
    "eval gate": lambda w: check_extras(w, WIDE, gate=(7, 12), residual=True),
    "eval gate nchw": lambda w: check_extras(w, NCHW, gate=(4, 5), prelu=(True, False)),
    "input gate": lambda w: check_extras(w, IMAGES, residual=True, in_gate=True),
    "input gate staged": lambda w: check_extras(
        w, IMAGES.replace(dtype=FP32), in_gate=True, use_tf32=True
    ),
    "input gate nchw": lambda w: check_extras(w, IMAGES.replace(layout="nchw"), in_gate=True),
    "depthwise": lambda w: check_depthwise(w, DEPTHWISE, True),
    "depthwise pixels": lambda w: check_depthwise(w, {**DEPTHWISE, "layout": "nchw"}, True),
    "gate": lambda w: check_gate(w, GATE),
    "gate nchw": lambda w: check_gate(w, {**GATE, "layout": "nchw"}),
    "gate in parts": lambda w: check_gate(w, {**GATE, "shape": (1, 1032, 4, 4), "reduced": 258}),
    "stem": lambda w: check_stem(w, STEM),
    "pooled": lambda w: check_pooled(w, IMAGES.replace(ratio=1)),
    "nan": with_nan,
    "nan in vectors": lambda w: with_nan(w, VECTORS),
    "statistics": lambda w: check_statistics(w, NCHW),
    "far statistics": lambda w: check_far_statistics(w, 1e4, 8.0, "normal", HALF, "nchw"),
    "train nhwc": lambda w: check_train(w, NHWC, keep_u=True),
    "train vectors": lambda w: check_train(w, VECTORS),
    "train nchw": lambda w: check_train(w, NCHW),
    "train odd": lambda w: check_train(w, ODD, grad_style="expanded"),
    "train deep": lambda w: check_train(w, DEEP),
    "train wide": lambda w: check_train(w, WIDE),
    "train many": lambda w: check_train(w, MANY),
    "train many nchw": lambda w: check_train(w, MANY.replace(n=12, layout="nchw")),
    "train slices": lambda w: check_train(w, SLICES),
    "train columns": lambda w: check_train(w, SLICES.replace(c=40, oup=130)),
    "train ratio": lambda w: check_train(w, RATIO),
    "train single": lambda w: check_train(w, SINGLE, grad_style="sliced"),
    "train double": lambda w: check_train(w, DOUBLE),
    "train u": lambda w: check_train(w, NHWC, has_primary=False),
    "train prelu": lambda w: check_train(w, NHWC, prelu=(True, True)),
    "train prelu ratio": lambda w: check_train(w, RATIO, prelu=(False, True)),
    "train in three": lambda w: check_train(w, RATIO, prelu=(True, False), in_three=True),
    "train mixed": lambda w: check_train(w, NCHW, batch_stats=(False, True), in_three=True),
    "frozen first nhwc": lambda w: check_train(w, NHWC, batch_stats=(False, True)),
    "frozen second nhwc": lambda w: check_train(w, NHWC, batch_stats=(True, False)),
    "frozen nhwc": lambda w: check_train(w, NHWC, batch_stats=False),
    "frozen nchw": lambda w: check_train(w, NCHW, batch_stats=False),
}


# Cases of ghost_apply_pipelined, with GHOST_OPS_CUDA_PIPELINE=1. On "tiny sm_90": bands with halo
# rows, a ragged last band, and several tiles per block; whole images, fewer in the last tile;
# ghosts past out_channels; one channel block of several groups.
BULK = {"layout": "nhwc", "dtype": HALF, "act1": "relu", "act2": "none"}
PIPELINED: dict[str, Case] = {
    "bands": Case(3, 16, 33, 45, 48, **BULK),
    "bands d5": Case(2, 24, 31, 50, 24, d=5, **BULK),
    "images": Case(37, 40, 7, 7, 40, **BULK),
    "odd images": Case(21, 8, 5, 9, 24, **{**BULK, "dtype": BF16}),
    "cut": Case(9, 64, 9, 6, 40, ratio=3, **BULK),
    "ratio 4": Case(
        4, 16, 11, 3, 32, ratio=4, d=5, **{**BULK, "act1": "silu", "act2": "hardswish"}
    ),
    "wide": Case(5, 80, 14, 14, 200, **{**BULK, "act2": "relu"}),
    "deep": Case(3, 200, 14, 14, 80, **{**BULK, "act1": "leaky_relu", "act2": "relu6"}),
    "two pixels": Case(70, 8, 1, 2, 16, **BULK),
    "column": Case(3, 16, 130, 1, 16, **BULK),
}


def check_pipelined(world: World, case: Case, library: Any) -> None:
    """Prints the emulated kernel that ran and a digest of its output."""
    got = check_eval(world, case)
    bits = got.view(torch.int16).contiguous(memory_format=torch.channels_last)
    digest = hashlib.sha256(bits.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest()
    print("digest", library.last_kernel() if library else "GPU", digest)


# Cases that exceed the shared memory of the devices in emulator.SMALL_BLOCKS.
SHORT_OF_MEMORY: dict[str, Check] = {
    "many channels": lambda w: check_train(w, CHANNELS),
    "many channels, u": lambda w: check_train(w, CHANNELS, has_primary=False),
    "many ghosts": lambda w: check_train(w, GHOSTS),
}


def run(world: World, library: Any, names: Sequence[str], schedules: dict[str, int]) -> int:
    """Returns the number of checks that fail; prints each failure."""
    failed = 0
    for schedule, bits in schedules.items():
        if library:
            library.configure(bits, seed=7)
        for name in names:
            try:
                torch.manual_seed(0)
                if name in PIPELINED:
                    check_pipelined(world, PIPELINED[name], library)
                else:
                    (SMALL | SHORT_OF_MEMORY)[name](world)
            except (AssertionError, RuntimeError) as error:
                failed += 1
                print(f"{name} ({schedule}): {str(error).strip().splitlines()[0]}", flush=True)
    print(f"{len(names) * len(schedules) - failed} right, {failed} wrong", flush=True)
    return failed


def run_library(path: Path, names: Sequence[str], schedules: Sequence[str], device: str) -> int:
    """Loads an emulator library into this process and runs checks on it."""
    import emulator

    library = emulator.load_ops(path)
    library.set_device({**emulator.DEVICES, **emulator.SMALL_BLOCKS}[device])
    chosen = list(emulator.SCHEDULES) if list(schedules) == ["all"] else schedules
    bits = {name: emulator.SCHEDULES[name] for name in chosen}
    return run(World(torch.ops.ghost_emu, "cpu"), library, names, bits)


@dataclasses.dataclass(frozen=True)
class Job:
    """Checks on one emulator library, run in a separate process.

    Args:
        name: unique among the jobs.
        library: path of the library.
        cases: keys of ``SMALL``, ``SHORT_OF_MEMORY`` or ``PIPELINED``.
        schedules: keys of ``emulator.SCHEDULES``.
        device: the GPU that the emulator stands for.
        environment: variables of the process.
    """

    name: str
    library: str
    cases: Sequence[str]
    schedules: Sequence[str]
    device: str
    environment: dict[str, str]


def results_of(jobs: Sequence[Job], folder: Path) -> dict[str, dict[str, Any]]:
    """Runs jobs in a driver process. Returns them by name, with the status and output of each."""
    import emulator

    file = folder / "jobs.json"
    file.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    environment = {**os.environ, "PYTHONPATH": str(emulator.ROOT)}
    command = [sys.executable, __file__, "--jobs", str(file)]
    subprocess.run(command, env=environment, check=True)
    return {job["name"]: job for job in json.loads(file.read_text())}


def run_jobs(file: Path) -> None:
    """Runs each job in a fork of this process, which has done the slow imports. Writes into the
    same file each job's exit status (negative: the signal that ended it) and output."""
    jobs = json.loads(file.read_text())
    with poisoned_memory():
        pass  # the import of what it uses takes long: once for all jobs
    for job in jobs:
        out = file.with_suffix(".out")
        child = os.fork()
        if child == 0:
            os.environ.update(job["environment"])
            signal.alarm(120)  # a faulty kernel may run forever
            with out.open("w") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                failed = run_library(
                    Path(job["library"]), job["cases"], job["schedules"], job["device"]
                )
                sys.stdout.flush()
                os._exit(min(failed, 100))
        _, status = os.waitpid(child, 0)
        job["status"] = os.waitstatus_to_exitcode(status)
        job["output"] = out.read_text()
    file.write_text(json.dumps(jobs))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--library", type=Path, help="an emulator library with the operators")
    where.add_argument("--gpu", action="store_true", help="the native library, on a CUDA device")
    where.add_argument("--jobs", type=Path, help="a JSON list of libraries and what to run on them")
    parser.add_argument("--cases", nargs="+", default=["small"], help="small (all), or names")
    parser.add_argument("--schedules", nargs="+", default=["plain"], help="of the emulator, or all")
    parser.add_argument("--device", default="sm_90", help="what the emulator poses as")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = list(SMALL) if arguments.cases == ["small"] else arguments.cases
    if arguments.jobs:
        run_jobs(arguments.jobs)
        return 0
    if arguments.gpu:
        from ghost_ops.backends import native

        ok, reason = native.can_run("cuda", HALF)  # loads the library; without it eager would run
        if not ok:
            raise SystemExit(reason)
        return int(run(World(torch.ops.ghost_ops, "cuda"), None, names, {"plain": 0}) > 0)
    failed = run_library(arguments.library, names, arguments.schedules, arguments.device)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
