"""How fast is one Ghost module, how much does it keep for backward, what does a call cost?

    python -m benchmarks module                          everything, 25 shapes, batch 1 and 16
    python -m benchmarks module --mode train --batch 16 --shapes ghostnet --compile all

Providers: eager PyTorch in both layouts, batch norm folded into the convolutions in both layouts,
torch.compile (default and frozen, channels_last), ONNX Runtime and OpenVINO where they are
installed (pip extra ``engines``), and ghost_ops given x in each layout. Everything in eval mode
runs under ``torch.inference_mode``. Every output and gradient is checked against the reference in
float64 before its time counts.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.harness import rows as results
from benchmarks.harness import subjects
from benchmarks.harness.measure import Measurer
from benchmarks.harness.rows import BASELINE, FUSED, Cell, Point, Row, by_shape, fastest, ratio
from benchmarks.harness.runner import Session, Task
from benchmarks.harness.subjects import Subject
from benchmarks.questions.question import Question, each
from benchmarks.report.table import Table, cell, times, untimed

MODES = ("eval", "train", "overhead")


def overhead(measurer: Measurer) -> None:
    """Call time of a Ghost module, and of the other forms that ``fuse`` takes, at that size."""

    def step(module: nn.Module, own: Tensor) -> Callable[[], object]:
        inputs = [own.requires_grad_(), *module.parameters()]
        grad = torch.ones_like(module(own))
        return lambda: torch.autograd.grad(module(own), inputs, grad)

    def forward(module: nn.Module, own: Tensor) -> Callable[[], object]:
        return functools.partial(module, own.requires_grad_())

    run, call = measurer.overhead, functools.partial
    with torch.inference_mode():
        run(False, call, what="eval, inference_mode")
        for form, plain in subjects.small_modules().items():
            run(False, call, plain, what=f"eval, inference_mode, {form}")
    with torch.no_grad():
        run(False, call, what="eval, no_grad")
    run(True, forward, what="train, forward")
    run(True, step, what="train, forward + backward")


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Timed rows of eval and train by ``group, mode, batch``."""
    found = results.timed(row for row in rows if row["mode"] in ("eval", "train"))
    parts = results.split(found, "group", "mode", "batch")
    return {f"{group}, {mode}, batch {batch}": part for (group, mode, batch), part in parts.items()}


def candidates(found: Cell) -> dict[str, Row]:
    """The rows of one shape, and the fastest of PyTorch, of the engines, of both and of ours."""
    kinds = {"best_pytorch": ["pytorch"], "best_engine": ["engine"], "fused_best": ["ours"]}
    kinds["the best peer"] = ["pytorch", "engine"]
    fast = {name: fastest(found, *families) for name, families in kinds.items()}
    return {**found, **{name: row for name, row in fast.items() if row is not None}}


def network_ms(rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds of all modules of a network, each as often as it occurs, by candidate."""
    shapes = by_shape(rows)
    totals: dict[str, list[float]] = {}
    for found in shapes.values():
        for name, row in candidates(found).items():
            totals.setdefault(name, []).append(1e3 * row["count"] * row["median_s"])
    return {name: sum(v) for name, v in totals.items() if len(v) == len(shapes)}


def _shape_line(shape: str, found: Mapping[str, Row]) -> list[str]:
    first, v = next(iter(found.values())), results.versus(found)
    ours, best = fastest(found, "ours"), fastest(found, "pytorch", "engine")
    peers = [cell(first, "floor_s"), cell(found.get(BASELINE)), cell(best)]
    peers.append(best["provider"] if best else "")
    layouts = (cell(found.get(name)) for name in FUSED)
    over = times(v.over_eager if v else None), times(v.over_best if v else None)
    error = f"{ours['error']:.0e}" if ours else ""
    return [shape, first["bound"], *peers, *layouts, cell(ours, "floors", 1, 2), *over, error]


def saved_totals(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Network family -> provider -> bytes that its modules save, each as often as it occurs."""
    found = results.split((r for r in rows if r["mode"] == "saved"), "group", "provider")
    totals: dict[str, dict[str, int]] = {}
    for (group, provider), part in found.items():
        total = sum(row["count"] * row["saved_total"] for row in part)
        totals.setdefault(group, {})[provider] = total
    return totals


def _saved(rows: Sequence[Row]) -> list[Table]:
    """Bytes saved for backward, and whether the memory contract is kept."""
    found = results.cells((r for r in rows if r["mode"] == "saved"), "shape", "batch")
    if not found:
        return []
    names = list(dict.fromkeys(name for part in found.values() for name in part))

    def line(what: str, sizes: Mapping[str, int], *last: str) -> list[str]:
        return [what, *(f"{sizes[n] / 2**20:.2f}" if n in sizes else "" for n in names), *last]

    body = []
    for (shape, batch), part in found.items():
        kept = all(part[name].get("contract_ok", True) for name in FUSED if name in part)
        sizes = {name: row["saved_total"] for name, row in part.items()}
        body.append(line(f"{shape}, batch {batch}", sizes, "kept" if kept else "**broken**"))
    for group, sizes in saved_totals(rows).items():
        body.append(line(f"all {group} modules, as often as they occur", sizes, ""))
    title = "Saved between forward and backward, MiB"
    return [Table(title, ("shape", *names, "contract"), body)]


def _overhead(rows: Sequence[Row]) -> list[Table]:
    found = results.timed(r for r in rows if r["mode"] == "overhead")
    base = {r["what"]: r for r in found if r["provider"] == BASELINE}
    body = []
    for r in found:
        over = ratio(base[r["what"]], r)[0] if r["what"] in base else None
        numbers = (cell(r, key) for key in results.QUANTILES)
        body.append((f"{r['what']}, {r['provider']}", *numbers, times(over)))
    headings = ("call", "median", "p20", "p80", "over eager")
    title = "Call overhead: x [1, 8, 4, 4], microseconds"
    return [Table(title, headings, body)] if body else []


class Module(Question):
    name = "module"
    title = "One Ghost module"
    purpose = "one Ghost module: time in floors, ratios to the peers, saved memory, call overhead"
    # Compiling a hundred modules would take half of the twenty minutes.
    full = ("--rounds", "9", "--compile-minutes", "3")
    has_batches = has_shapes = True
    default_providers = ("all",)
    default_compile = "eval"

    def options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--mode", choices=(*MODES, "all"), default="all")

    def tasks(self, run: Session) -> list[Task]:
        measurer, given = Measurer(run), run.arguments
        modes = MODES if given.mode == "all" else (given.mode,)
        work: list[Task] = []
        if "overhead" in modes:
            work.append(("overhead", functools.partial(overhead, measurer)))

        def train(subject: Subject) -> None:
            measurer.train(subject)
            measurer.saved(subject)

        if "eval" in modes:
            work += each("eval ", given, given.batch, measurer.eval)
        if "train" in modes:
            work += each("train ", given, given.batch[-1:], train)
        return work

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        found = []
        for name, part in groups(rows).items():
            totals = network_ms(part)
            body = [[f"{ms:.2f}" for ms in totals.values()]]
            found.append(Table(f"{name}: all modules of the network, ms", [*totals], body))
            lines = [_shape_line(shape, cell) for shape, cell in by_shape(part).items()]
            headings = "shape, bound, floor, eager, best peer, by, ours NCHW, ours NHWC, floors, "
            headings = (headings + "over eager, over best, error").split(", ")
            found.append(Table(f"{name}: one call, us", headings, lines))
        return [*found, *_saved(rows), *_overhead(rows), untimed(rows)]

    def ratios(self, rows: Sequence[Row]) -> Iterable[Point]:
        for name, part in groups(rows).items():
            for shape, found in by_shape(part).items():
                every = candidates(found)
                ours = every.pop("fused_best", None)
                for who, other in every.items() if ours else ():
                    if results.family(who) != "ours":
                        mean = f"{name}: times faster than {who}"
                        label = f"{shape} ({other['provider']})"
                        yield Point(mean, ratio(other, ours), label)
                for layout in ("nchw", "cl"):
                    pair = [found.get(f"{who}_{layout}") for who in ("eager", "fused")]
                    if all(pair):
                        mean = f"{name}: times faster in the layout {layout} than eager"
                        yield Point(mean, ratio(*pair), shape)
            for shape, found in by_shape(part).items():
                for who, row in candidates(found).items():
                    scale = row["floors"] / row["median_s"]
                    value, low, high = (scale * row[key] for key in results.QUANTILES)
                    yield Point(f"{name}: floors of {who}", (value, low, high), shape)
