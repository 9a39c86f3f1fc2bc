"""Pictures of results files, as PNG and SVG in one style.

    python -m benchmarks plots results/module.json                   beside the file
    python -m benchmarks plots results/scaling.json --out pictures

Colours are Okabe and Ito's, which colour-blind readers tell apart; marks differ in form too.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness import rows as results
from benchmarks.harness.machine import MissingExtra, require
from benchmarks.harness.rows import Cell, Row, Triple, Versus, fastest, ratio
from benchmarks.questions import QUESTIONS, paper, scaling

Document = Mapping[str, Any]
EAGER, BEST, OURS, ENGINE, LOSS = "#7F7F7F", "#E69F00", "#0072B2", "#56B4E9", "#D55E00"
GRID = {"color": "#D9D9D9", "linewidth": 0.6}
TITLE = {"loc": "left", "fontweight": "bold"}
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
}
TICKS = [k * 10.0**e for e in range(-2, 7) for k in (1, 2, 5)]


class Nothing(ValueError):
    """The rows do not allow a picture; the message names the missing ones."""


def matplotlib() -> Any:
    """matplotlib without pyplot, which would hold global state and need a display."""
    for module in ("matplotlib.figure", "matplotlib.ticker"):
        require(module, "pictures")
    return require("matplotlib", "pictures")


def shape_label(shape: str) -> str:
    """``40-120@28-relu`` as ``40 → 120 @ 28, ReLU``; the name of a network as it is."""
    label = re.sub(r"^(\d+)-(\d+)@(\d+)-", r"\1 → \2 @ \3, ", shape)
    return label.replace(", relu", ", ReLU").replace(", silu", ", SiLU")


def ghostnet_mean(values: Iterable[tuple[str, float]]) -> float:
    """Geometric mean over the GhostNet shapes, or over all where there are none."""
    every = list(values)
    chosen = [v for group, v in every if group == "ghostnet"] or [v for _, v in every]
    return statistics.geometric_mean(chosen) if chosen else math.nan


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **share: bool) -> Any:
    """A figure of so many inches, and its axes."""
    figure = matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **share).flat)


def legend_above(axes: Any, columns: int) -> None:
    """The legend between title and axes, where it never covers data."""
    rows = -(-len(axes.get_legend_handles_labels()[1]) // columns)
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0)}
    axes.legend(**place, ncols=columns, borderaxespad=0.2, handletextpad=0.5)
    axes.set_title(axes.get_title(loc="left"), pad=8 + 13 * rows, **TITLE)


def shape_axis(axes: Any, names: Sequence[str]) -> None:
    """One line per name, from the top; the value 1 is marked."""
    axes.set_yticks(range(len(names)), [shape_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", **GRID)
    axes.axvline(1.0, color="black", linewidth=1.0)


def log_axis(axes: Any, which: str, ticks: Sequence[float] = TICKS) -> None:
    """A logarithmic axis whose ticks are written as plain numbers."""
    ticker, axis = matplotlib().ticker, getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    axis.set_major_locator(ticker.FixedLocator(ticks))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


def curve(
    axes: Any, label: str, colour: str, mark: str, xs: Sequence[float], ys: Sequence[float]
) -> None:
    """A line with marks, or marks alone; ``mark`` as matplotlib has it."""
    size = 4 if "-" in mark else 5
    axes.plot(xs, ys, mark, color=colour, markersize=size, linewidth=1.2, label=label)
    axes.grid(**GRID)


def draw_bars(axes: Any, names: Sequence[str], values: Sequence[Triple]) -> None:
    """Horizontal bars with the ends of their noise, losses in another colour."""
    middle = [value for value, _, _ in values]
    noise = list(zip(*((value - low, high - value) for value, low, high in values), strict=True))
    colours = [OURS if value >= 1.0 else LOSS for value in middle]
    line = {"elinewidth": 0.8, "ecolor": "#444444"}
    axes.barh(range(len(names)), middle, 0.7, color=colours, xerr=noise, error_kw=line)
    axes.set_xlim(0.0, 1.6 * max(1.0, *middle))  # noise beyond that would hide the bars
    shape_axis(axes, names)


def caption(figure: Any, meta: Mapping[str, Any]) -> None:
    """Machine, versions, commit and date, below everything."""
    text = f"{meta['cpu']}, threads {meta['threads']}; torch {meta['torch']}; "
    text += f"commit {meta['commit']}; {meta['date'][:10]}"
    if meta.get("forced"):
        text = f"{machine.instructions(meta)}; {text}"
    room = 0.2 / figure.get_figheight()  # inches, below everything that is laid out
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.text(0.995, 0.2 * room, text, ha="right", va="bottom", fontsize=6.5, color="#555555")


def _batches(rows: Iterable[Row], *families: str) -> dict[int, dict[str, Cell]]:
    """Batch -> shape -> the eval rows of a shape that has one of each family."""
    found = {}
    evaluated = (row for row in results.timed(rows) if row["mode"] == "eval")
    for (batch,), part in results.split(evaluated, "batch").items():
        cells = results.by_shape(part)
        kept = {s: c for s, c in cells.items() if all(fastest(c, *f.split()) for f in families)}
        if kept:
            found[batch] = kept
    if not found:
        raise Nothing("no eval rows of ghost_ops with a peer")
    return dict(sorted(found.items()))


def draw_floors(document: Document) -> Any:
    """Dots: eval time of every shape in floors, one panel a batch size."""
    found = _batches(document["rows"])
    series = [("eager PyTorch (NCHW)", EAGER, "s", ["eager_nchw"])]
    series += [("best PyTorch option", BEST, "D", ["pytorch"]), ("ghost_ops", OURS, "o", ["ours"])]
    measured = {row["provider"].partition("_")[0] for row in document["rows"]}
    if engines := [family for family in results.ENGINE_FAMILIES if family in measured]:
        series.insert(2, (f"best of {', '.join(engines)}", ENGINE, "^", ["engine"]))
    height = 1.5 + 0.21 * max(map(len, found.values()))
    figure, grid = panels(3.2 + 3.3 * len(found), height, 1, len(found), sharex=True, sharey=True)
    for axes, (batch, cells) in zip(grid, found.items(), strict=True):
        for label, colour, mark, who in series:
            picked = [cell.get(who[0]) or fastest(cell, *who) for cell in cells.values()]
            points = [(row["floors"], y, row["group"]) for y, row in enumerate(picked) if row]
            mean = ghostnet_mean((group, value) for value, _, group in points)
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            curve(axes, f"{label}: {mean:.2f} floors", colour, mark, xs, ys)
        log_axis(axes, "x", [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24])
        axes.set_title(f"Batch {batch}: geometric means, GhostNet 1.0x", **TITLE)
        axes.set_xlabel("time in floors (1 = hardware limit; left is better)")
        shape_axis(axes, list(cells))
        legend_above(axes, 1)
    return figure


def draw_training(document: Document) -> Any:
    """Bars: speed-up of forward + backward over eager PyTorch in each layout, per shape."""
    rows = [r for r in results.timed(document["rows"]) if r["mode"] == "train"]
    cells = {s: cell for s, cell in results.by_shape(rows).items() if fastest(cell, "ours")}
    if not cells:
        raise Nothing("no training rows")
    figure, (axes,) = panels(6.4, 1.3 + 0.27 * len(cells))
    layouts = (("eager NCHW", "eager_nchw", OURS, -0.2), ("channels_last", "eager_cl", BEST, 0.2))
    for label, name, colour, offset in layouts:
        each = enumerate(cells.values())
        pairs = [(y + offset, cell.get(name), fastest(cell, "ours")) for y, cell in each]
        found = [(y, ratio(a, b)[0], b["group"]) for y, a, b in pairs if a and b]
        mean = ghostnet_mean((group, value) for _, value, group in found)
        ys, values = [y for y, _, _ in found], [value for _, value, _ in found]
        axes.barh(ys, values, 0.38, color=colour, label=f"over {label}: {mean:.2f}x")
    title = f"Training step, batch {rows[0]['batch']}: geometric means, GhostNet 1.0x"
    axes.set_title(title, **TITLE)
    axes.set_xlabel("times faster than eager PyTorch (right of 1 is better)")
    shape_axis(axes, list(cells))
    legend_above(axes, 2)
    return figure


def draw_ratios(document: Document) -> Any:
    """Bars: the best peer's time over ours, with the noise of both, the smallest first."""
    found = _batches(document["rows"], "ours", "pytorch engine")
    height = 1.3 + 0.21 * max(map(len, found.values()))
    figure, grid = panels(1.0 + 4.6 * len(found), height, 1, len(found))
    for axes, (batch, cells) in zip(grid, found.items(), strict=True):
        each = [(shape, v) for shape, cell in cells.items() if (v := results.versus(cell))]
        each.sort(key=lambda pair: pair[1].over_best)
        draw_bars(axes, [shape for shape, _ in each], [ratio(v.best, v.ours) for _, v in each])
        mean = ghostnet_mean((v.ours["group"], v.over_best) for _, v in each)
        axes.set_title(f"Batch {batch}: geometric mean {mean:.2f}x", **TITLE)
        axes.set_xlabel("best peer's time over ours (lines: p20 and p80)")
    return figure


def draw_roofline(document: Document) -> Any:
    """Rate over arithmetic intensity: the floor, ours and the best peer of every shape.

    The slanted roofs are the measured bandwidth of the largest copy and of the fastest one (in
    cache); between them the floor of a shape lies where its bytes put it.
    """
    found, limits = _batches(document["rows"], "ours", "pytorch engine"), document.get("roofline")
    if not limits:
        raise Nothing("no measured limits")
    peak = limits["gemm_peak"] / 1e9
    copies = [rate / 1e9 for rate in limits["bandwidth"]]
    roofs = ((copies[-1], "main memory", "-"), (max(copies), "cache", "--"))
    figure, grid = panels(0.8 + 4.6 * len(found), 4.6, 1, len(found), sharey=True)
    for axes, (batch, cells) in zip(grid, found.items(), strict=True):
        each: list[Versus] = [v for cell in cells.values() if (v := results.versus(cell))]
        xs = [v.ours["flops"] / v.ours["bytes"] for v in each]
        low, high = 0.7 * min(xs), 1.4 * max(xs)
        for rate, name, line in roofs:
            at = [low, *([peak / rate] if low < peak / rate < high else []), high]
            label = f"{name}: {rate:.0f} GB/s"
            axes.plot(at, [min(peak, rate * x) for x in at], line, color="black", label=label)
        floors = [v.ours["flops"] / v.ours["floor_s"] / 1e9 for v in each]
        best, ours = [v.best["gflops"] for v in each], [v.ours["gflops"] for v in each]
        curve(axes, "floor of a shape (peak of its minute)", "black", "_", xs, floors)
        curve(axes, "best peer", BEST, "D", xs, best)
        curve(axes, "ghost_ops", OURS, "o", xs, ours)
        log_axis(axes, "x")
        log_axis(axes, "y")
        axes.set_xlim(low, high)
        axes.set_ylim(0.8 * min(*best, *ours), 1.6 * peak)
        axes.set_xlabel("FLOPs per byte that must move")
        axes.set_title(f"Batch {batch}: peak {peak:.0f} GFLOP/s", **TITLE)
        legend_above(axes, 2)
    grid[0].set_ylabel("GFLOP/s")
    return figure


def draw_means(document: Document) -> Any:
    """Bars: every geometric mean with its spread."""
    rows = document["rows"]
    found = QUESTIONS[rows[0]["question"]].means(rows)
    if not found:
        raise Nothing("no geometric means")
    figure, (axes,) = panels(9.0, 1.3 + 0.21 * len(found))
    draw_bars(axes, list(found), [(mean.value, mean.low, mean.high) for mean in found.values()])
    axes.set_title("Geometric means (lines: spread)", **TITLE)
    return figure


def draw_scaling(document: Document) -> Any:
    """Curves: time an image over each thing that was varied."""
    axes_of: dict[str, list[tuple[int, Versus]]] = {}
    for axis, value, v in sorted(scaling.points(document["rows"]), key=lambda point: point[:2]):
        axes_of.setdefault(axis, []).append((value, v))
    found = {axis: points for axis, points in axes_of.items() if len(points) > 1}
    if not found:
        raise Nothing("no axis has two points")
    names = {"batch": "images in the batch", "size": "height and width, pixels", "ratio": "ratio s"}
    names |= {"channels": "channels in and out", "d": "depthwise size d"}
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, grid = panels(3.1 * columns, 0.7 + 2.6 * rows, rows, columns)
    per, series = scaling.per_image, ((EAGER, "s-"), (BEST, "D-"), (OURS, "o-"), ("black", "--"))
    labels = ("eager PyTorch (NCHW)", "best PyTorch option", "ghost_ops", "floor")
    for axes, (axis, points) in zip(grid, found.items(), strict=False):
        xs = [value for value, _ in points]
        times = [(per(v.eager or v.best), per(v.best), per(v.ours)) for _, v in points]
        floors = [t[2] / v.ours["floors"] for t, (_, v) in zip(times, points, strict=True)]
        curves = (*zip(*times, strict=True), floors)
        for label, style, ys in zip(labels, series, curves, strict=True):
            curve(axes, label, *style, xs, ys)
        log_axis(axes, "y")
        if max(xs) > 8 * min(xs):
            log_axis(axes, "x", xs)
        axes.set_xlabel(names.get(axis, axis))
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    figure.supylabel("microseconds an image", fontsize=9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def draw_speedup(document: Document) -> Any:
    """Curves: speed-up of a Ghost module over its convolution, by FLOPs and measured."""
    lines = paper.summarize(document["rows"])
    if len({line.s for line in lines}) < 2:
        raise Nothing("no speed-ups at two ratios")
    kernels, sizes = sorted({p.k for p in lines}), sorted({p.d for p in lines})
    shape = len(kernels), len(sizes)
    size = 1.0 + 1.9 * shape[1], 0.9 + 2.2 * shape[0]
    figure, grid = panels(*size, *shape, sharex=True, sharey=True)
    for axes, (k, d) in zip(grid, ((k, d) for k in kernels for d in sizes), strict=True):
        points = sorted((p for p in lines if (p.k, p.d) == (k, d)), key=lambda p: p.s)
        xs = [p.s for p in points]
        pytorch, ours = [p.pytorch[0] for p in points], [p.ours[0] for p in points]
        curve(axes, "r_s by FLOPs", "black", "--", xs, [p.theory for p in points])
        curve(axes, "Ghost module, PyTorch at its best", BEST, "D-", xs, pytorch)
        curve(axes, "Ghost module, ghost_ops", OURS, "o-", xs, ours)
        axes.axhline(1.0, color="black", linewidth=0.6)
        axes.set_xticks(xs)
        axes.set_title(f"{k} x {k} conv, d = {d}", **TITLE)
    grid[0].set_ylim(bottom=0.0)
    figure.supxlabel("ratio s", fontsize=9)
    figure.supylabel("times faster", fontsize=9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


PICTURES: dict[str, dict[str, Callable[[Document], Any]]] = {
    "module": {
        "floors": draw_floors,
        "ratios": draw_ratios,
        "roofline": draw_roofline,
        "training": draw_training,
    },
    "network": {"means": draw_means},
    "scaling": {"curves": draw_scaling},
    "memory": {"means": draw_means},
    "plan": {"means": draw_means},
    "product": {"roofline": draw_roofline},
    "paper": {"speedup": draw_speedup},
}


def draw_all(document: Document, stem: Path) -> list[Path]:
    """Every picture that the rows allow, as ``<stem>_<name>.png`` and ``.svg``."""
    written = []
    for question in sorted({row.get("question") for row in document["rows"]} & PICTURES.keys()):
        for name, draw in PICTURES[question].items():
            with matplotlib().rc_context(STYLE):
                try:
                    figure = draw(document)
                except Nothing as error:
                    print(f"{name}: left out, {error}")
                    continue
                caption(figure, document["meta"])
                png, svg = (stem.with_name(f"{stem.name}_{name}.{kind}") for kind in ("png", "svg"))
                figure.savefig(png, dpi=150)
                figure.savefig(svg, metadata={"Date": None})
                written += [png, svg]
    return written


def main(argv: Sequence[str]) -> int:
    """Draw one results file; 2 if it is none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plots", description=main.__doc__)
    parser.add_argument("results", type=Path, help="JSON written by a question")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: beside it)")
    arguments = parser.parse_args(argv)
    try:
        document = results.load(arguments.results)
        stem = (arguments.out or arguments.results.parent) / arguments.results.stem
        machine.prepare_output(stem.with_name(f"{stem.name}_picture.png"))
        written = draw_all(document, stem)
    except (OSError, ValueError, MissingExtra) as error:
        print(f"error: {arguments.results}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0 if written else 1
