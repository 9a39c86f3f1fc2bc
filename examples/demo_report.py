"""Tables and the picture of the demo: who is compared, and how many times faster fused is.

A row of ``shapes`` is one Ghost module in one mode: ``seconds`` has the median, p20 and p80 of each
that was timed, ``best`` the name of PyTorch's fastest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
TITLES = {
    "eager": "eager NCHW",
    "channels_last": "eager channels_last",
    "folded": "folded channels_last",
    "compile": "torch.compile channels_last",
    "fused": "fused NCHW",
}
MODES = {"train": "training", "eval": "inference"}
PEERS = {"eager": "eager NCHW", "channels_last": "eager channels_last", "best": "best of PyTorch"}
# Colours that colour-blind readers tell apart (Okabe and Ito).
COLOURS = {"eager": "#7F7F7F", "channels_last": "#E69F00", "compile": "#56B4E9", "fused": "#0072B2"}
LOSS, GRID = "#D55E00", {"color": "#D9D9D9", "linewidth": 0.6}
# The README's table at batch 16: times faster than each of PEERS; and what it was measured with.
README = {"eval": (5.0, 3.2, 2.6), "train": (2.4, 1.8, 1.8)}
KEEPS = "glibc malloc that keeps freed memory"
README_RUN = {
    "machine": "Intel(R) Xeon(R) Processor (family 6, model 167)",
    "instructions": "ghost_ops avx512, torch AVX512",
    "threads": "1 thread",
    "allocator": KEEPS,
    "clock": "wall clock",
    "batch": 16,
}


def faster(row: Row, peer: str) -> tuple[float, float, float]:
    """How many times faster than a peer fused is, by the medians, and the spread of both times."""
    theirs = row["seconds"][row["best"] if peer == "best" else peer]
    ours = row["seconds"]["fused"]
    return theirs[0] / ours[0], theirs[1] / ours[2], theirs[2] / ours[1]


def mean(rows: Sequence[Row], peer: str) -> float:
    """Geometric mean of how many times faster than a peer fused is."""
    return statistics.geometric_mean(faster(row, peer)[0] for row in rows)


def by_mode(shapes: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each mode."""
    return {mode: [row for row in shapes if row["mode"] == mode] for mode in MODES}


def best_of(shapes: Sequence[Row], why: str) -> str:
    """What the best of PyTorch is chosen from, and why torch.compile is missing in some rows."""
    compiled = sum("compile" in row["seconds"] for row in shapes)
    left_out = f" (in {compiled} of {len(shapes)} rows: {why})" if compiled < len(shapes) else ""
    return (
        "best of PyTorch: the fastest of eager NCHW, eager channels_last, folded batch norms "
        f"(inference) and torch.compile{left_out}"
    )


def reasons(meta: dict[str, Any], batch: int) -> str:
    """Why the README has other figures."""
    here = {**meta, "batch": batch}
    differs = [f"{key}: {here[key]}, not {v}" for key, v in README_RUN.items() if here[key] != v]
    return "; ".join(differs) or "nothing but the day and the version"


# ---- tables


def red(bad: bool, number: str) -> str:
    """A number; losses and errors in red."""
    return f"[red]{number}[/]" if bad else number


def print_table(
    console: Any, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table under headings; the first column is text, the others are numbers."""
    from rich import box
    from rich.table import Table

    console.width = max(console.width, 120)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, no_wrap=True, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(title, soft_wrap=True)
    console.print(table)


def print_training(console: Any, training: dict[str, Any]) -> None:
    """Step time, kept memory and accuracy of each network."""
    rows, ours = [], training["fused"]
    for name in (name for name in COLOURS if name in training):
        run = training[name]
        ratios = run["seconds"][0] / ours["seconds"][0], run["saved_bytes"] / ours["saved_bytes"]
        cells = [TITLES[name], *(f"{1e3 * value:.2f}" for value in run["seconds"])]
        cells += [f"{run['saved_bytes'] / 2**20:.2f}", *(red(r < 1.0, f"{r:.2f}x") for r in ratios)]
        rows.append([*cells, f"{run['losses'][-1]:.4f}", f"{run['accuracy']:.2%}"])
    headings = ["network", "step, ms", "p20", "p80", "kept, MiB", "fused is\nfaster", "keeps\nless"]
    title = f"Training on digits, batch {training['batch']}; kept: the bytes saved for backward"
    print_table(console, title, [*headings, "last loss", "accuracy"], rows)


def print_shapes(console: Any, shapes: Sequence[Row]) -> None:
    """Times of every shape, how many times faster fused is than each peer, and its error."""
    for mode, part in by_mode(shapes).items():
        rows, names = [], [name for name in TITLES if any(name in row["seconds"] for row in part)]
        for row in part:
            times = (row["seconds"].get(name) for name in names)
            ratios = (faster(row, peer)[0] for peer in PEERS)
            cells = [row["shape"], *(f"{1e6 * t[0]:.0f}" if t else "" for t in times)]
            cells += [red(ratio < 1.0, f"{ratio:.2f}x") for ratio in ratios]
            rows.append([*cells, red(not row["ok"], f"{row['error']:.0e}")])
        headings = [*(TITLES[name] for name in names), *(f"than {peer}" for peer in PEERS.values())]
        headings = [heading.replace(" ", "\n").replace("_", "\n_") for heading in headings]
        title = f"Ghost modules, {MODES[mode]}, batch {part[0]['batch']}: microseconds, how many "
        title += "times faster fused is, and its error against float64"
        print_table(console, title, ["shape", *headings, "error"], rows)


def print_means(console: Any, document: dict[str, Any]) -> None:
    """Geometric means beside the README's, and why they differ."""
    rows, shapes = [], document["shapes"]
    for mode, part in by_mode(shapes).items():
        slow = sum(faster(row, "best")[0] < 1.0 for row in part)
        here = [f"{mean(part, peer):.2f}x" for peer in PEERS]
        rows.append([f"{MODES[mode]}, here", *here, red(slow > 0, f"{slow} of {len(part)}")])
        rows.append([f"{MODES[mode]}, README", *(f"{value:.1f}x" for value in README[mode]), ""])
    headings = ["fused is faster", *(f"than {peer}" for peer in PEERS.values())]
    title = f"Geometric means over the shapes; {document['best']}"
    print_table(console, title, [*headings, "slower than the best"], rows)
    why = reasons(document["meta"], shapes[0]["batch"])
    console.print(f"Other figures than the README's, because of {why}", soft_wrap=True)


# ---- the picture


def draw_losses(axes: Any, apart: Any, training: dict[str, Any]) -> None:
    """Loss curves, and how far fused and the control are from the reference; running means."""
    from matplotlib.ticker import LogLocator, NullFormatter

    width = max(1, training["steps"] // 10)

    def curve(axes: Any, losses: Tensor, name: str, label: str, thickness: float) -> None:
        means = losses.unfold(0, width, 1).mean(-1)
        steps = range(width // 2, width // 2 + len(means))
        axes.plot(steps, means, color=COLOURS[name], linewidth=thickness, label=label)

    names = ("eager", "channels_last", "fused")
    eager, control, fused = (torch.tensor(training[n]["losses"]).double() for n in names)
    labels = [f"{TITLES[n]}: test accuracy {training[n]['accuracy']:.1%}" for n in names]
    curve(axes, eager, "eager", labels[0], 4.0)
    curve(axes, fused, "fused", labels[2], 1.2)
    curve(apart, (control - eager).abs(), "channels_last", "eager channels_last, the control", 1.2)
    curve(apart, (fused - eager).abs(), "fused", "fused", 1.2)
    axes.set_title("Training loss: same seed, same batches")
    apart.set_title("Difference of the losses from those of eager NCHW")
    apart.set_xlabel(f"step (running means of {width} steps)")
    for each in (axes, apart):
        each.set_yscale("log")
        each.grid(**GRID)
        each.legend(fontsize=8, frameon=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_cost(axes: Any, training: dict[str, Any]) -> None:
    """Step time and kept memory of each network, relative to eager NCHW."""
    names, base = [name for name in COLOURS if name in training], training["eager"]
    for place, (name, run) in enumerate((name, training[name]) for name in names):
        step, low, high = (value / base["seconds"][0] for value in run["seconds"])
        kept, style = run["saved_bytes"] / base["saved_bytes"], {"color": COLOURS[name]}
        time = axes.barh(place - 0.2, step, 0.38, xerr=[[step - low], [high - step]], **style)
        memory = axes.barh(place + 0.2, kept, 0.38, alpha=0.55, **style)
        axes.bar_label(time, [f"{1e3 * run['seconds'][0]:.1f} ms a step"], padding=4, fontsize=8)
        axes.bar_label(
            memory, [f"{run['saved_bytes'] / 2**20:.1f} MiB kept"], padding=4, fontsize=8
        )
    axes.set_yticks(range(len(names)), [TITLES[name].replace(" ", "\n") for name in names])
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.45 * axes.get_xlim()[1])
    axes.set_xlabel("relative to eager NCHW (left is better; lines: p20 to p80)")
    axes.set_title(f"Training step and memory for backward, batch {training['batch']}")


def draw_shapes(axes: Any, mode: str, rows: Sequence[Row]) -> None:
    """How many times faster than each peer fused is, per shape; bars for the best of PyTorch."""
    for place, row in enumerate(rows):
        value, low, high = faster(row, "best")
        style: dict[str, Any] = {"color": COLOURS["fused"] if value >= 1.0 else LOSS}
        style |= {"hatch": "" if value >= 1.0 else "/////", "edgecolor": "white"}
        noise = {"xerr": [[value - low], [high - value]], "error_kw": {"elinewidth": 0.8}}
        axes.barh(place, value - 1.0, 0.7, 1.0, **noise, **style)
    for peer, mark, colour, size in (
        ("best", "s", COLOURS["fused"], 9),
        ("channels_last", "D", COLOURS["channels_last"], 5),
        ("eager", "o", COLOURS["eager"], 6),
    ):
        xs = [faster(row, peer)[0] for row in rows] if peer != "best" else []
        label = f"than {PEERS[peer]}" + " (bars, p20 to p80)" * (peer == "best")
        label = f"{label}: {mean(rows, peer):.2f}x"
        style = {"color": colour, "markersize": size, "markeredgecolor": "white", "label": label}
        axes.plot(xs, range(len(xs)), mark, **style)
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", **GRID)
    axes.set_axisbelow(True)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("times faster (right of 1 is better; hatched: slower)")
    axes.set_title(f"Ghost modules, {MODES[mode]}, batch {rows[0]['batch']}:\nfused is faster")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=8, frameon=False)


def draw(document: dict[str, Any], path: Path) -> None:
    """Loss curves, what they cost, and the speed-up of every shape."""
    from matplotlib.figure import Figure

    training, rows = document["training"], by_mode(document["shapes"])
    figure = Figure(figsize=(15.0, max(8.0, 2.6 + 0.27 * len(rows["eval"]))), layout="constrained")
    mosaic = figure.subplot_mosaic(
        [[name, "train", "eval"] for name in ("loss", "apart", "cost")],
        height_ratios=(1.4, 1.0, 1.5),
        width_ratios=(1.2, 1.0, 1.0),
    )
    draw_losses(mosaic["loss"], mosaic["apart"], training)
    draw_cost(mosaic["cost"], training)
    for mode, part in rows.items():
        draw_shapes(mosaic[mode], mode, part)
        names = [row["shape"] for row in part] if mode == "train" else []
        mosaic[mode].set_yticks(range(len(names)), names)
    text = "; ".join(str(value) for value in document["meta"].values())
    text += f"\n{document['best']}"
    figure.supxlabel(text, x=0.99, ha="right", fontsize=8, color="#333333")
    figure.savefig(path, dpi=110)
