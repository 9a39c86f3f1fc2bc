"""How fast is one Ghost module, how much does it keep for backward, what does a call cost?

    python -m benchmarks.module                          everything, 25 shapes, batch 1 and 16
    python -m benchmarks.module --mode eval --quick      a few shapes, without torch.compile
    python -m benchmarks.module --mode train --batch 16 --shapes ghostnet --compile all

Providers: eager PyTorch in both layouts, batch norm folded into the convolutions in both layouts,
torch.compile (default and frozen, channels_last), ONNX Runtime and OpenVINO where they are
installed (pip extra ``engines``), and ghost_ops given x in each layout. Everything in eval mode
runs under ``torch.inference_mode``. Every output and gradient is checked against the reference in
float64 before its time counts.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import engines, harness, networks, providers, report, session, shapes
from benchmarks.measure import Measurer, error_floors, failures, random_input
from benchmarks.session import Session, Task
from benchmarks.shapes import Shape

__all__ = ["error_floors", "failures", "main", "parse_arguments", "print_report"]
MODES = ("eval", "train", "overhead")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = session.make_parser("module", __doc__.partition("\n\n")[0])
    parser.add_argument("--mode", choices=(*MODES, "all"), default="all")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], help="batch sizes (train: the largest)"
    )
    parser.add_argument(
        "--shapes", nargs="+", help="all, ghostnet, yolo, quick, names or globs (default: all)"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        help="names, families or globs; all: PyTorch and ours (default: those and the engines that "
        "are installed)",
    )
    session.add_compile_options(parser, "eval")

    def check(arguments: argparse.Namespace) -> None:
        arguments.shapes = shapes.select(
            arguments.shapes or ["quick" if arguments.quick else "all"]
        )
        arguments.providers = engines.choose(arguments.providers)
        if any(batch < 1 for batch in arguments.batch):
            raise ValueError(f"batch: expected positive integers, got {arguments.batch}")
        session.check_compile_options(arguments, "eval")
        arguments.batch = sorted(set(arguments.batch))

    return session.parse(parser, sys.argv[1:] if argv is None else argv, check)


def overhead(measurer: Measurer) -> None:
    """Call time of an 8 -> 16 module on x [1, 8, 4, 4]: next to no arithmetic.

    And of what ``fuse`` makes of other modules of that size, by the name of their form.
    """
    shape = Shape(8, 16, 4)
    reference = providers.reference_module(shape, dtype=measurer.dtype)
    x = random_input(shape, 1, measurer.dtype)
    names = [p for p in measurer.chosen if p.family in ("eager", "folded", "fused")]

    def run(
        what: str, training: bool, wrap: Callable[[Any, Tensor], Callable[[], object]],
        plain: nn.Module | None = None,
    ) -> None:  # fmt: skip
        calls, chosen = {}, {}
        for provider in names:
            if (training and not provider.trains) or (plain and provider.family == "folded"):
                continue
            if plain is None:
                module = providers.build(provider, reference, training=training)
            else:
                module = networks.build(provider, plain, training=training)
            calls[provider.name] = wrap(module, provider.input(x).clone())
            chosen[provider.name] = provider
        # Microsecond calls need more samples than long ones and cost little.
        timings = measurer.time(calls, 2 * measurer.session.arguments.rounds + 1)
        for name, timing in timings.items():
            row = measurer.row("overhead", shape, 1, chosen[name], what=what)
            measurer.fill(row, harness.Check(0.0, 0.0, 0.0), timing)

    def step(module: nn.Module, own: Tensor) -> Callable[[], object]:
        inputs = [own.requires_grad_(), *module.parameters()]
        grad = torch.ones_like(module(own))
        return lambda: torch.autograd.grad(module(own), inputs, grad)

    with torch.inference_mode():
        run("eval, inference_mode", False, functools.partial)
        for form, plain in networks.small_modules().items():
            run(f"eval, inference_mode, {form}", False, functools.partial, plain)
    with torch.no_grad():
        run("eval, no_grad", False, functools.partial)
    run("train, forward", True, lambda m, own: functools.partial(m, own.requires_grad_()))
    run("train, forward + backward", True, step)


def tasks(measurer: Measurer, arguments: argparse.Namespace) -> list[Task]:
    """The work of all modes asked for."""
    modes = MODES if arguments.mode == "all" else (arguments.mode,)
    work: list[Task] = []
    if "overhead" in modes:
        work.append(("overhead", functools.partial(overhead, measurer)))
    for batch in arguments.batch if "eval" in modes else ():
        work += [
            (f"eval b{batch} {s.name}", functools.partial(measurer.eval, s, batch))
            for s in arguments.shapes
        ]
    if "train" in modes:
        batch = arguments.batch[-1]
        work += [
            (f"train b{batch} {s.name}", functools.partial(measurer.train, s, batch))
            for s in arguments.shapes
        ]
    return work


def print_report(console: Any, rows: Sequence[report.Row]) -> dict[str, Any]:
    """Tables of every mode in ``rows``; returns the summaries by title."""
    summaries: dict[str, Any] = {}
    tables = [r for r in rows if r["mode"] in ("eval", "train")]
    grouped = report.groups(tables)
    for (mode, batch, group), part in grouped.items():
        summaries[f"{mode}, batch {batch}, {group}"] = report.summarize(part)
        report.print_shapes(console, f"{mode}, batch {batch}, {group}: one call", part)
    saved = [r for r in rows if r["mode"] == "saved"]
    if saved:
        report.print_saved(console, saved)
    calls = [r for r in rows if r["mode"] == "overhead"]
    if calls:
        report.print_overhead(console, calls)
    for title, summary in summaries.items():
        report.print_summary(console, title, summary)
    return summaries


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if ghost_ops failed a check, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    run: Session | None = session.start("module", argv, arguments)
    if run is None:
        return 2
    measurer = Measurer.of(run)
    status = run.run(tasks(measurer, arguments))
    summaries = print_report(run.console, run.rows)
    return session.finish(run, status, summaries, failures(run.rows))


if __name__ == "__main__":
    raise SystemExit(main())
