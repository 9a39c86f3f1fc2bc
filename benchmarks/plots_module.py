"""Pictures of ``benchmarks.module``'s rows: floors, roofline, ratios, training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import providers, report, style


def draw_floors(document: Mapping[str, Any], batches: Sequence[int] | None = None) -> Any:
    """Dot plot: eval time of every shape in floors, one panel per batch size.

    Args:
        document: a results file of ``benchmarks.module``, loaded.
        batches: batch sizes to show; all that were measured by default.

    Raises:
        ValueError: the file holds no eval rows of these batches.
    """
    matplotlib = style.matplotlib_modules()
    rows = [r for r in report.timed(document["rows"]) if r["mode"] == "eval"]
    batches = batches or sorted({r["batch"] for r in rows})
    panels = [(batch, report.by_shape(r for r in rows if r["batch"] == batch)) for batch in batches]
    if not panels or not all(cells for _, cells in panels):
        raise ValueError(f"no eval rows for batch {list(batches) or 'sizes of any kind'}")
    count = max(len(cells) for _, cells in panels)
    series = (
        ("eager PyTorch (NCHW)", style.EAGER, "s", lambda cell: cell.get(report.BASELINE)),
        ("best PyTorch option", style.BEST, "D", lambda cell: report.fastest(cell, "pytorch")),
        ("ghost_ops", style.OURS, "o", lambda cell: report.fastest(cell, "ours")),
    )
    engines = [p.name for p in providers.ENGINES if any(r["provider"] == p.name for r in rows)]
    if engines:
        families = dict.fromkeys(p.family for p in providers.ENGINES if p.name in engines)
        label = f"{'best of ' if len(engines) > 1 else ''}{', '.join(families)}"
        pick = lambda cell: report.fastest(cell, "engine")  # noqa: E731
        series = (*series[:2], (label, style.ENGINE, "^", pick), series[2])
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(3.2 + 3.3 * len(panels), 1.5 + 0.21 * count)
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
                mean = style.ghostnet_mean([(row["group"], row["floors"]) for row, _ in chosen])
                text = label if mean is None else f"{label}: {mean:.2f} floors"
                axes.scatter(
                    *zip(*points, strict=True) if points else ((), ()),
                    label=text, color=colour, marker=marker, s=26, zorder=3, linewidth=0,
                )  # fmt: skip
            axes.axvline(1.0, color="black", linewidth=1.0)
            axes.set_xscale("log")
            style.plain_log(axes.xaxis, [1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24])
            axes.set_title(f"Batch {batch}: geometric means, GhostNet 1.0x", **style.TITLE)
            axes.set_xlabel("time in floors (1 = hardware limit; left is better)")
            style.shape_axis(axes, names)
            style.legend_above(axes, columns=1)
        style.caption(figure, document["meta"])
    return figure


def draw_training(document: Mapping[str, Any]) -> Any:
    """Bars: speed-up of forward + backward over eager PyTorch in each layout, per shape.

    Raises:
        ValueError: the file holds no training rows.
    """
    matplotlib = style.matplotlib_modules()
    rows = [r for r in report.timed(document["rows"]) if r["mode"] == "train"]
    cells = report.by_shape(rows)
    cells = {k: c for k, c in cells.items() if report.fastest(c, "ours") is not None}
    if not cells:
        raise ValueError("no training rows")
    series = (
        ("eager NCHW", "eager_nchw", style.OURS),
        ("eager channels_last", "eager_cl", style.BEST),
    )
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(6.4, 1.3 + 0.27 * len(cells))
        axes = figure.subplots()
        for offset, (label, name, colour) in zip((-0.2, 0.2), series, strict=True):
            chosen = [
                (place + offset, cell[name]["median_s"] / ours["median_s"], ours["group"])
                for place, cell in enumerate(cells.values())
                if name in cell and (ours := report.fastest(cell, "ours")) is not None
            ]
            if not chosen:
                continue
            ratios = [(place, ratio) for place, ratio, _ in chosen]
            mean = style.ghostnet_mean([(group, ratio) for _, ratio, group in chosen])
            axes.barh(
                *zip(*ratios, strict=True), height=0.38, color=colour,
                label=f"over {label}: {mean:.2f}x",
            )  # fmt: skip
        axes.axvline(1.0, color="black", linewidth=1.0)
        axes.set_title(
            f"Training step, batch {rows[0]['batch']}: geometric means, GhostNet 1.0x",
            **style.TITLE,
        )
        axes.set_xlabel("times faster than eager PyTorch (right of 1 is better)")
        style.shape_axis(axes, list(cells))
        style.legend_above(axes, columns=2)
        style.caption(figure, document["meta"])
    return figure


def _eval_panels(document: Mapping[str, Any]) -> list[tuple[int, dict[str, dict[str, report.Row]]]]:
    """(batch, shape -> provider -> row) of the eval rows.

    Raises:
        ValueError: there are none of ours with a peer.
    """
    rows = [r for r in report.timed(document["rows"]) if r["mode"] == "eval"]
    panels = []
    for batch in sorted({r["batch"] for r in rows}):
        cells = report.by_shape(r for r in rows if r["batch"] == batch)
        both = {
            shape: cell
            for shape, cell in cells.items()
            if report.fastest(cell, "ours") and report.fastest(cell, "pytorch", "engine")
        }
        if both:
            panels.append((batch, both))
    if not panels:
        raise ValueError("no eval rows of ghost_ops with a peer")
    return panels


def draw_roofline(document: Mapping[str, Any]) -> Any:
    """Rate over arithmetic intensity: the floor, ours and the best peer of every shape.

    The slanted roofs are the measured bandwidth of the largest copy and of the fastest one (in
    cache); between them the floor of a shape lies where its bytes put it.

    Raises:
        ValueError: the file holds no eval rows of ours, or no measured limits.
    """
    panels, limits = _eval_panels(document), document.get("roofline")
    if not limits:
        raise ValueError("no measured limits")
    matplotlib = style.matplotlib_modules()
    peak = limits["gemm_peak"] / 1e9
    slowest = min(
        row["gflops"]
        for _, cells in panels
        for cell in cells.values()
        for row in (report.fastest(cell, "pytorch", "engine"), report.fastest(cell, "ours"))
        if row is not None
    )
    roofs = (
        (limits["bandwidth"][-1] / 1e9, "main memory", "-"),
        (max(limits["bandwidth"]) / 1e9, "cache", "--"),
    )
    series = (
        ("best peer", style.BEST, "D", ("pytorch", "engine")),
        ("ghost_ops", style.OURS, "o", ("ours",)),
    )
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(0.8 + 4.6 * len(panels), 4.6)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (batch, cells) in zip(all_axes, panels, strict=True):
            chosen = {
                label: [report.fastest(cell, *families) for cell in cells.values()]
                for label, _, _, families in series
            }
            at = [row["flops"] / row["bytes"] for row in chosen["ghost_ops"]]
            low, high = 0.7 * min(at), 1.4 * max(at)
            for rate, name, line in roofs:
                edge = peak / rate
                xs = [low, *([edge] if low < edge < high else []), high]
                axes.plot(
                    xs, [min(peak, rate * x) for x in xs], line, color="black", linewidth=1.0,
                    label=f"{name}: {rate:.0f} GB/s", zorder=1,
                )  # fmt: skip
            floors = [row["flops"] / row["floor_s"] / 1e9 for row in chosen["ghost_ops"]]
            axes.scatter(
                at,
                floors,
                marker="_",
                color="black",
                s=60,
                zorder=2,
                label="floor of a shape (peak of its minute)",
            )
            for label, colour, marker, _ in series:
                rates = [row["gflops"] for row in chosen[label]]
                axes.scatter(
                    at, rates, color=colour, marker=marker, s=24, zorder=3, linewidth=0, label=label
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            ticks = [k * 10**e for e in range(-2, 5) for k in (1, 2, 5)]
            style.plain_log(axes.xaxis, ticks)
            style.plain_log(axes.yaxis, ticks)
            axes.set_xlim(low, high)
            axes.set_ylim(0.8 * slowest, 1.6 * peak)
            axes.set_xlabel("FLOPs per byte that must move")
            axes.grid(**style.GRID)
            axes.set_title(f"Batch {batch}: peak {peak:.0f} GFLOP/s", **style.TITLE)
            style.legend_above(axes, columns=2)
        all_axes[0].set_ylabel("GFLOP/s (higher is better)")
        style.caption(figure, document["meta"])
    return figure


def draw_ratios(document: Mapping[str, Any]) -> Any:
    """Bars: the best peer's time over ours, worst shape first, with the noise of both.

    Raises:
        ValueError: the file holds no eval rows of ours with a peer.
    """
    panels = _eval_panels(document)
    matplotlib = style.matplotlib_modules()
    count = max(len(cells) for _, cells in panels)
    with matplotlib.rc_context(style.STYLE):
        figure = style.figure(1.0 + 4.6 * len(panels), 1.3 + 0.21 * count)
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (batch, cells) in zip(all_axes, panels, strict=True):
            bars = []
            for shape, cell in cells.items():
                peer, ours = report.fastest(cell, "pytorch", "engine"), report.fastest(cell, "ours")
                assert peer is not None and ours is not None
                ratio = peer["median_s"] / ours["median_s"]
                low, high = peer["p20_s"] / ours["p80_s"], peer["p80_s"] / ours["p20_s"]
                bars.append((ratio, ratio - low, high - ratio, shape, ours["group"]))
            bars.sort()
            ratios = [bar[0] for bar in bars]
            axes.barh(
                range(len(bars)), ratios, height=0.7,
                color=[style.OURS if ratio >= 1.0 else style.LOSS for ratio in ratios],
                xerr=[[bar[1] for bar in bars], [bar[2] for bar in bars]],
                error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
            )  # fmt: skip
            axes.axvline(1.0, color="black", linewidth=1.0)
            axes.set_xlim(0.0, 1.6 * max(ratios))  # noise beyond that would hide the bars
            mean = style.ghostnet_mean([(bar[4], bar[0]) for bar in bars])
            axes.set_title(f"Batch {batch}: geometric mean {mean:.2f}x", **style.TITLE)
            axes.set_xlabel("best peer's time over ours (lines: p20 and p80)")
            style.shape_axis(axes, [bar[3] for bar in bars])
        style.caption(figure, document["meta"])
    return figure
