"""Pictures of results files, as PNG in one style.

    python -m benchmarks plots results/module.json                   beside the file
    python -m benchmarks plots results/scaling.json --out pictures
    python -m benchmarks plots results/module.json --only floors ratios

Colours are Okabe and Ito's, which colour-blind readers tell apart; marks differ in form too, and
the bars of losses are hatched.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import statistics
import sys
from collections import Counter
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
    "hatch.linewidth": 1.0,
}
PEERS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}  # all others are PyTorch
# Notes under a picture.
SHAPES = "16 → 48 @ 112: a Ghost module of 16 channels in, 48 out, on 112 x 112 pixels"
FLOOR = (
    "floor = max(bytes / bandwidth, FLOPs / GEMM peak): input read once, output written once, at "
    "the rates measured in the same run"
)
BEST_OF = "best of PyTorch: the fastest of eager, folded batch norms and torch.compile, per shape; "
BEST_OF += "geometric means over GhostNet 1.0x"
WHISKERS = "lines: p20 / p80 to p80 / p20 of the two times"
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


def draw_bars(
    axes: Any, names: Sequence[str], series: Sequence[tuple[str, str, Mapping[int, Triple]]]
) -> None:
    """Horizontal bars with the ends of their noise; values below 1, losses, are hatched.

    Args:
        axes: where to draw.
        names: one a row, from the top.
        series: label, colour, and the values by row. Without a colour, losses are red.
    """
    height = 0.8 / len(series)
    style: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.0}
    style["error_kw"] = {"elinewidth": 0.8, "ecolor": "#222222"}
    for index, (label, colour, values) in enumerate(series):
        places = [row + (index - (len(series) - 1) / 2) * height for row in values]
        middle = [value for value, _, _ in values.values()]
        noise = [[value - low for value, low, _ in values.values()]]
        noise += [[high - value for value, _, high in values.values()]]
        colours = [colour or (OURS if value >= 1.0 else LOSS) for value in middle]
        bars = axes.barh(places, middle, height, color=colours, xerr=noise, label=label, **style)
        for bar, value in zip(bars, middle, strict=True):
            bar.set_hatch("" if value >= 1.0 else "/////")
    each = [triple for _, _, values in series for triple in values.values()]
    longest, highest = max(1.0, *(t[0] for t in each)), max(1.0, *(t[2] for t in each))
    # Noise beyond that would hide the bars.
    axes.set_xlim(0.0, min(1.6 * longest, 1.05 * highest))
    shape_axis(axes, names)


def note(figure: Any, *lines: str) -> None:
    """What a reader must know of the picture; :func:`caption` writes it."""
    figure.set_label("\n".join(lines))


def caption(figure: Any, meta: Mapping[str, Any]) -> None:
    """The figure's note, then machine, instruction sets, versions, commit and date."""
    threads = f"{meta['threads']} thread" + "s" * (meta["threads"] > 1)
    lines = [line for line in figure.get_label().split("\n") if line]
    lines += [f"{meta['cpu']}, {threads}; {machine.instructions(meta)}; torch {meta['torch']}"]
    lines += [f"{meta.get('allocation', '').partition(':')[0]}; {meta['clock']} clock; "]
    lines[-1] += f"commit {meta['commit']}; {meta['date'][:10]}"
    room = (0.08 + 0.15 * len(lines)) / figure.get_figheight()  # inches
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    style: dict[str, Any] = {"va": "bottom", "fontsize": 7.5, "color": "#333333"}
    figure.text(0.01, 0.05 / figure.get_figheight(), "\n".join(lines), **style)


def engines(rows: Iterable[Row]) -> list[str]:
    """Names of the engines outside PyTorch that were timed."""
    families = {row["provider"].partition("_")[0] for row in results.timed(rows)}
    return [name for family, name in PEERS.items() if family in families]


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
    series = [("eager PyTorch, NCHW", EAGER, "s", ["eager_nchw"])]
    series += [("best of PyTorch", BEST, "D", ["pytorch"]), ("ghost_ops", OURS, "o", ["ours"])]
    if others := engines(document["rows"]):
        series.insert(2, (f"best of {', '.join(others)}", ENGINE, "^", ["engine"]))
    height = 2.3 + 0.21 * max(map(len, found.values()))
    figure, grid = panels(3.2 + 3.3 * len(found), height, 1, len(found), sharex=True, sharey=True)
    for axes, (batch, cells) in zip(grid, found.items(), strict=True):
        for label, colour, mark, who in series:
            picked = [cell.get(who[0]) or fastest(cell, *who) for cell in cells.values()]
            points = [(row["floors"], y, row["group"]) for y, row in enumerate(picked) if row]
            mean = ghostnet_mean((group, value) for value, _, group in points)
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            curve(axes, f"{label}: {mean:.2f} floors", colour, mark, xs, ys)
        log_axis(axes, "x", [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24])
        axes.set_title(f"Inference, batch {batch}: time of one Ghost module", **TITLE)
        axes.set_xlabel("time in floors (1 = the machine's limit; left is better)")
        shape_axis(axes, list(cells))
        legend_above(axes, 1)
    note(figure, FLOOR, BEST_OF, SHAPES)
    return figure


def draw_training(document: Document) -> Any:
    """Bars: times that ghost_ops is faster than each option of PyTorch in training, per shape."""
    rows = [r for r in results.timed(document["rows"]) if r["mode"] == "train"]
    cells = {s: cell for s, cell in results.by_shape(rows).items() if fastest(cell, "ours")}
    if not cells:
        raise Nothing("no training rows")
    series = []
    for label, name, colour in (
        ("eager PyTorch, NCHW", "eager_nchw", EAGER),
        ("eager PyTorch, channels_last", "eager_cl", BEST),
        ("torch.compile, channels_last", "compile_cl", ENGINE),
    ):
        pairs = [(y, cell[name], cell) for y, cell in enumerate(cells.values()) if name in cell]
        found = {y: ratio(row, fastest(cell, "ours")) for y, row, cell in pairs}
        if found:
            groups = (row["group"] for _, row, _ in pairs)
            mean = ghostnet_mean(zip(groups, (v for v, _, _ in found.values()), strict=True))
            series.append((f"than {label}: {mean:.2f}x", colour, found))
    figure, (axes,) = panels(7.4, 2.4 + 0.11 * len(cells) * len(series))
    draw_bars(axes, list(cells), series)
    picked = [(fastest(cell, "pytorch"), fastest(cell, "ours")) for cell in cells.values()]
    best = [(b["group"], ratio(b, ours)[0]) for b, ours in picked if b and ours]
    title = f"Training step (forward + backward), batch {rows[0]['batch']}: times faster"
    axes.set_title(title, **TITLE)
    axes.set_xlabel("ghost_ops is times faster than that option of PyTorch (right of 1: better)")
    legend_above(axes, 1)
    over_best = f"than the fastest of them, shape by shape: {ghostnet_mean(best):.2f}x"
    means = f"geometric means over GhostNet 1.0x; {over_best}"
    note(figure, means, f"hatched: slower; {WHISKERS}", SHAPES)
    return figure


def draw_ratios(document: Document) -> Any:
    """Bars: the best peer's time over ours, with the noise of both, the smallest first."""
    found = _batches(document["rows"], "ours", "pytorch engine")
    height = 1.9 + 0.21 * max(map(len, found.values()))
    figure, grid = panels(1.0 + 4.4 * len(found), height, 1, len(found))
    winners: Counter[str] = Counter()
    for axes, (batch, cells) in zip(grid, found.items(), strict=True):
        each = [(shape, v) for shape, cell in cells.items() if (v := results.versus(cell))]
        each.sort(key=lambda pair: pair[1].over_best)
        values = {row: ratio(v.best, v.ours) for row, (_, v) in enumerate(each)}
        draw_bars(axes, [shape for shape, _ in each], [("", "", values)])
        families = (v.best["provider"].partition("_")[0] for _, v in each)
        winners.update(PEERS.get(family, "PyTorch") for family in families)
        mean = ghostnet_mean((v.ours["group"], v.over_best) for _, v in each)
        lost = sum(v.over_best < 1.0 for _, v in each)
        title = f"Inference, batch {batch}: {mean:.2f}x, {lost} of {len(each)} slower"
        axes.set_title(title, **TITLE)
        axes.set_xlabel("ghost_ops is times faster than the best competitor")
    peers = ["PyTorch (eager, folded, torch.compile)", *engines(document["rows"])]
    most = ", ".join(f"{name} in {count}" for name, count in winners.most_common())
    note(
        figure,
        f"best competitor: the fastest of {', '.join(peers)}, per shape; "
        f"{most} of {winners.total()}",
        f"hatched: slower than it; {WHISKERS}; titles: geometric mean over GhostNet 1.0x",
        SHAPES,
    )
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
    values = {y: (mean.value, mean.low, mean.high) for y, mean in enumerate(found.values())}
    draw_bars(axes, list(found), [("", "", values)])
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


def save(figure: Any, path: Path) -> None:
    """A PNG of 64 colours, a third of the size of one with all of them."""
    image = require("PIL.Image", "pictures")
    figure.savefig(data := io.BytesIO(), dpi=150)
    image.open(data).convert("RGB").quantize(64).save(path, optimize=True)


def draw_all(document: Document, stem: Path, only: Sequence[str] = ()) -> list[Path]:
    """Every picture, or those named ``only``, that the rows allow, as ``<stem>_<name>.png``."""
    written = []
    for question in sorted({row.get("question") for row in document["rows"]} & PICTURES.keys()):
        for name, draw in PICTURES[question].items():
            if only and name not in only:
                continue
            with matplotlib().rc_context(STYLE):
                try:
                    figure = draw(document)
                except Nothing as error:
                    print(f"{name}: left out, {error}")
                    continue
                caption(figure, document["meta"])
                written.append(stem.with_name(f"{stem.name}_{name}.png"))
                save(figure, written[-1])
    return written


def main(argv: Sequence[str]) -> int:
    """Draw one results file; 2 if it is none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plots", description=main.__doc__)
    parser.add_argument("results", type=Path, help="JSON written by a question")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: beside it)")
    names = sorted({name for pictures in PICTURES.values() for name in pictures})
    parser.add_argument("--only", nargs="+", choices=names, default=(), help="default: all")
    arguments = parser.parse_args(argv)
    try:
        document = results.load(arguments.results)
        stem = (arguments.out or arguments.results.parent) / arguments.results.stem
        machine.prepare_output(stem.with_name(f"{stem.name}_picture.png"))
        written = draw_all(document, stem, arguments.only)
    except (OSError, ValueError, MissingExtra) as error:
        print(f"error: {arguments.results}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0 if written else 1
