"""One Markdown page from the results files of a folder: worst cases first, tables, commands.

python -m benchmarks.page results           writes results/REPORT.md, and the pictures beside it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, harness, means, plan, report
from benchmarks.extras import MissingExtra
from benchmarks.sections import SECTIONS, WORST, Document, table

# The order of the sections; each is one results file, <name>.json.
QUESTIONS = {
    "module": "One Ghost module",
    "network": "Whole networks",
    "scaling": "How the cost grows",
    "memory": "Memory of a training step",
    "plan": "Predicted and measured",
    "product": "The primary product alone",
    "paper": "The paper's questions",
}


def _machine(documents: Mapping[str, Document]) -> list[str]:
    metas = [document["meta"] for document in documents.values()]
    lines = []
    for key in ("cpu", "torch", "python", "commit", "threads", "clock"):
        found = dict.fromkeys(str(meta.get(key, "unknown")) for meta in metas)
        lines.append(f"- {key}: {'; '.join(found)}")
    sets = dict.fromkeys(map(harness.instructions, metas))
    lines.append(f"- instruction sets: {'; or '.join(sets)}")
    dates = sorted(meta["date"] for meta in metas)
    lines.append(f"- measured from {dates[0]} to {dates[-1]} (UTC)")
    loads = [meta["load_average"] for meta in metas if meta.get("load_average") is not None]
    if loads:
        lines.append(
            f"- load average when the scripts started: {min(loads):.1f} to {max(loads):.1f}"
        )
    return [*lines, ""]


def _commands(documents: Mapping[str, Document], run: Mapping[str, Any] | None) -> list[str]:
    """What was run, part by part, and how long it took."""
    lines = []
    if run is not None:
        total = sum(run["seconds"].values())
        state = "" if run["complete"] else "; **unfinished**"
        lines += [f"    {run['command']}", "", f"{total:.0f} s in all{state}.", ""]
    body = []
    for name, document in documents.items():
        meta = document["meta"]
        seconds = (run or {"seconds": {}})["seconds"].get(name, meta.get("seconds"))
        taken = "" if seconds is None else f"{seconds:.0f}"
        body.append((f"{name}: `{meta['command']}`", meta["date"], taken))
    return lines + table(("part", "started (UTC)", "seconds"), body)


def _plan_error(documents: Mapping[str, Document]) -> list[str]:
    if "plan" not in documents:
        return []
    return [
        f"- predicted against measured time, {name}: measured = {s['factor']:.2f} x predicted "
        f"(geometric mean of {s['shapes']} shapes); without that factor the median error is "
        f"{s['error']:.0%}"
        for name, s in plan.summarize(documents["plan"]["rows"]).items()
    ]


def _means(documents: Mapping[str, Document]) -> list[str]:
    body = [
        (
            name,
            mean.count,
            f"{mean.value:.2f}",
            "" if mean.low == mean.high else f"{mean.low:.2f} to {mean.high:.2f}",
        )
        for document in documents.values()
        for name, mean in means.of_document(document).items()
        if ": floors of " not in name
        or name.endswith(("fused_best", "best_pytorch", "best_engine"))
    ]
    lines = [
        "How far the noise of this run could have moved each stands beside it: p20 / p80 to p80 / "
        "p20 of the times compared (bytes have none). `python -m benchmarks compare A B` says "
        "which differ between two reports.",
        "",
    ]
    return lines + table(("geometric mean of", "values", "mean", "spread"), body) if body else []


def render(
    documents: Mapping[str, Document],
    pictures: Mapping[str, Sequence[str]],
    run: Mapping[str, Any] | None = None,
) -> str:
    """The page.

    Args:
        documents: question -> results.
        pictures: question -> file names of its pictures, relative to the page.
        run: command and seconds of the whole report, as ``python -m benchmarks all`` keeps them.
    """
    lines = ["# Benchmark report", "", *_machine(documents), "## Worst cases first", ""]
    for name, document in documents.items():
        lines += WORST.get(name, lambda _: [])(document)
    lines += [
        *_plan_error(documents),
        "",
        "Times are medians of interleaved rounds, checked against float64 first. Floor = max(bytes "
        "/ bandwidth, FLOPs / GEMM peak), both measured in the same run. Ratios below 1 (losses) "
        "are bold.",
        "",
        "## Geometric means",
        "",
        *_means(documents),
        "## Commands",
        "",
        *_commands(documents, run),
    ]
    for name, document in documents.items():
        meta = document["meta"]
        lines += [f"## {QUESTIONS[name]}", "", f"    {meta['command']}", ""]
        state = []
        if meta.get("seconds"):
            state.append(f"{meta['seconds']:.0f} s")
        if (spread := report.spread(document["rows"])) is not None:
            state.append(f"median spread (p80 - p20) / median of a time {spread:.1%}")
        if not document.get("complete", True):
            state.append("**interrupted: not all rows are there**")
        if state:
            lines += [", ".join(state), ""]
        for picture in pictures.get(name, ()):
            lines += [f"![{picture}]({picture})", ""]
        lines += SECTIONS[name](document)
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path, *, draw: bool = True) -> Path:
    """Write REPORT.md, and the pictures, from the results files in ``folder``.

    Raises:
        ValueError: there is none, or one is broken. OSError: the page cannot be written.
        MissingExtra: matplotlib is missing (with ``draw``).
    """
    documents = {
        name: compare.load(path)
        for name in QUESTIONS
        if (path := folder / f"{name}.json").is_file()
    }
    if not documents:
        names = ", ".join(f"{name}.json" for name in QUESTIONS)
        raise ValueError(f"{folder}: none of {names} is there")
    target = harness.prepare_output(folder / "REPORT.md")
    pictures: dict[str, list[str]] = {}
    if draw:
        from benchmarks import plots

        for name, document in documents.items():
            files = plots.draw_all(document, folder / name)
            pictures[name] = [f.name for f in files if f.suffix == ".png"]
    try:
        run = json.loads((folder / harness.RUN_FILE).read_text())
    except (OSError, ValueError):
        run = None  # the parts were run one by one
    target.write_text(render(documents, pictures, run))
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: the page of a folder of results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("results"))
    parser.add_argument("--no-pictures", action="store_true", help="the text alone")
    arguments = parser.parse_args(argv)
    try:
        target = write(arguments.folder, draw=not arguments.no_pictures)
    except (OSError, ValueError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Report written to {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
