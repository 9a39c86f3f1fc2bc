"""The one style of all pictures, and what they share.

Colours are Okabe and Ito's, which colour-blind readers tell apart; marks differ in form too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, report
from benchmarks.extras import require

EAGER, BEST, OURS, ENGINE, LOSS = "#7F7F7F", "#E69F00", "#0072B2", "#56B4E9", "#D55E00"
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


def matplotlib_modules() -> Any:
    """matplotlib, with the modules used here loaded."""
    matplotlib = require("matplotlib", "pictures")
    # The figure class alone: pyplot would hold global state and ask for a display.
    for module in ("matplotlib.figure", "matplotlib.ticker"):
        require(module, "pictures")
    return matplotlib


def shape_label(shape: str) -> str:
    """``40-120@28-relu`` as ``40 to 120 @ 28, ReLU``."""
    channels, _, rest = shape.partition("@")
    inp, _, oup = channels.partition("-")
    size, _, activation = rest.partition("-")
    if not oup:
        return shape  # no module: a network
    names = {"relu": "ReLU", "silu": "SiLU"}
    return f"{inp} → {oup} @ {size}, {names.get(activation, activation)}"


TITLE = {"loc": "left", "fontweight": "bold"}


def legend_above(axes: Any, *, columns: int) -> None:
    """The legend between title and axes, where it never covers data."""
    rows = -(-len(axes.get_legend_handles_labels()[1]) // columns)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderaxespad=0.2,
        handletextpad=0.5,
    )  # fmt: skip
    axes.set_title(axes.get_title(loc="left"), pad=8 + 13 * rows, **TITLE)


def bar_label(axes: Any, bars: Any, texts: Sequence[str]) -> None:
    """A small text behind each bar, readable where it crosses a line."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.bar_label(bars, texts, padding=3, fontsize=7, bbox=paper)


def ghostnet_mean(values: Sequence[tuple[str, float]]) -> float | None:
    """Geometric mean over the GhostNet shapes, or over all where there are none."""
    ghostnet = [value for group, value in values if group == "ghostnet"]
    return report.geometric_mean(ghostnet or [value for _, value in values])


def caption(figure: Any, meta: Mapping[str, Any]) -> None:
    """Machine, versions, commit and date, below everything."""
    threads = f"{meta['threads']} thread" + ("s" if meta["threads"] != 1 else "")
    text = f"{meta['gpu'] if meta.get('device') == 'cuda' else meta['cpu']}, {threads}; torch "
    text += f"{meta['torch']}; commit {meta['commit']}; {meta['date'][:10]}"
    if meta.get("forced"):
        text = f"{harness.instructions(meta)}; {text}"
    room = 0.2 / figure.get_figheight()  # inches, below everything that is laid out
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.text(0.995, 0.2 * room, text, ha="right", va="bottom", fontsize=6.5, color="#555555")


def shape_axis(axes: Any, names: Sequence[str]) -> None:
    """One line per shape, from the top."""
    axes.set_yticks(range(len(names)), [shape_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", **GRID)


def figure(width: float, height: float) -> Any:
    """A figure of so many inches, to be made and saved under ``rc_context(STYLE)``."""
    return matplotlib_modules().figure.Figure(figsize=(width, height), layout="constrained")


def plain_log(axis: Any, values: Sequence[float]) -> None:
    """Ticks at ``values``, written as they are, on a logarithmic axis."""
    ticker = matplotlib_modules().ticker
    axis.set_major_locator(ticker.FixedLocator(values))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_locator(ticker.NullLocator())


def save(drawn: Any, stem: Path, name: str) -> list[Path]:
    """Write a figure as ``<stem>_<name>.png`` and ``.svg``."""
    written = []
    for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
        path = stem.with_name(f"{stem.name}_{name}{suffix}")
        with matplotlib_modules().rc_context(STYLE):
            drawn.savefig(path, **options)
        written.append(path)
    return written
