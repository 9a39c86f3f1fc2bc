"""One Markdown page from the results files of a folder: worst cases first, tables, commands.

python -m benchmarks.page results           writes results/REPORT.md, and the pictures beside it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, harness, memory, paper, plan, report, scaling
from benchmarks.extras import MissingExtra
from benchmarks.providers import BASELINE

Document = Mapping[str, Any]
# The order of the sections; each is one results file, <name>.json.
QUESTIONS = {
    "module": "One Ghost module",
    "network": "Whole networks",
    "scaling": "How the cost grows",
    "memory": "Memory of a training step",
    "plan": "Predicted and measured",
    "paper": "The paper's questions",
}


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    align = ["---", *["---:"] * (len(headings) - 1)]
    lines = [headings, align, *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines] + [""]


def _times(value: float | None) -> str:
    """A ratio; losses are set in bold."""
    if value is None:
        return ""
    return f"**{value:.2f}x**" if value < 1.0 else f"{value:.2f}x"


def _grouped(document: Document) -> dict[tuple[str, int, str], list[report.Row]]:
    rows = [r for r in document["rows"] if r["mode"] in ("eval", "train")]
    return report.groups(rows)


def worst_module(document: Document) -> list[str]:
    """The shapes where ours is slower than the best of all peers, or gains least."""
    lines = []
    for (mode, batch, group), rows in _grouped(document).items():
        ratios = []
        for shape, cell in report.by_shape(rows).items():
            peer, ours = report.fastest(cell, "pytorch", "engine"), report.fastest(cell, "ours")
            if peer is not None and ours is not None:
                ratio = peer["median_s"] / ours["median_s"]
                ratios.append((ratio, f"{shape} {_times(ratio)} ({peer['provider']})"))
        ratios.sort()
        slower = sum(ratio < 1.0 for ratio, _ in ratios)
        if ratios:
            few = ", ".join(text for _, text in ratios[: max(3, min(slower, 8))])
            lines.append(
                f"- {group}, {mode}, batch {batch}: slower than the best peer on {slower} of "
                f"{len(ratios)} shapes; worst: {few}"
            )
    return lines


def worst_scaling(document: Document) -> list[str]:
    """The points where ours gains least over the best of PyTorch."""
    lines = sorted(scaling.summarize(document["rows"]), key=lambda line: line["over_best"])
    few = [f"{p['axis']} {p['value']} {_times(p['over_best'])}" for p in lines[:3]]
    return [f"- scaling, over the best of PyTorch: {', '.join(few)}"] if few else []


def worst_memory(document: Document) -> list[str]:
    """The subjects where ours saves least at the peak."""
    lines = sorted(memory.summarize(document["rows"]), key=lambda line: line["peak_bytes_ratio"])
    few = [f"{p['shape']} {_times(p['peak_bytes_ratio'])}" for p in lines[:3]]
    return [f"- peak memory, eager over ours: {', '.join(few)}"] if few else []


def worst_plan(document: Document) -> list[str]:
    """The largest errors of the model."""
    return [
        f"- plan, {name}: off by {s['worst']:.2f}x on {s['worst_shape']}, besides the common "
        f"factor {s['factor']:.2f}"
        for name, s in plan.summarize(document["rows"]).items()
    ]


def worst_paper(document: Document) -> list[str]:
    """Where a Ghost module gains least over the convolution that it replaces."""
    lines = sorted(paper.summarize_speedup(document["rows"]), key=lambda line: line["ours"])
    few = [
        f"k={p['k']} s={p['s']} d={p['d']} {_times(p['ours'])} (by FLOPs {p['theory']:.2f}x)"
        for p in lines[:3]
    ]
    return [f"- Ghost module over plain convolution: {', '.join(few)}"] if few else []


def module_section(document: Document) -> list[str]:
    """Geometric means, every shape, saved memory, call overhead."""
    lines: list[str] = []
    for (mode, batch, group), rows in _grouped(document).items():
        summary = report.summarize(rows)
        lines += [f"### {group}, {mode}, batch {batch}", ""]
        means = [
            (name, f"{value:.2f}", _ms(summary["network_ms"].get(name)))
            for name, value in summary["floors"].items()
        ]
        title = f"time in floors (geometric mean, {summary['shapes']} shapes)"
        lines += table(("provider", title, "all modules, ms"), means)
        ratios = [
            (name, _times(value), "{:.2f} to {:.2f}".format(*summary["range"][name]))
            for name, value in summary["speedup"].items()
        ]
        lines += table(("ratio", "geometric mean", "p20 / p80 to p80 / p20"), ratios)
        lines += [f"Median spread (p80 - p20) / median: {summary['spread']:.1%}.", ""]
        lines += table(
            ("shape", "bound", "floor, us", "eager, us", "best peer, us", "by", "ours, us",
             "by", "floors", "over eager", "over best"),
            [_shape_line(shape, cell) for shape, cell in report.by_shape(rows).items()],
        )  # fmt: skip
    lines += _saved(document["rows"]) + _overhead(document["rows"])
    return lines + _notes(document["rows"])


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _us(row: report.Row | None) -> str:
    return "" if row is None else f"{1e6 * row['median_s']:.1f}"


def _shape_line(shape: str, cell: Mapping[str, report.Row]) -> list[str]:
    first = next(iter(cell.values()))
    eager, ours = cell.get(BASELINE), report.fastest(cell, "ours")
    best = report.fastest(cell, "pytorch", "engine")

    def ratio(other: report.Row | None) -> str:
        return _times(other["median_s"] / ours["median_s"] if other and ours else None)

    return [
        shape, first["bound"], f"{1e6 * first['floor_s']:.1f}", _us(eager), _us(best),
        best["provider"] if best else "", _us(ours), ours["provider"] if ours else "",
        f"{ours['floors']:.2f}" if ours else "", ratio(eager), ratio(best),
    ]  # fmt: skip


def _saved(rows: Sequence[report.Row]) -> list[str]:
    cells: dict[tuple[str, int], dict[str, report.Row]] = {}
    for row in rows:
        if row["mode"] == "saved":
            cells.setdefault((row["shape"], row["batch"]), {})[row["provider"]] = row
    if not cells:
        return []
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell))
    lines = ["### Saved between forward and backward, MiB", ""]
    body = [
        [f"{shape}, batch {batch}"]
        + [f"{cell[n]['saved_total'] / 2**20:.2f}" if n in cell else "" for n in names]
        for (shape, batch), cell in cells.items()
    ]
    total = {
        n: sum(c[n]["count"] * c[n]["saved_total"] for c in cells.values() if n in c) for n in names
    }
    body.append(
        ["all modules, as often as they occur", *(f"{total[n] / 2**20:.1f}" for n in names)]
    )
    return lines + table(("shape", *names), body)


def _overhead(rows: Sequence[report.Row]) -> list[str]:
    found = [r for r in report.timed(rows) if r["mode"] == "overhead"]
    if not found:
        return []
    lines = ["### Call overhead: x [1, 8, 4, 4], microseconds", ""]
    quantiles = ("median_s", "p20_s", "p80_s")
    body = [
        (f"{r['what']}, {r['provider']}", *(f"{1e6 * r[k]:.1f}" for k in quantiles)) for r in found
    ]
    return lines + table(("call", "median", "p20", "p80"), body)


def _notes(rows: Sequence[report.Row]) -> list[str]:
    found = dict.fromkeys(f"- {r['provider']}: {r['note']}" for r in rows if r.get("note"))
    return ["Not timed:", "", *found, ""] if found else []


def network_section(document: Document) -> list[str]:
    """Times and bytes of whole networks."""
    lines: list[str] = []
    times = [r for r in document["rows"] if r.get("median_s") is not None]
    if times:
        body = [
            (f"{r['mode']}, batch {r['batch']}, {r['threads']} thread(s), {r['provider']}",
             *(f"{1e3 * r[k]:.2f}" for k in ("median_s", "p20_s", "p80_s")), _times(r["speedup"]))
            for r in times
        ]  # fmt: skip
        lines += table(("what", "ms", "p20", "p80", f"{BASELINE} over it"), body)
    saved = [r for r in document["rows"] if r["mode"] == "saved"]
    if saved:
        body = [
            (f"batch {r['batch']}, {r['provider']}", f"{r['bytes'] / 2**20:.1f}",
             f"{r['share']:.0%}")
            for r in saved
        ]  # fmt: skip
        lines += table(("saved for backward", "MiB", f"of {BASELINE}"), body)
    return lines


def scaling_section(document: Document) -> list[str]:
    """One line per point."""
    body = [
        (f"{p['axis']} {p['value']} (batch {p['batch']})",
         *(f"{p[k]:.1f}" for k in ("eager_us", "best_us", "ours_us")), f"{p['floors']:.2f}",
         _times(p["over_eager"]), _times(p["over_best"]))
        for p in scaling.summarize(document["rows"])
    ]  # fmt: skip
    headings = ("point", "eager, us an image", "best PyTorch", "ours", "ours, floors", "over eager",
                "over best")  # fmt: skip
    return table(headings, body)


def memory_section(document: Document) -> list[str]:
    """Peak and saved bytes."""
    body = [
        (f"{p['shape']}, batch {p['batch']}",
         *(f"{p[k] / 2**20:.2f}" for k in ("eager_peak_bytes", "ours_peak_bytes")),
         _times(p["peak_bytes_ratio"]),
         *(f"{p[k] / 2**20:.2f}" for k in ("eager_saved_total", "ours_saved_total")),
         _times(p["saved_total_ratio"]))
        for p in memory.summarize(document["rows"])
    ]  # fmt: skip
    headings = ("training step", "peak, MiB: eager", "ours", "eager / ours", "saved, MiB: eager",
                "ours", "eager / ours")  # fmt: skip
    return table(headings, body)


def plan_section(document: Document) -> list[str]:
    """How well the model predicts."""
    body = [
        (name, s["shapes"], f"{s['factor']:.2f}", f"{s['error']:.0%}",
         f"{s['worst']:.2f}x ({s['worst_shape']})", "" if s["rank"] is None else f"{s['rank']:.3f}")
        for name, s in plan.summarize(document["rows"]).items()
    ]  # fmt: skip
    headings = ("provider, batch", "shapes", "measured / predicted (geometric mean)",
                "median error without that factor", "worst", "rank correlation")  # fmt: skip
    return table(headings, body)


def paper_section(document: Document) -> list[str]:
    """Speed-up by FLOPs and measured; maps from other maps."""
    lines: list[str] = []
    body = [
        (f"k={p['k']} s={p['s']} d={p['d']}", f"{p['theory']:.2f}x", _times(p["pytorch"]),
         _times(p["ours"]))
        for p in paper.summarize_speedup(document["rows"])
    ]  # fmt: skip
    if body:
        lines += ["### Times faster than the convolution replaced (64 to 128 channels at 28)", ""]
        lines += table(("Ghost module", "r_s by FLOPs", "PyTorch's, measured", "ours"), body)
    found = [r for r in document["rows"] if r["mode"] == "redundancy"]
    if found:
        lines += ["### A map from the best other map by one d x d convolution", ""]
        lines += table(
            ("maps, source", "d", "MSE", "MSE / mean square (median map)"),
            [
                (f"{r['shape']}, {r['provider']}", r["d"], f"{r['mse']:.4f}",
                 f"{r['relative']:.3f}")
                for r in found
            ],
        )  # fmt: skip
        lines += [
            f"Plain CNN on digits, test accuracy {found[0]['accuracy']:.1%}; filters fitted on "
            "half of the images, errors on the other half.",
            "",
        ]
    return lines


WORST: dict[str, Callable[[Document], list[str]]] = {
    "module": worst_module,
    "scaling": worst_scaling,
    "memory": worst_memory,
    "plan": worst_plan,
    "paper": worst_paper,
}
SECTIONS: dict[str, Callable[[Document], list[str]]] = {
    "module": module_section,
    "network": network_section,
    "scaling": scaling_section,
    "memory": memory_section,
    "plan": plan_section,
    "paper": paper_section,
}


def _machine(documents: Mapping[str, Document]) -> list[str]:
    metas = [document["meta"] for document in documents.values()]
    lines = []
    for key in ("cpu", "torch", "python", "commit", "threads", "clock"):
        found = dict.fromkeys(str(meta.get(key, "unknown")) for meta in metas)
        lines.append(f"- {key}: {'; '.join(found)}")
    dates = sorted(meta["date"] for meta in metas)
    lines.append(f"- measured from {dates[0]} to {dates[-1]} (UTC)")
    loads = [meta["load_average"] for meta in metas if meta.get("load_average") is not None]
    if loads:
        lines.append(
            f"- load average when the scripts started: {min(loads):.1f} to {max(loads):.1f}"
        )
    return [*lines, ""]


def render(documents: Mapping[str, Document], pictures: Mapping[str, Sequence[str]]) -> str:
    """The page.

    Args:
        documents: question -> results.
        pictures: question -> file names of its pictures, relative to the page.
    """
    lines = ["# Benchmark report", "", *_machine(documents), "## Worst cases first", ""]
    for name, document in documents.items():
        lines += WORST.get(name, lambda _: [])(document)
    lines += [
        "",
        "Times are medians of interleaved rounds, checked against float64 first. Floor = max(bytes "
        "/ bandwidth, FLOPs / GEMM peak), both measured in the same run. Ratios below 1 (losses) "
        "are bold.",
        "",
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
    target.write_text(render(documents, pictures))
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
