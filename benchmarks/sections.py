"""The sections of the report page: worst cases and tables of each question, as Markdown lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import memory, network, paper, plan, product, report, scaling
from benchmarks.providers import BASELINE

Document = Mapping[str, Any]


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


def worst_network(document: Document) -> list[str]:
    """The networks where ours is slower than the best of all peers, or gains least."""
    lines = [line for line in network.summarize(document["rows"]) if line["mode"] != "saved"]
    lines.sort(key=lambda line: line["over_best"])
    slower = sum(line["over_best"] < 1.0 for line in lines)
    few = ", ".join(
        f"{p['shape']}, {p['mode']}, batch {p['batch']} {_times(p['over_best'])} ({p['by']})"
        for p in lines[: max(3, slower)]
    )
    return [f"- networks: slower than the best peer in {slower} of {len(lines)} cases; worst: {few}"
            ] if lines else []  # fmt: skip


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


def worst_product(document: Document) -> list[str]:
    """The products of ours that stay furthest below the GEMM peak, K from ``product.DEEP`` on."""
    lines = []
    for (batch, provider), rows in product.deep(document["rows"]).items():
        if report.family(provider) == "ours":
            shares = sorted((product.share(row)[0], row["shape"]) for row in rows)
            few = ", ".join(f"{shape} {share:.0%}" for share, shape in shares[:3])
            lines.append(f"- product, {provider}, batch {batch}, of the GEMM peak: {few}")
    return lines


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
            (name, f"{value:.2f}", _range(summary["floors_range"][name]),
             _ms(summary["network_ms"].get(name)))
            for name, value in summary["floors"].items()
        ]  # fmt: skip
        title = f"time in floors (geometric mean, {summary['shapes']} shapes)"
        lines += table(("provider", title, "p20 to p80", "all modules, ms"), means)
        ratios = [
            (name, _times(value), _range(summary["speedup_range"][name]))
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


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


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
    body += [
        [f"all {group} modules, as often as they occur"]
        + [f"{total[n] / 2**20:.1f}" if n in total else "" for n in names]
        for group, total in report.saved_totals(rows).items()
    ]
    return lines + table(("shape", *names), body)


def _overhead(rows: Sequence[report.Row]) -> list[str]:
    found = [r for r in report.timed(rows) if r["mode"] == "overhead"]
    if not found:
        return []
    lines = ["### Call overhead: x [1, 8, 4, 4], microseconds", ""]
    body = [
        (f"{r['what']}, {r['provider']}", *(f"{1e6 * r[k]:.1f}" for k in report.QUANTILES))
        for r in found
    ]
    return lines + table(("call", "median", "p20", "p80"), body)


def _notes(rows: Sequence[report.Row]) -> list[str]:
    found = dict.fromkeys(f"- {r['provider']}: {r['note']}" for r in rows if r.get("note"))
    return ["Not timed:", "", *found, ""] if found else []


def network_section(document: Document) -> list[str]:
    """Ours against eager and the best peer, bytes, then every time."""
    lines: list[str] = []
    summary = network.summarize(document["rows"])
    times = [line for line in summary if line["mode"] != "saved"]
    if times:
        body = [
            (f"{p['shape']}, {p['mode']}, batch {p['batch']}, {p['threads']} thread(s)",
             f"{p['eager']:.2f}", f"{p['best']:.2f}", p["by"], f"{p['ours']:.2f}", p["with"],
             _times(p["over_eager"]), _times(p["over_best"]))
            for p in times
        ]  # fmt: skip
        headings = ("network", "eager, ms", "best peer, ms", "by", "ours, ms", "by", "over eager",
                    "over best")  # fmt: skip
        lines += table(headings, body)
    saved = [line for line in summary if line["mode"] == "saved"]
    if saved:
        body = [
            (f"{p['shape']}, batch {p['batch']}", f"{p['eager']:.1f}", f"{p['ours']:.1f}",
             _times(p["over_eager"]))
            for p in saved
        ]  # fmt: skip
        headings = ("saved for backward", "eager, MiB", "ours, MiB", "eager / ours")
        lines += table(headings, body)
    body = [
        (f"{r['shape']}, {r['mode']}, batch {r['batch']}, {r['provider']}",
         *(f"{1e3 * r[key]:.2f}" for key in report.QUANTILES), f"{r['floors']:.1f}")
        for r in report.timed(document["rows"])
    ]  # fmt: skip
    lines += table(("every time", "ms", "p20", "p80", "floors"), body) if body else []
    return lines + _notes(document["rows"])


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


def product_section(document: Document) -> list[str]:
    """Every product: ours in both layouts and the best peer's."""
    rows = document["rows"]
    lines = ["Ours in NCHW, ours in NHWC, the best peer.", ""]
    return lines + table(product.HEADINGS, product.table_lines(rows)) + _notes(rows)


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
    "network": worst_network,
    "scaling": worst_scaling,
    "memory": worst_memory,
    "plan": worst_plan,
    "product": worst_product,
    "paper": worst_paper,
}
SECTIONS: dict[str, Callable[[Document], list[str]]] = {
    "module": module_section,
    "network": network_section,
    "scaling": scaling_section,
    "memory": memory_section,
    "plan": plan_section,
    "product": product_section,
    "paper": paper_section,
}
