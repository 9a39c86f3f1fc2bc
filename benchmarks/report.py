"""Summaries and console tables of rows: geometric means, worst cases first, losses flagged."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.extras import require
from benchmarks.providers import BASELINE, ENGINE_FAMILIES

Row = Mapping[str, Any]
FUSED = ("fused_nchw", "fused_cl")
TABLE_WIDTH = 130


def timed(rows: Iterable[Row]) -> list[Row]:
    """Rows that passed their check and were timed."""
    return [row for row in rows if row.get("median_s") is not None]


def by_shape(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """shape name -> provider name -> timed row, in the order of the rows."""
    table: dict[str, dict[str, Row]] = {}
    for row in timed(rows):
        table.setdefault(row["shape"], {})[row["provider"]] = row
    return table


def family(name: str) -> str:
    """``ours``, ``engine`` (outside PyTorch) or ``pytorch``, from a provider's name."""
    if name.startswith("fused_"):
        return "ours"
    return "engine" if name.startswith(ENGINE_FAMILIES) else "pytorch"


def fastest(cell: Mapping[str, Row], *families: str) -> Row | None:
    """The fastest row of one shape among the families named; None if there is none."""
    rows = [row for name, row in cell.items() if family(name) in families]
    return min(rows, key=lambda row: row["median_s"], default=None)


def geometric_mean(values: Sequence[float]) -> float | None:
    """Geometric mean, None without values."""
    return statistics.geometric_mean(values) if values else None


QUANTILES = ("median_s", "p20_s", "p80_s")


def ratio(other: Row, ours: Row) -> tuple[float, float, float]:
    """other / ours of the medians, then from p20 / p80 to p80 / p20: what noise could make it."""
    return (
        other["median_s"] / ours["median_s"],
        other["p20_s"] / ours["p80_s"],
        other["p80_s"] / ours["p20_s"],
    )


def spread(rows: Iterable[Row]) -> float | None:
    """Median of (p80 - p20) / median over the timed rows; None without any."""
    found = [(row["p80_s"] - row["p20_s"]) / row["median_s"] for row in timed(rows)]
    return statistics.median(found) if found else None


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Summary of one mode, batch and group.

    Returns:
        ``floors``: provider -> geometric mean of time / floor over the shapes it ran,
        ``best_pytorch``, ``best_engine`` and ``fused_best`` taken shape by shape;
        ``speedup``: geometric means of the others' times over ours;
        ``floors_range``, ``speedup_range``: for each of them from where to where the machine's
        noise could have moved it (see :func:`ratio`), and of how many shapes it is the mean;
        ``worst``: the three smallest ratios of the best PyTorch time to ours;
        ``slower``: shapes where ours loses to the best PyTorch;
        ``network_ms``: sum over the network's modules, each as often as it occurs.
    """
    cells = by_shape(rows)
    floors: dict[str, list[tuple[float, float, float]]] = {}
    ratios: dict[str, list[tuple[float, float, float]]] = {}
    network: dict[str, float] = {}
    versus: list[tuple[float, str, str, str]] = []

    def note(name: str, row: Row) -> None:
        low, high = (row["floors"] * row[key] / row["median_s"] for key in ("p20_s", "p80_s"))
        floors.setdefault(name, []).append((row["floors"], low, high))
        network[name] = network.get(name, 0.0) + 1e3 * row["count"] * row["median_s"]

    def compare(name: str, other: Row, ours: Row) -> None:
        ratios.setdefault(name, []).append(ratio(other, ours))

    for shape, cell in cells.items():
        for name, row in cell.items():
            note(name, row)
        best, engine = fastest(cell, "pytorch"), fastest(cell, "engine")
        ours = fastest(cell, "ours")
        if best is not None:
            note("best_pytorch", best)
        if engine is not None:
            note("best_engine", engine)
        if ours is None:
            continue
        note("fused_best", ours)
        for name, other in cell.items():
            if family(name) != "ours":
                compare(f"fused_best over {name}", other, ours)
        for layout in ("nchw", "cl"):
            if f"fused_{layout}" in cell and f"eager_{layout}" in cell:
                pair = cell[f"eager_{layout}"], cell[f"fused_{layout}"]
                compare(f"fused_{layout} over eager_{layout}", *pair)
        if engine is not None:
            compare("fused_best over best_engine", engine, ours)
        if best is not None:
            compare("fused_best over best_pytorch", best, ours)
            versus.append((ratio(best, ours)[0], shape, best["provider"], ours["provider"]))
    versus.sort()
    complete = {name for name, values in floors.items() if len(values) == len(cells)}

    def means(
        found: Mapping[str, Sequence[tuple[float, float, float]]], what: str
    ) -> dict[str, Any]:
        ends = {
            name: [geometric_mean(c) for c in zip(*v, strict=True)] for name, v in found.items()
        }
        return {
            what: {name: mean for name, (mean, _, _) in ends.items()},
            f"{what}_range": {
                name: [low, high, len(found[name])] for name, (_, low, high) in ends.items()
            },
        }

    return {
        "shapes": len(cells),
        **means(floors, "floors"),
        **means(ratios, "speedup"),
        "network_ms": {name: value for name, value in network.items() if name in complete},
        "worst": [
            dict(zip(("ratio", "shape", "best", "ours"), v, strict=True)) for v in versus[:3]
        ],
        "slower": [v[1] for v in versus if v[0] < 1.0],
        "spread": spread(rows),
    }


def groups(rows: Iterable[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """(mode, batch, network family) -> rows, in the order of the rows."""
    grouped: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["mode"], row["batch"], row["group"]), []).append(row)
    return grouped


def print_summary(console: Any, title: str, summary: Mapping[str, Any]) -> None:
    """Worst cases first, then the geometric means."""
    console.print(f"\n[bold]{title}[/]: geometric means over {summary['shapes']} shapes")
    for case in summary["worst"]:
        flag = "[red]slower[/]" if case["ratio"] < 1.0 else "worst"
        console.print(
            f"  {flag}: {case['shape']}: {case['ratio']:.2f}x the best PyTorch ({case['best']}) "
            f"with {case['ours']}"
        )
    if summary["worst"]:
        count = len(summary["slower"])
        console.print(f"  slower than the best PyTorch: {count} of {summary['shapes']} shapes")
    headings = ("provider", "floors", "p20 to p80", "all modules, ms")
    table = plain_table(None, headings)
    for name, value in summary["floors"].items():
        total = summary["network_ms"].get(name)
        ends = "{:.2f} to {:.2f}".format(*summary["floors_range"][name])
        table.add_row(name, f"{value:.2f}", ends, "" if total is None else f"{total:.2f}")
    console.print(table)
    for name, value in summary["speedup"].items():
        low, high, _ = summary["speedup_range"][name]
        console.print(f"  {name}: {value:.2f}x ({low:.2f} to {high:.2f})")
    if summary["spread"] is not None:
        console.print(f"  median spread (p80 - p20) / median: {summary['spread']:.1%}")


def console_for_tables(*, extra: str = "bench") -> Any:
    """A console; wide enough for the tables where the output is no terminal with its own width."""
    console = require("rich.console", "console tables", extra=extra).Console(highlight=False)
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    return console


def plain_table(title: str | None, headings: Sequence[str], *, text: Sequence[str] = ()) -> Any:
    """A table of numbers: every column right-aligned but the first and those named in ``text``."""
    table = require("rich.table", "console tables").Table(
        title=title,
        title_justify="left",
        box=require("rich.box", "console tables").SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(headings):
        left = index == 0 or heading in text
        table.add_column(heading, no_wrap=True, justify="left" if left else "right")
    return table


def print_shapes(console: Any, title: str, rows: Sequence[Row]) -> None:
    """One line per shape: times in microseconds, multiples of the floor, ratios, our error."""
    headings = (
        "shape", "floor", "bound", "eager", "best", "by", "ours NCHW", "NHWC",
        "floors: eager", "best", "ours", "x eager", "x best", "error",
    )  # fmt: skip
    table = plain_table(f"{title}, microseconds", headings, text=("bound", "by"))

    def us(row: Row | None) -> str:
        return "" if row is None else f"{1e6 * row['median_s']:.0f}"

    for shape, cell in by_shape(rows).items():
        best, ours = fastest(cell, "pytorch", "engine"), fastest(cell, "ours")
        eager = cell.get(BASELINE)
        any_row = next(iter(cell.values()))
        ratio_eager = eager["median_s"] / ours["median_s"] if eager and ours else None
        ratio_best = best["median_s"] / ours["median_s"] if best and ours else None
        table.add_row(
            shape,
            f"{1e6 * any_row['floor_s']:.0f}",
            any_row["bound"],
            us(eager),
            us(best),
            best["provider"] if best else "",
            *(us(cell.get(name)) for name in FUSED),
            *("" if row is None else f"{row['floors']:.2f}" for row in (eager, best, ours)),
            "" if ratio_eager is None else flag(ratio_eager),
            "" if ratio_best is None else flag(ratio_best),
            "" if ours is None else f"{ours['error']:.0e}",
        )
    console.print(table)
    for row in rows:
        if row.get("median_s") is None:
            note = escape(row["note"])
            console.print(f"  [yellow]{row['shape']} {row['provider']}: {note}[/]")


def escape(text: str) -> str:
    """``text`` as a console prints it to the letter, though it has brackets."""
    return require("rich.markup", "console tables").escape(text)


def flag(ratio: float) -> str:
    """A ratio; losses in red."""
    return f"[red]{ratio:.2f}[/]" if ratio < 1.0 else f"{ratio:.2f}"


def saved_totals(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Network family -> provider -> bytes that its modules save, each as often as it occurs."""
    totals: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["mode"] == "saved":
            total = totals.setdefault(row["group"], {})
            name = row["provider"]
            total[name] = total.get(name, 0) + row["count"] * row["saved_total"]
    return totals


def print_saved(console: Any, rows: Sequence[Row]) -> None:
    """Saved activation bytes, eager against fused, and the contract."""
    headings = (
        "shape", "batch", "x, MiB", "eager", "ours NCHW", "ours NHWC", "allowed", "contract",
    )  # fmt: skip
    table = plain_table("Saved for backward, in multiples of x (parameters aside)", headings)
    broken = 0
    by_key: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        by_key.setdefault((row["shape"], row["batch"]), {})[row["provider"]] = row
    for (shape, batch), cell in by_key.items():
        row = next(iter(cell.values()))
        x = row["x_bytes"]
        fused = [cell[name] for name in FUSED if name in cell]
        kept = all(r["contract_ok"] for r in fused)
        broken += not kept
        table.add_row(
            shape,
            str(batch),
            f"{x / 2**20:.2f}",
            *(f"{cell[n]['saved_maps'] / x:.2f}" if n in cell else "" for n in (BASELINE, *FUSED)),
            f"{row['allowed_maps'] / x:.2f}",
            ("kept" if kept else "[red]broken[/]") if fused else "",
        )
    console.print(table)
    for group, total in saved_totals(rows).items():
        sums = (f"{name} {nbytes / 2**20:.1f} MiB" for name, nbytes in total.items())
        console.print(f"  all {group} modules, as often as they occur: {', '.join(sums)}")
    console.print(f"  contract broken on {broken} of {len(by_key)} shapes")


def print_overhead(console: Any, rows: Sequence[Row]) -> None:
    """Call time on a tiny input, which is all overhead."""
    headings = ("what", "provider", "us", "p20", "p80", "x eager_nchw")
    table = plain_table("Call overhead, x [1, 8, 4, 4]", headings, text=("provider",))
    for row in timed(rows):
        base = next(
            (r for r in rows if r["what"] == row["what"] and r["provider"] == BASELINE), None
        )
        ratio = base["median_s"] / row["median_s"] if base else float("nan")
        table.add_row(
            row["what"],
            row["provider"],
            *(f"{1e6 * row[key]:.1f}" for key in ("median_s", "p20_s", "p80_s")),
            flag(ratio) if row["provider"] in FUSED else f"{ratio:.2f}",
        )
    console.print(table)
