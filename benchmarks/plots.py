"""Pictures from result files: time in floors, training speed-up, and the demo's picture.

    python -m benchmarks.plots results/module.json               PNG and SVG beside the file
    python -m benchmarks.plots results/module.json --out pictures

Colours are Okabe and Ito's, which colour-blind readers tell apart; marks differ in form too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, report
from benchmarks.extras import MissingExtra, require

EAGER, BEST, OURS, CONTROL = "#7F7F7F", "#E69F00", "#0072B2", "#56B4E9"
GRID = {"color": "#D9D9D9", "linewidth": 0.6}
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def _matplotlib() -> Any:
    matplotlib = require("matplotlib", "pictures")
    # The figure class alone: pyplot would hold global state and ask for a display.
    for module in ("matplotlib.figure", "matplotlib.ticker"):
        require(module, "pictures")
    return matplotlib


def _label(shape: str) -> str:
    """``40-120@28-relu`` as ``40 to 120 @ 28, ReLU``."""
    channels, _, rest = shape.partition("@")
    inp, _, oup = channels.partition("-")
    size, _, activation = rest.partition("-")
    names = {"relu": "ReLU", "silu": "SiLU"}
    return f"{inp} → {oup} @ {size}, {names.get(activation, activation)}"


_TITLE = {"loc": "left", "fontweight": "bold"}


def _legend_above(axes: Any, *, columns: int) -> None:
    """The legend between title and axes, where it never covers data."""
    rows = -(-len(axes.get_legend_handles_labels()[1]) // columns)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2,
        handletextpad=0.5,
    )  # fmt: skip
    axes.set_title(axes.get_title(loc="left"), pad=8 + 13 * rows, **_TITLE)


def _mean(values: Sequence[tuple[str, float]]) -> float | None:
    """Geometric mean over the GhostNet shapes, or over all where there are none."""
    ghostnet = [value for group, value in values if group == "ghostnet"]
    return report.geometric_mean(ghostnet or [value for _, value in values])


def _caption(figure: Any, meta: Mapping[str, Any]) -> None:
    threads = f"{meta['threads']} thread" + ("s" if meta["threads"] != 1 else "")
    text = f"{meta['gpu'] if meta.get('device') == 'cuda' else meta['cpu']}, {threads}; torch "
    text += f"{meta['torch']}; commit {meta['commit']}; {meta['date'][:10]}"
    room = 0.2 / figure.get_figheight()  # inches, below everything that is laid out
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.text(0.995, 0.2 * room, text, ha="right", va="bottom", fontsize=6.5, color="#555555")


def _shape_axis(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", **GRID)


def draw_floors(document: Mapping[str, Any], batches: Sequence[int] | None = None) -> Any:
    """Dot plot: eval time of every shape in floors, one panel per batch size.

    Args:
        document: a results file of ``benchmarks.module``, loaded.
        batches: batch sizes to show; all that were measured by default.

    Raises:
        ValueError: the file holds no eval rows of these batches.
    """
    matplotlib = _matplotlib()
    rows = [r for r in report.timed(document["rows"]) if r["mode"] == "eval"]
    batches = batches or sorted({r["batch"] for r in rows})
    panels = [(batch, report.by_shape(r for r in rows if r["batch"] == batch)) for batch in batches]
    if not panels or not all(cells for _, cells in panels):
        raise ValueError(f"no eval rows for batch {list(batches) or 'sizes of any kind'}")
    count = max(len(cells) for _, cells in panels)
    series = (
        ("eager PyTorch (NCHW)", EAGER, "s", lambda cell: cell.get(report.BASELINE)),
        ("best PyTorch option", BEST, "D", lambda cell: report.fastest(cell, ours=False)),
        ("ghost_ops", OURS, "o", lambda cell: report.fastest(cell, ours=True)),
    )
    with matplotlib.rc_context(STYLE):
        size = (3.2 + 3.3 * len(panels), 1.5 + 0.21 * count)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (batch, cells) in zip(all_axes, panels, strict=True):
            names = list(cells)
            for label, colour, marker, pick in series:
                chosen = [
                    (row, place)
                    for place, cell in enumerate(cells.values())
                    if (row := pick(cell)) is not None
                ]
                points = [(row["floors"], place) for row, place in chosen]
                mean = _mean([(row["group"], row["floors"]) for row, _ in chosen])
                text = label if mean is None else f"{label}: {mean:.2f} floors"
                axes.scatter(
                    *zip(*points, strict=True) if points else ((), ()),
                    label=text, color=colour, marker=marker, s=26, zorder=3, linewidth=0,
                )  # fmt: skip
            axes.axvline(1.0, color="black", linewidth=1.0)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(
                matplotlib.ticker.FixedLocator([1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24])
            )
            axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            axes.set_title(f"Batch {batch}: geometric means, GhostNet 1.0x", **_TITLE)
            axes.set_xlabel("time in floors (1 = hardware limit; left is better)")
            _shape_axis(axes, names)
            _legend_above(axes, columns=1)
        _caption(figure, document["meta"])
    return figure


def draw_training(document: Mapping[str, Any]) -> Any:
    """Bars: speed-up of forward + backward over eager PyTorch in each layout, per shape.

    Raises:
        ValueError: the file holds no training rows.
    """
    matplotlib = _matplotlib()
    rows = [r for r in report.timed(document["rows"]) if r["mode"] == "train"]
    cells = report.by_shape(rows)
    cells = {k: c for k, c in cells.items() if report.fastest(c, ours=True) is not None}
    if not cells:
        raise ValueError("no training rows")
    series = (("eager NCHW", "eager_nchw", OURS), ("eager channels_last", "eager_cl", BEST))
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(
            figsize=(6.4, 1.3 + 0.27 * len(cells)), layout="constrained"
        )
        axes = figure.subplots()
        for offset, (label, name, colour) in zip((-0.2, 0.2), series, strict=True):
            chosen = [
                (place + offset, cell[name]["median_s"] / ours["median_s"], ours["group"])
                for place, cell in enumerate(cells.values())
                if name in cell and (ours := report.fastest(cell, ours=True)) is not None
            ]
            if not chosen:
                continue
            ratios = [(place, ratio) for place, ratio, _ in chosen]
            mean = _mean([(group, ratio) for _, ratio, group in chosen])
            axes.barh(
                *zip(*ratios, strict=True), height=0.38, color=colour,
                label=f"over {label}: {mean:.2f}x",
            )  # fmt: skip
        axes.axvline(1.0, color="black", linewidth=1.0)
        axes.set_title(
            f"Training step, batch {rows[0]['batch']}: geometric means, GhostNet 1.0x", **_TITLE
        )
        axes.set_xlabel("times faster than eager PyTorch (right of 1 is better)")
        _shape_axis(axes, list(cells))
        _legend_above(axes, columns=2)
        _caption(figure, document["meta"])
    return figure


def draw_demo(document: Mapping[str, Any], path: Path) -> None:
    """The demo's picture: loss curves, what they cost, and the speed-up of every shape."""
    matplotlib = _matplotlib()
    training, rows = document["training"], document["shapes"]
    runs = (
        ("reference", EAGER, "-", 3.2),
        ("control", BEST, ":", 1.4),
        ("fused", OURS, "-", 1.0),
    )
    with matplotlib.rc_context(STYLE):
        height = max(5.4, 1.6 + 0.25 * len(rows))
        figure = matplotlib.figure.Figure(figsize=(10.5, height), layout="constrained")
        mosaic = figure.subplot_mosaic([["loss", "shapes"], ["cost", "shapes"]],
                                       height_ratios=(2.4, 1.0))  # fmt: skip
        axes = mosaic["loss"]
        for name, colour, style, width in runs:
            run = training[name]
            label = f"{run['title']}: test accuracy {run['accuracy']:.1%}"
            axes.plot(run["losses"], style, color=colour, linewidth=width, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.set_title("Same seed, same batches, same curve", **_TITLE)
        axes.grid(axis="y", **GRID)
        _legend_above(axes, columns=1)

        axes = mosaic["cost"]
        base = training["reference"]
        for place, (name, colour, _, _) in enumerate(runs):
            run = training[name]
            for offset, key, scale, unit, alpha in (
                (-0.2, "median_s", 1e3, "ms per step", 1.0),
                (0.2, "saved_bytes", 2.0**-20, "MiB saved", 0.55),
            ):
                value = run[key] / base[key]
                bar = axes.barh(place + offset, value, 0.38, color=colour, alpha=alpha)
                text = f"{run[key] * scale:.1f} {unit}"
                axes.bar_label(bar, [text], padding=3, fontsize=8)
        axes.set_yticks(range(len(runs)), [training[name]["title"] for name, *_ in runs])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_xlim(right=1.5 * axes.get_xlim()[1])
        axes.set_xlabel("relative to the reference")
        axes.set_title("Step time and memory saved for backward", **_TITLE)

        axes = mosaic["shapes"]
        for offset, mode, colour, label in (
            (-0.2, "eval", OURS, "inference"),
            (0.2, "train", BEST, "training"),
        ):
            ratios = [row[mode]["ratio"] for row in rows]
            mean = _mean([(row["group"], row[mode]["ratio"]) for row in rows])
            label = f"{label}: {mean:.2f}x"
            places = [place + offset for place in range(len(rows))]
            axes.barh(places, ratios, 0.38, color=colour, label=label)
        axes.axvline(1.0, color="black", linewidth=1.0)
        axes.set_title(f"Speed-up, batch {rows[0]['batch']} (geometric means)", **_TITLE)
        axes.set_xlabel("times faster (right of 1 is better)")
        _shape_axis(axes, [row["shape"] for row in rows])
        _legend_above(axes, columns=2)
        _caption(figure, document["meta"])
        figure.savefig(path, dpi=150)


def draw_module(document: Mapping[str, Any], stem: Path) -> list[Path]:
    """Every picture that the rows allow, as PNG and SVG named after ``stem``."""
    written = []
    for name, draw in (("floors", draw_floors), ("training", draw_training)):
        try:
            figure = draw(document)
        except ValueError as error:
            print(f"{name}: left out, {error}")
            continue
        for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
            path = stem.with_name(f"{stem.name}_{name}{suffix}")
            with _matplotlib().rc_context(STYLE):
                figure.savefig(path, **options)
            written.append(path)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: draw a results file of ``benchmarks.module``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("results", type=Path, help="JSON written by benchmarks.module")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: beside it)")
    arguments = parser.parse_args(argv)
    try:
        document = json.loads(arguments.results.read_text())
        missing = {"meta", "rows"} - set(document)
        if missing:
            raise ValueError(f"no {' and '.join(sorted(missing))} in it")
        stem = (arguments.out or arguments.results.parent) / arguments.results.stem
        harness.prepare_output(stem.with_name(f"{stem.name}_floors.png"))
        written = draw_module(document, stem)
    except (OSError, ValueError, MissingExtra) as error:
        print(f"error: {arguments.results}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0 if written else 1


if __name__ == "__main__":
    raise SystemExit(main())
