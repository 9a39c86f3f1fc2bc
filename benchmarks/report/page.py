"""One Markdown page from the results files of a folder: worst cases first, tables, commands.

python -m benchmarks page results           writes results/REPORT.md, and the pictures beside it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.machine import MissingExtra
from benchmarks.harness.rows import Point, load, means, spread
from benchmarks.questions import QUESTIONS
from benchmarks.report import plot
from benchmarks.report.table import Table, of_means, text, times

RUN_FILE = "run.json"  # of ``python -m benchmarks all``, beside the results
Document = Mapping[str, Any]


def _machine(documents: Mapping[str, Document]) -> list[str]:
    metas = [document["meta"] for document in documents.values()]
    lines = []
    for key in ("cpu", "torch", "python", "commit", "threads", "clock", "date", "load_average"):
        found = dict.fromkeys(str(meta.get(key, "unknown")) for meta in metas)
        lines.append(f"- {key}: {'; '.join(found)}")
    sets = dict.fromkeys(map(machine.instructions, metas))
    return [*lines, f"- instruction sets: {'; or '.join(sets)}", ""]


def _commands(documents: Mapping[str, Document], run: Mapping[str, Any] | None) -> list[str]:
    """What was run, part by part, and how long it took."""
    lines, taken = [], {} if run is None else run["seconds"]
    if run is not None:
        state = "" if run["complete"] else "; **unfinished**"
        lines = [f"    {run['fingerprint']['command']}", ""]
        lines += [f"{sum(taken.values()):.0f} s in all{state}.", ""]
    body = []
    for name, meta in ((name, document["meta"]) for name, document in documents.items()):
        seconds = taken.get(name, meta.get("seconds", ""))
        body.append((f"{name}: `{meta['command']}`", meta["date"], seconds))
    return lines + Table("", ("part", "started (UTC)", "seconds"), body).lines()


def shown(mean: str) -> bool:
    """Whether the page shows a mean: single peers and floors of single providers are left out."""
    best = ("best peer", "best_pytorch", "best_engine", "fused_best", "eager_nchw", "than eager")
    return not (": floors of " in mean or "times faster" in mean) or mean.endswith(best)


def worst(points: Iterable[Point]) -> list[str]:
    """The three worst values of each mean; of speed-ups, those over the best peer."""
    values: dict[str, list[tuple[float, str]]] = {}
    for mean, (value, _, _), label in points:
        peer = mean.startswith("product") and "fused" not in mean
        every = not peer and "times faster" not in mean and ": floors of " not in mean
        if every or mean.endswith("times faster than the best peer"):
            values.setdefault(mean, []).append((value, label))
    lines = []
    for mean, found in values.items():
        found.sort(reverse=mean.endswith("measured over predicted"))
        few = ", ".join(f"{label} {times(value)}" for value, label in found[:3])
        losses = sum(value < 1.0 for value, _ in found)
        slower = f"; slower on {losses} of {len(found)}" if "times faster" in mean else ""
        lines.append(f"- {mean}{slower}: {few}")
    return lines


def _section(name: str, document: Document, pictures: Sequence[str]) -> list[str]:
    meta, rows, state = document["meta"], document["rows"], []
    if meta.get("seconds"):
        state.append(f"{meta['seconds']:.0f} s")
    if (noise := spread(rows)) is not None:
        state.append(f"median spread (p80 - p20) / median of a time {noise:.1%}")
    if not document.get("complete", True):
        state.append("**interrupted: not all rows are there**")
    lines = [f"## {QUESTIONS[name].title}", "", f"    {meta['command']}", "", ", ".join(state), ""]
    for picture in pictures:
        lines += [f"![{picture}]({picture})", ""]
    return [*lines, text(QUESTIONS[name].tables(rows))]


def render(
    documents: Mapping[str, Document],
    pictures: Mapping[str, Sequence[str]],
    run: Mapping[str, Any] | None = None,
) -> str:
    """The page, from results and file names of pictures by question, and the state of ``all``."""
    lines = ["# Benchmark report", "", *_machine(documents), "## Worst cases first", ""]
    points = [p for name, d in documents.items() for p in QUESTIONS[name].ratios(d["rows"])]
    points = [point for point in points if shown(point.mean)]
    lines += [
        *worst(points),
        "",
        "Times are medians of interleaved rounds, checked against float64 first. Floor = max(bytes "
        "/ bandwidth, FLOPs / GEMM peak), both measured in the same run. Ratios below 1 (losses) "
        "are bold.",
        "",
        "## Geometric means",
        "",
        "How far the noise of this run could have moved each stands beside it: p20 / p80 to p80 / "
        "p20 of the times compared (bytes have none). `python -m benchmarks compare A B` says "
        "which differ between two reports.",
        "",
        *of_means(means(points)).lines(),
        "## Commands",
        "",
        *_commands(documents, run),
    ]
    for name, document in documents.items():
        lines += _section(name, document, pictures.get(name, ()))
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path) -> Path:
    """Write REPORT.md, and the pictures, from the results files in a folder. ValueError if there
    is none or one is broken, OSError if the page cannot be written."""
    files = {name: folder / f"{name}.json" for name in QUESTIONS}
    documents = {name: load(path) for name, path in files.items() if path.is_file()}
    if not documents:
        raise ValueError(f"{folder}: none of {', '.join(p.name for p in files.values())} is there")
    target = machine.prepare_output(folder / "REPORT.md")
    pictures: dict[str, list[str]] = {}
    for name, document in documents.items():
        drawn = plot.draw_all(document, folder / name)
        pictures[name] = [path.name for path in drawn if path.suffix == ".png"]
    try:
        run = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        run = None  # the parts were run one by one
    target.write_text(render(documents, pictures, run))
    return target


def main(argv: Sequence[str]) -> int:
    """The page of a folder of results; 2 if it has none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks page", description=write.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results"))
    try:
        target = write(parser.parse_args(argv).folder)
    except (OSError, ValueError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Report written to {target}")
    return 0
