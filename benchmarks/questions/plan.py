"""How well does the bytes-and-FLOPs model behind the tile plan predict the measured time?

    python -m benchmarks plan

For each shape the planner counts the bytes of a fused pass and of the unfused kernels, and the
FLOPs of both convolutions. The prediction takes peak and bandwidth as measured in this run and
nothing fitted to the module:

    t = call + max(bytes / bandwidth(bytes), FLOPs / GEMM peak)

with ``call`` the measured time of the same module on a 1 x 8 x 4 x 4 input. How close kernels come
to both limits is not in the model: it shows as a common factor. The error that remains without the
factor says whether the model ranks shapes rightly.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.harness import providers
from benchmarks.harness.floor import Roofline
from benchmarks.harness.machine import require
from benchmarks.harness.measure import Measurer
from benchmarks.harness.rows import QUANTILES, Point, Row, split, timed
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.subjects import Subject
from benchmarks.questions.question import Question, each
from benchmarks.report.table import Table

MODELLED = ("eager_nchw", "fused_nchw", "fused_cl")


def predict(limits: Roofline, nbytes: float, flops: float, call: float, peak: float) -> float:
    """Seconds of one call: its overhead, and whatever of memory and arithmetic takes longer."""
    return call + dataclasses.replace(limits, gemm_peak=peak).floor(nbytes, flops)


def set_prediction(row: dict[str, Any], subject: Subject, call: float, limits: Roofline) -> None:
    """Give a timed row ``plan_bytes``, ``plan_flops``, ``scratch_bytes`` and ``predicted_s``."""
    channels_last = row["layout"] == providers.CHANNELS_LAST
    dtype, batch = subject.x.dtype, len(subject.x)
    plan = subject.shape.explain(batch, dtype=dtype, channels_last=channels_last)
    fused = row["provider"].startswith("fused")
    nbytes = plan.bytes_fused if fused else plan.bytes_eager
    row |= {"plan_bytes": nbytes, "plan_flops": plan.flops}
    row["scratch_bytes"] = plan.scratch_bytes if fused else None
    row["predicted_s"] = predict(limits, nbytes, plan.flops, call, row["gemm_peak"])


def predictions(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """``provider, batch`` -> the rows that have a prediction."""
    found = [row for row in timed(rows) if "predicted_s" in row]
    parts = split(found, "provider", "batch")
    return {f"{provider}, batch {batch}": part for (provider, batch), part in parts.items()}


def summarize(part: Sequence[Row]) -> dict[str, Any]:
    """How predictions and times of one provider and batch agree.

    Returns:
        ``factor``: geometric mean of measured / predicted; ``error``: median of
        |measured / (factor * predicted) - 1|; ``worst``: the largest such ratio and its shape;
        ``rank``: Spearman's rank correlation of predicted and measured times.
    """
    numpy = require("numpy", "rank correlation")
    ratios = [row["median_s"] / row["predicted_s"] for row in part]
    factor = statistics.geometric_mean(ratios)
    off = [ratio / factor for ratio in ratios]
    furthest = max(range(len(off)), key=lambda i: abs(math.log(off[i])))
    keys = ("predicted_s", "median_s")
    ranks = [numpy.argsort(numpy.argsort([row[key] for row in part])) for key in keys]
    return {
        "factor": factor,
        "error": statistics.median(abs(o - 1.0) for o in off),
        "worst": off[furthest],
        "worst_shape": part[furthest]["shape"],
        "rank": float(numpy.corrcoef(*ranks)[0, 1]) if len(part) > 2 else None,
    }


class Plan(Question):
    name = "plan"
    title = "Predicted and measured"
    purpose = "time predicted from bytes and FLOPs against time measured"
    has_batches = has_shapes = True

    def unavailable(self, arguments: argparse.Namespace) -> str | None:
        """Why there is no plan here, or None."""
        from ghost_ops import backends

        try:
            backends.native.library()
        except RuntimeError as error:
            return f"the plan is that of the native kernels: {error}"
        return None

    def tasks(self, run: Session) -> list[Task]:
        measurer = Measurer(run, providers.select(MODELLED))

        def overhead() -> None:
            with torch.inference_mode():
                measurer.overhead(False, functools.partial)

        def measure(subject: Subject) -> None:
            calls = {r["provider"]: r["median_s"] for r in run.rows if r["mode"] == "overhead"}
            measurer.eval(subject)
            for row in timed(run.unsaved):
                set_prediction(row, subject, calls[row["provider"]], measurer.roofline)

        return [("overhead", overhead), *each("", run.arguments, run.arguments.batch, measure)]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """The errors, then predicted and measured time of every shape."""
        errors, every = [], []
        for name, part in predictions(rows).items():
            s = summarize(part)
            rank = "" if s["rank"] is None else f"{s['rank']:.3f}"
            off = f"{s['worst']:.2f}x ({s['worst_shape']})"
            errors.append((name, len(part), f"{s['factor']:.2f}", f"{s['error']:.0%}", off, rank))
            for row in part:
                predicted, measured = 1e6 * row["predicted_s"], 1e6 * row["median_s"]
                numbers = (f"{predicted:.0f}", f"{measured:.0f}", f"{measured / predicted:.2f}")
                every.append((f"{row['shape']}, {name}", *numbers))
        headings = ["provider, batch", "shapes", "measured / predicted (geometric mean)"]
        headings += ["median error without that factor", "worst", "rank correlation"]
        shape = ("shape, provider, batch", "predicted, us", "measured, us", "ratio")
        return [Table("Errors", headings, errors), Table("Every shape", shape, every)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        for name, part in predictions(rows).items():
            for row in part:
                value, low, high = (row[key] / row["predicted_s"] for key in QUANTILES)
                mean = f"plan, {name}: measured over predicted"
                yield Point(mean, (value, low, high), row["shape"])
