"""Tables and geometric means of ``gpu_report``'s rows, as Markdown text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report import by_shape, geometric_mean

Row = Mapping[str, Any]
Key = tuple[str, str, int, str]  # mode, dtype, batch, group
EAGER = ("eager_nchw", "eager_cl")
WHAT = "Microseconds of the device"
SHARES = ("share_of_copy", "share_of_largest_copy")


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """(mode, dtype, batch, network family) -> rows, in the order of the rows."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["dtype"], row["batch"], row["group"]), []).append(row)
    return groups


def is_ours(name: str) -> bool:
    return name.startswith(("native", "triton"))


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Geometric means over the shapes that both sides of a ratio ran.

    Returns:
        ``shapes``: how many shapes were timed; each of the others has our backends and layouts as
        keys.
        ``over_eager``: device time of the faster eager layout over ours;
        ``called_over_eager``: the same of calls from Python;
        ``over_compile``: the same over torch.compile, where it was timed;
        ``share_of_copy``: bytes per second (x and out once) over those of a copy as large;
        ``share_of_largest_copy``: over those of the largest copy;
        ``slower``: shapes where the faster of eager and torch.compile wins.
    """
    cells = by_shape(rows)
    ours = sorted({name for cell in cells.values() for name in cell if is_ours(name)})
    kinds = ("over_eager", "called_over_eager", "over_compile", *SHARES)
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    slower: dict[str, list[str]] = {name: [] for name in ours}
    for shape, cell in cells.items():
        for name in (name for name in ours if name in cell):
            mine = cell[name]
            values = {
                "over_eager": over(cell, EAGER, mine, "median_s"),
                "called_over_eager": over(cell, EAGER, mine, "call_s"),
                "over_compile": over(cell, ("compile_cl",), mine, "median_s"),
                **{share: mine[share] for share in SHARES},
            }
            for kind, value in values.items():
                if value is not None:
                    found[kind].setdefault(name, []).append(value)
            best = over(cell, (*EAGER, "compile_cl"), mine, "median_s")
            if best is not None and best < 1:
                slower[name].append(shape)
    means = {
        kind: {name: geometric_mean(values) for name, values in by_name.items()}
        for kind, by_name in found.items()
    }
    return {"shapes": len(cells), "slower": slower, **means}


def over(cell: Mapping[str, Row], names: Iterable[str], mine: Row, key: str) -> float | None:
    """The best of some providers' times over ours; None if none of them was timed."""
    best = min((cell[name][key] for name in names if name in cell), default=None)
    return None if best is None else best / mine[key]


def table(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    cells = ([str(cell).replace("|", "/") for cell in line] for line in lines)
    rows = [list(headings), ["---"] * len(headings), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def time_table(rows: Sequence[Row]) -> str:
    """One line a shape: microseconds of every provider, and our fastest against the others."""
    cells = by_shape(rows)
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for shape, cell in cells.items():
        line: list[object] = [shape]
        line += [f"{1e6 * cell[n]['median_s']:.1f}" if n in cell else "" for n in names]
        ours = [row for name, row in cell.items() if is_ours(name)]
        mine = min(ours, key=lambda row: row["median_s"], default=None)
        ratios = [None, None]
        if mine is not None:
            ratios = [over(cell, n, mine, "median_s") for n in (EAGER, ("compile_cl",))]
        line += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        line.append("" if mine is None else f"{mine['share_of_copy']:.0%}")
        lines.append(line)
    return table(["shape", *names, "x eager", "x compile", "of copy"], lines)


def memory_table(rows: Sequence[Row]) -> str:
    """One line a shape: MiB kept for backward and at the peak."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(row["shape"], {})[row["provider"]] = row

    def mib(row: Row | None, key: str) -> str:
        return f"{row[key] / 2**20:.1f}" if row is not None and key in row else ""

    lines = [
        [shape, *(mib(cell.get(n), key) for n in names for key in ("kept", "peak"))]
        for shape, cell in cells.items()
    ]
    headings = [f"{name} {key}" for name in names for key in ("kept", "peak")]
    return table(["shape", *headings], lines)


def memory_means(rows: Sequence[Row]) -> str:
    """What ours keep for backward, as a share of what eager keeps."""
    kept: dict[str, dict[str, int]] = {}
    for row in rows:
        if "kept" in row:
            kept.setdefault(row["provider"], {})[row["shape"]] = row["kept"]
    eager, lines = kept.get("eager_cl", {}), []
    for name in filter(is_ours, kept):
        shares = [v / eager[s] for s, v in kept[name].items() if eager.get(s, 0) > 0]
        if shares:
            mean = sum(shares) / len(shares)
            lines.append(
                f"- {name} keeps {mean:.0%} of what eager_cl keeps for backward (mean over "
                f"{len(shares)} shapes), {max(shares):.0%} at most"
            )
    return "\n".join(lines)


def means(summary: Mapping[str, Any]) -> str:
    """The geometric means, one line each."""
    lines = [f"Geometric means over {summary['shapes']} shapes:", ""]
    for name, share in summary["share_of_copy"].items():
        parts = []
        if name in summary["over_eager"]:
            called = summary["called_over_eager"][name]
            parts.append(
                f"{summary['over_eager'][name]:.2f}x the faster eager layout (calls from Python "
                f"{called:.2f}x)"
            )
        if name in summary["over_compile"]:
            parts.append(f"{summary['over_compile'][name]:.2f}x torch.compile")
        parts.append(
            f"{share:.0%} of a device copy as large, {summary['share_of_largest_copy'][name]:.0%} "
            "of the largest"
        )
        slower = ", ".join(summary["slower"][name]) or "none"
        lines.append(f"- {name}: {', '.join(parts)}; slower than PyTorch at its best: {slower}")
    return "\n".join(lines if len(lines) > 2 else [])


def notes(rows: Iterable[Row]) -> list[str]:
    """What was not timed, each reason once."""
    found: dict[str, int] = {}
    for row in rows:
        if "note" in row:
            key = f"{row['mode']} {row['dtype']} {row['provider']}: {row['note']}"
            found[key] = found.get(key, 0) + 1
    return [f"{key} ({count} rows)" for key, count in found.items()]


def render(document: Mapping[str, Any]) -> str:
    """The whole report."""
    meta, parts, rows = document["meta"], document["parts"], document["rows"]
    lines = ["# GPU report", ""]
    if meta.get("synthetic"):
        lines += [f"**Not a measurement: {meta['synthetic']}**", ""]
    lines += [f"- {key}: {value}" for key, value in meta.items() if not isinstance(value, dict)]
    lines += ["", "## Parts", ""]
    lines.append(
        table(
            ("part", "status", "seconds", "result"),
            ([name, p["status"], f"{p['seconds']:.0f}", p["summary"]] for name, p in parts.items()),
        )
    )
    for (mode, dtype, batch, group), part in grouped(rows).items():
        lines += ["", f"## {mode}, {dtype}, batch {batch}, {group}", ""]
        if mode == "memory":
            lines.append("MiB of device memory in training, x and parameters aside.")
            lines += ["", memory_table(part), "", memory_means(part)]
            continue
        lines += [f"{WHAT}, medians.", "", time_table(part), "", means(summarize(part))]
        if late := sum(row.get("queued_ahead") is False for row in part):
            lines.append(f"- of {late} rows the device time holds some of the host's")
    if left := notes(rows):
        lines += ["", "## Not timed", "", *(f"- {note}" for note in left)]
    return "\n".join(lines) + "\n"
