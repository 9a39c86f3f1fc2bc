"""Pictures of scaling, memory, plan and the paper's questions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks import memory, network, paper, report, scaling, style
from benchmarks.providers import BASELINE

_AXES = {
    "batch": "images in the batch",
    "size": "height and width, pixels",
    "channels": "channels in and out",
    "ratio": "ratio s",
    "d": "depthwise size d",
    "threads": "threads",
}


def draw_scaling(document: Mapping[str, Any]) -> Any:
    """Curves: time an image over each thing that was varied.

    Raises:
        ValueError: no axis has two points.
    """
    lines = scaling.summarize(document["rows"])
    panels = {}
    for axis in scaling.AXES:
        points = sorted((p for p in lines if p["axis"] == axis), key=lambda p: p["value"])
        if len(points) > 1:
            panels[axis] = points
    if not panels:
        raise ValueError("no axis has two points")
    series = (
        ("eager PyTorch (NCHW)", "eager_us", style.EAGER, "s-"),
        ("best PyTorch option", "best_us", style.BEST, "D-"),
        ("ghost_ops", "ours_us", style.OURS, "o-"),
    )
    matplotlib = style.matplotlib_modules()
    with matplotlib.rc_context(style.STYLE):
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = style.figure(3.1 * columns, 0.7 + 2.6 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).flat
        # The panels first: zip would take one of the grid too many before it finds no panel.
        for (axis, points), axes in zip(panels.items(), grid, strict=False):
            xs = [p["value"] for p in points]
            for label, key, colour, mark in series:
                axes.plot(xs, [p[key] for p in points], mark, color=colour, markersize=4,
                          linewidth=1.2, label=label)  # fmt: skip
            floors = [p["ours_us"] / p["floors"] for p in points]
            axes.plot(xs, floors, "--", color="black", linewidth=1.0, label="floor")
            axes.set_yscale("log")
            style.plain_log(axes.yaxis, [k * 10.0**e for e in range(-1, 6) for k in (1, 2, 5)])
            if max(xs) > 8 * min(xs):
                axes.set_xscale("log")
                style.plain_log(axes.xaxis, xs)
            else:
                axes.set_xticks(xs)
            axes.set_xlabel(_AXES[axis])
            axes.grid(**style.GRID)
        for axes in grid:  # what is left over
            axes.set_visible(False)
        for axes in figure.axes[::columns]:
            axes.set_ylabel("microseconds an image")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        style.caption(figure, document["meta"])
    return figure


def draw_networks(document: Mapping[str, Any]) -> Any:
    """Bars: eager's time and the best peer's over ours, of every network.

    Raises:
        ValueError: no times of ours with a peer.
    """
    lines = [p for p in network.summarize(document["rows"]) if p["mode"] != "saved"]
    if not lines:
        raise ValueError("no times of ghost_ops with a peer")
    lines.sort(key=lambda p: (p["mode"], p["batch"], p["over_best"]))
    series = (
        ("eager PyTorch (NCHW)", "over_eager", style.OURS, -0.2),
        ("best peer", "over_best", style.BEST, 0.2),
    )
    matplotlib = style.matplotlib_modules()
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(6.8, 1.4 + 0.36 * len(lines))
        axes = figure.subplots()
        for label, key, colour, offset in series:
            ratios = [line[key] for line in lines]
            places = [place + offset for place in range(len(lines))]
            mean = report.geometric_mean(ratios)
            bars = axes.barh(places, ratios, 0.38, color=colour, label=f"over {label}: {mean:.2f}x")
            texts = [f"{r:.2f}" for r in ratios]
            if key == "over_best":
                texts = [f"{line[key]:.2f} ({line['by']})" for line in lines]
            style.bar_label(axes, bars, texts)
        axes.axvline(1.0, color="black", linewidth=1.0)
        axes.set_xlim(right=1.25 * axes.get_xlim()[1])
        axes.set_xlabel("times faster (right of 1 is better)")
        axes.set_title("Whole networks (geometric means)", **style.TITLE)
        threads = "thread" if {line["threads"] for line in lines} == {1} else "threads"
        style.shape_axis(axes, [
            f"{p['shape']}, {p['mode']} b{p['batch']}, {p['threads']} {threads}" for p in lines
        ])  # fmt: skip
        style.legend_above(axes, columns=1)
        style.caption(figure, document["meta"])
    return figure


def draw_memory(document: Mapping[str, Any]) -> Any:
    """Bars: our peak and saved bytes as a share of eager's, least gain first.

    Raises:
        ValueError: no rows with both.
    """
    lines = sorted(memory.summarize(document["rows"]), key=lambda line: line["peak_bytes_ratio"])
    if not lines:
        raise ValueError("no peaks of both eager and ghost_ops")
    series = (
        ("peak of the step", "peak_bytes", style.OURS, -0.2),
        ("saved for backward", "saved_total", style.ENGINE, 0.2),
    )
    matplotlib = style.matplotlib_modules()
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(6.8, 1.4 + 0.34 * len(lines))
        axes = figure.subplots()
        for label, key, colour, offset in series:
            shares = [line[f"ours_{key}"] / max(line[f"eager_{key}"], 1) for line in lines]
            places = [place + offset for place in range(len(lines))]
            bars = axes.barh(places, shares, 0.38, color=colour, label=label)
            texts = [
                f"{line[f'ours_{key}'] / 2**20:.1f} of {line[f'eager_{key}'] / 2**20:.1f} MiB"
                for line in lines
            ]
            style.bar_label(axes, bars, texts)
        axes.axvline(1.0, color="black", linewidth=1.0)
        axes.set_xlim(0.0, 1.35 * max(1.0, axes.get_xlim()[1]))
        axes.set_xlabel("ghost_ops over eager PyTorch (left of 1 is better)")
        axes.set_title(f"Memory of a training step, batch {lines[0]['batch']}", **style.TITLE)
        style.shape_axis(axes, [line["shape"] for line in lines])
        style.legend_above(axes, columns=2)
        style.caption(figure, document["meta"])
    return figure


def draw_plan(document: Mapping[str, Any]) -> Any:
    """Scatter: measured over predicted time of every shape.

    Raises:
        ValueError: no predictions.
    """
    rows = [r for r in report.timed(document["rows"]) if "predicted_s" in r]
    if not rows:
        raise ValueError("no predictions")
    series = (
        ("eager PyTorch (NCHW)", BASELINE, style.EAGER, "s"),
        ("ghost_ops, NCHW", "fused_nchw", style.OURS, "o"),
        ("ghost_ops, channels_last", "fused_cl", style.ENGINE, "^"),
    )
    matplotlib = style.matplotlib_modules()
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(5.6, 5.2)
        axes = figure.subplots()
        values = [1e6 * r[key] for r in rows for key in ("predicted_s", "median_s")]
        ends = 0.7 * min(values), 1.4 * max(values)
        for factor, line in ((1, "-"), (2, "--"), (4, ":")):
            axes.plot(ends, [factor * e for e in ends], line, color="black", linewidth=1.0,
                      label=f"{factor} x predicted" if factor > 1 else "as predicted")  # fmt: skip
        for label, name, colour, marker in series:
            found = [r for r in rows if r["provider"] == name]
            ratios = [r["median_s"] / r["predicted_s"] for r in found]
            mean = report.geometric_mean(ratios)
            text = label if mean is None else f"{label}: {mean:.2f}x"
            axes.scatter(
                [1e6 * r["predicted_s"] for r in found], [1e6 * r["median_s"] for r in found],
                color=colour, marker=marker, s=24, linewidth=0, zorder=3, label=text,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [k * 10.0**e for e in range(7) for k in (1, 3)]
        style.plain_log(axes.xaxis, ticks)
        style.plain_log(axes.yaxis, ticks)
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        axes.set_xlabel("predicted from bytes and FLOPs, microseconds")
        axes.set_ylabel("measured, microseconds")
        axes.grid(**style.GRID)
        axes.set_title("Every shape, eval (geometric means)", **style.TITLE)
        style.legend_above(axes, columns=2)
        style.caption(figure, document["meta"])
    return figure


def draw_speedup(document: Mapping[str, Any]) -> Any:
    """Curves: speed-up of a Ghost module over its convolution, by FLOPs and measured.

    Raises:
        ValueError: no lines with two ratios.
    """
    lines = paper.summarize_speedup(document["rows"])
    if len({line["s"] for line in lines}) < 2:
        raise ValueError("no speed-ups at two ratios")
    top = max(line[key] for line in lines for key in ("theory", "pytorch", "ours"))
    kernels, sizes = sorted({p["k"] for p in lines}), sorted({p["d"] for p in lines})
    series = (
        ("r_s by FLOPs", "theory", "black", "--"),
        ("Ghost module, PyTorch at its best", "pytorch", style.BEST, "D-"),
        ("Ghost module, ghost_ops", "ours", style.OURS, "o-"),
    )
    matplotlib = style.matplotlib_modules()
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(1.0 + 1.9 * len(sizes), 0.9 + 2.2 * len(kernels))
        grid = figure.subplots(len(kernels), len(sizes), sharex=True, sharey=True, squeeze=False)
        for row, k in zip(grid, kernels, strict=True):
            for axes, d in zip(row, sizes, strict=True):
                points = sorted(
                    (p for p in lines if (p["k"], p["d"]) == (k, d)), key=lambda p: p["s"]
                )
                xs = [p["s"] for p in points]
                for label, key, colour, mark in series:
                    axes.plot(xs, [p[key] for p in points], mark, color=colour, markersize=4,
                              linewidth=1.2, label=label)  # fmt: skip
                axes.axhline(1.0, color="black", linewidth=0.6)
                axes.set_xticks(xs)
                axes.grid(**style.GRID)
                axes.set_title(f"{k} x {k} conv, d = {d}", **style.TITLE)
        grid[0, 0].set_ylim(0.0, 1.1 * top)
        for axes in grid[-1]:
            axes.set_xlabel("ratio s")
        for axes in grid[:, 0]:
            axes.set_ylabel("times faster")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3)
        style.caption(figure, document["meta"])
    return figure


def draw_redundancy(document: Mapping[str, Any]) -> Any:
    """Error of each map when made from the best other map by a d x d convolution.

    Raises:
        ValueError: no such rows.
    """
    rows = [r for r in document["rows"] if r["mode"] == "redundancy"]
    if not rows:
        raise ValueError("no rows on redundancy")
    series = (
        ("from a map of the same image", "same image", style.OURS, "o", -1),
        ("control: from a map of another image", "other images", style.EAGER, "s", 1),
    )
    panels = list(dict.fromkeys(r["shape"] for r in rows))
    matplotlib = style.matplotlib_modules()
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(0.8 + 3.6 * len(panels), 3.8)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            for label, source, colour, marker, side in series:
                found = sorted(
                    (r for r in rows if (r["shape"], r["provider"]) == (panel, source)),
                    key=lambda r: r["d"],
                )
                for row in found:
                    each = row["relative_each"]
                    # Beside the line, spread a little, so that every map can be seen.
                    xs = [row["d"] + side * (0.12 + 0.2 * i / len(each)) for i in range(len(each))]
                    axes.scatter(xs, each, s=6, color=colour, alpha=0.45, linewidth=0)
                axes.plot(
                    [r["d"] for r in found], [r["relative"] for r in found], marker=marker,
                    color=colour, linewidth=1.4, markersize=5, label=label,
                )  # fmt: skip
            axes.set_xticks(sorted({r["d"] for r in rows}))
            top = max(v for r in rows for v in r["relative_each"])
            axes.set_ylim(0.0, min(1.2, math.ceil(10 * top) / 10))
            axes.set_xlabel("kernel size d")
            axes.grid(**style.GRID)
            count = next(r["maps"] for r in rows if r["shape"] == panel)
            axes.set_title(f"{count} {panel}", **style.TITLE)
            style.legend_above(axes, columns=1)
        all_axes[0].set_ylabel("MSE over mean square (line: median)")
        style.caption(figure, document["meta"])
    return figure
