"""Pictures from result files, as PNG and SVG, and the demo's picture.

python -m benchmarks.plots results/module.json                   beside the file
python -m benchmarks.plots results/scaling.json --out pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, harness, plots_module, plots_questions, style
from benchmarks.extras import MissingExtra

PICTURES: dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    "module": {
        "floors": plots_module.draw_floors,
        "ratios": plots_module.draw_ratios,
        "roofline": plots_module.draw_roofline,
        "training": plots_module.draw_training,
    },
    "network": {"bars": plots_questions.draw_networks},
    "scaling": {"curves": plots_questions.draw_scaling},
    "memory": {"bars": plots_questions.draw_memory},
    "plan": {"scatter": plots_questions.draw_plan},
    "product": {"roofline": plots_module.draw_roofline},
    "paper": {
        "speedup": plots_questions.draw_speedup,
        "redundancy": plots_questions.draw_redundancy,
    },
}


def draw_all(document: Mapping[str, Any], stem: Path) -> list[Path]:
    """Every picture that the rows allow, as PNG and SVG named after ``stem``."""
    written = []
    questions = {row.get("question") for row in document["rows"]}
    for question in sorted(questions & PICTURES.keys()):
        for name, draw in PICTURES[question].items():
            try:
                figure = draw(document)
            except ValueError as error:
                print(f"{name}: left out, {error}")
                continue
            written += style.save(figure, stem, name)
    return written


def draw_demo(document: Mapping[str, Any], path: Path) -> None:
    """The demo's picture: loss curves, what they cost, and the speed-up of every shape."""
    matplotlib = style.matplotlib_modules()
    training, rows = document["training"], document["shapes"]
    runs = (
        ("reference", style.EAGER, "-", 3.2),
        ("control", style.BEST, ":", 1.4),
        ("fused", style.OURS, "-", 1.0),
    )
    with matplotlib.rc_context(style.STYLE):
        height = max(5.4, 1.6 + 0.25 * len(rows))
        figure = matplotlib.figure.Figure(figsize=(10.5, height), layout="constrained")
        mosaic = figure.subplot_mosaic([["loss", "shapes"], ["cost", "shapes"]],
                                       height_ratios=(2.4, 1.0))  # fmt: skip
        axes = mosaic["loss"]
        for name, colour, dash, width in runs:
            run = training[name]
            label = f"{run['title']}: test accuracy {run['accuracy']:.1%}"
            axes.plot(run["losses"], dash, color=colour, linewidth=width, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.set_title("Same seed, same batches, same curve", **style.TITLE)
        axes.grid(axis="y", **style.GRID)
        style.legend_above(axes, columns=1)

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
        axes.set_title("Step time and memory saved for backward", **style.TITLE)

        axes = mosaic["shapes"]
        for offset, mode, colour, label in (
            (-0.2, "eval", style.OURS, "inference"),
            (0.2, "train", style.BEST, "training"),
        ):
            ratios = [row[mode]["ratio"] for row in rows]
            mean = style.ghostnet_mean([(row["group"], row[mode]["ratio"]) for row in rows])
            label = f"{label}: {mean:.2f}x"
            places = [place + offset for place in range(len(rows))]
            axes.barh(places, ratios, 0.38, color=colour, label=label)
        axes.axvline(1.0, color="black", linewidth=1.0)
        axes.set_title(f"Speed-up, batch {rows[0]['batch']} (geometric means)", **style.TITLE)
        axes.set_xlabel("times faster (right of 1 is better)")
        style.shape_axis(axes, [row["shape"] for row in rows])
        style.legend_above(axes, columns=2)
        style.caption(figure, document["meta"])
        figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: draw one results file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("results", type=Path, help="JSON written by a script of this package")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: beside it)")
    arguments = parser.parse_args(argv)
    try:
        document = compare.load(arguments.results)
        stem = (arguments.out or arguments.results.parent) / arguments.results.stem
        harness.prepare_output(stem.with_name(f"{stem.name}_picture.png"))
        written = draw_all(document, stem)
    except (OSError, ValueError, MissingExtra) as error:
        print(f"error: {arguments.results}: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0 if written else 1


if __name__ == "__main__":
    raise SystemExit(main())
