"""How well does the bytes-and-FLOPs model behind the tile plan predict the measured time?

    python -m benchmarks.plan
    python -m benchmarks.plan --quick

For each shape the planner counts the bytes of a fused pass and of the unfused kernels, and the
FLOPs of both convolutions. The prediction takes peak and bandwidth as measured in this run and
nothing fitted to the module:

    t = call + max(bytes / bandwidth(bytes), FLOPs / GEMM peak)

with ``call`` the measured time of the same module on a 1 x 8 x 4 x 4 input. What the model cannot
know, how close kernels come to both limits, shows as a common factor; the error that remains
without it says whether the model ranks shapes rightly.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import floor, harness, providers, report, session, shapes
from benchmarks.extras import require
from benchmarks.measure import Measurer, failures, random_input
from benchmarks.session import Session, Task
from benchmarks.shapes import Shape

MODELLED = ("eager_nchw", "fused_nchw", "fused_cl")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of the script; argparse exits with a message on bad values."""
    parser = session.make_parser("plan", __doc__.partition("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--shapes", nargs="+", help="all, ghostnet, yolo, quick, names or globs (default: all)"
    )

    def check(arguments: argparse.Namespace) -> None:
        if any(batch < 1 for batch in arguments.batch):
            raise ValueError(f"batch: expected positive integers, got {arguments.batch}")
        arguments.shapes = shapes.select(
            arguments.shapes or ["quick" if arguments.quick else "all"]
        )
        arguments.batch = sorted(set(arguments.batch))

    return session.parse(parser, argv, check)


def predict(
    roofline: floor.Roofline, nbytes: float, flops: float, call: float, gemm_peak: float
) -> float:
    """Seconds of one call: its overhead, and whatever of memory and arithmetic takes longer."""
    return call + roofline.at_peak(gemm_peak).floor(nbytes, flops)


class PlanBenchmark:
    """Measures shapes and sets the prediction beside each time."""

    def __init__(self, run: Session, measurer: Measurer) -> None:
        self.run, self.measurer = run, measurer
        self.overheads: dict[str, float] = {}

    def overhead(self) -> None:
        """Time of a call that computes next to nothing, for each provider."""
        shape = Shape(8, 16, 4)
        reference = providers.reference_module(shape, dtype=self.measurer.dtype).eval()
        x = random_input(shape, 1, self.measurer.dtype)
        with torch.inference_mode():
            calls = {
                p.name: functools.partial(providers.build(p, reference, training=False), p.input(x))
                for p in self.measurer.chosen
            }
            timings = self.measurer.time(calls, self.run.arguments.rounds)
        for provider in self.measurer.chosen:
            row = self.measurer.row("overhead", shape, 1, provider)
            timing = timings[provider.name]
            self.measurer.fill(row, harness.Check(0.0, 0.0, 0.0), timing)
            self.overheads[provider.name] = timing.median

    def shape(self, shape: Shape, batch: int) -> None:
        """Measure one shape; its rows get ``plan_bytes``, ``predicted_s`` and ``scratch_bytes``."""
        from ghost_ops import planner

        if not self.overheads:  # resumed: they are in the rows of the earlier run
            self.overheads = {
                r["provider"]: r["median_s"] for r in self.run.rows if r["mode"] == "overhead"
            }
        self.measurer.eval(shape, batch)
        for row in self.run.unsaved():
            if row["median_s"] is None or row["provider"] not in MODELLED:
                continue
            plan = planner.explain(
                (batch, shape.inp, shape.size, shape.size),
                shape.oup,
                ratio=shape.ratio,
                dw_size=shape.dw_size,
                stride=shape.stride,
                activation=shape.activation,
                dtype=self.measurer.dtype,
                channels_last=row["layout"] == providers.CHANNELS_LAST,
            )
            fused = row["provider"].startswith("fused")
            nbytes = plan.bytes_fused if fused else plan.bytes_eager
            row["plan_bytes"], row["plan_flops"] = nbytes, plan.flops
            row["scratch_bytes"] = plan.scratch_bytes if fused else None
            row["predicted_s"] = predict(
                self.measurer.roofline,
                nbytes,
                plan.flops,
                self.overheads[row["provider"]],
                row["gemm_peak"],
            )


def predictions(rows: Sequence[report.Row]) -> dict[str, list[report.Row]]:
    """``provider, batch`` -> the rows that have a prediction."""
    groups: dict[str, list[report.Row]] = {}
    for row in report.timed(rows):
        if "predicted_s" in row:
            groups.setdefault(f"{row['provider']}, batch {row['batch']}", []).append(row)
    return groups


def summarize(rows: Sequence[report.Row]) -> dict[str, dict[str, Any]]:
    """(provider, batch) -> how predictions and times agree.

    Returns:
        ``factor``: geometric mean of measured / predicted; ``error``: median of
        |measured / (factor * predicted) - 1|; ``worst``: the largest such ratio and its shape;
        ``rank``: Spearman's rank correlation of predicted and measured times.
    """
    numpy = require("numpy", "rank correlation")
    found = {}
    for name, part in predictions(rows).items():
        ratios = [row["median_s"] / row["predicted_s"] for row in part]
        factor = statistics.geometric_mean(ratios)
        off = [ratio / factor for ratio in ratios]
        worst = max(range(len(off)), key=lambda i: abs(math.log(off[i])))
        ranks = [
            numpy.argsort(numpy.argsort([row[key] for row in part]))
            for key in ("predicted_s", "median_s")
        ]
        found[name] = {
            "shapes": len(part),
            "factor": factor,
            "error": statistics.median(abs(o - 1.0) for o in off),
            "worst": off[worst],
            "worst_shape": part[worst]["shape"],
            "rank": float(numpy.corrcoef(*ranks)[0, 1]) if len(part) > 2 else None,
        }
    return found


def print_report(
    console: Any, rows: Sequence[report.Row], summary: dict[str, dict[str, Any]]
) -> None:
    """Predicted and measured time of every shape, then the errors."""
    headings = ("shape", "batch", "provider", "predicted, us", "measured, us", "ratio")
    table = report.plain_table("Predicted and measured", headings, text=("provider",))
    for row in report.timed(rows):
        if "predicted_s" in row:
            table.add_row(
                row["shape"],
                str(row["batch"]),
                row["provider"],
                f"{1e6 * row['predicted_s']:.0f}",
                f"{1e6 * row['median_s']:.0f}",
                f"{row['median_s'] / row['predicted_s']:.2f}",
            )
    console.print(table)
    for name, s in summary.items():
        rank = "" if s["rank"] is None else f"; rank correlation {s['rank']:.3f}"
        console.print(
            f"{name}: measured = {s['factor']:.2f} x predicted (geometric mean); without that "
            f"factor the median error is {s['error']:.0%}, the worst {s['worst']:.2f}x "
            f"({s['worst_shape']}){rank}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 if ghost_ops failed a check, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(argv)
    from ghost_ops import backends

    try:
        backends.native.library()
    except RuntimeError as error:
        print(f"error: the plan is that of the native kernels: {error}", file=sys.stderr)
        return 2
    run = session.start("plan", argv, arguments)
    if run is None:
        return 2
    benchmark = PlanBenchmark(run, Measurer(run, providers.select(MODELLED)))
    work: list[Task] = [("overhead", benchmark.overhead)]
    for batch in arguments.batch:
        work += [
            (f"b{batch} {s.name}", functools.partial(benchmark.shape, s, batch))
            for s in arguments.shapes
        ]
    status = run.run(work)
    summary = summarize(run.rows)
    print_report(run.console, run.rows, summary)
    return session.finish(run, status, summary, failures(run.rows))


if __name__ == "__main__":
    raise SystemExit(main())
