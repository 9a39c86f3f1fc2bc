"""Tables and geometric means of ``gpu_report``'s rows, as Markdown text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report import by_shape, geometric_mean

Row = Mapping[str, Any]
Key = tuple[str, str, int, str]  # mode, dtype, batch, group
EAGER = ("eager_nchw", "eager_cl")


def grouped(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """(mode, dtype, batch, network family) -> rows, in the order of the rows."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["dtype"], row["batch"], row["group"]), []).append(row)
    return groups


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Geometric means over the shapes that both sides of a ratio ran.

    Returns:
        ``over_eager``: our backend and layout -> time of the faster eager layout over ours;
        ``over_compile``: the same over torch.compile, where it was timed;
        ``share_of_copy``: bytes per second (x and out once) over those of a device copy;
        ``slower``: shapes where the faster of eager and torch.compile beats our fastest;
        ``shapes``: how many shapes were timed.
    """
    cells = by_shape(rows)
    names = {name for cell in cells.values() for name in cell}
    ours = sorted(name for name in names if name.startswith(("native", "triton")))
    over_eager: dict[str, list[float]] = {}
    over_compile: dict[str, list[float]] = {}
    share: dict[str, list[float]] = {}
    slower = []
    for shape, cell in cells.items():
        times = {name: row["median_s"] for name, row in cell.items()}
        eager = min((times[name] for name in EAGER if name in times), default=None)
        compiled = times.get("compile_cl")
        for name in ours:
            if name not in times:
                continue
            if eager is not None:
                over_eager.setdefault(name, []).append(eager / times[name])
            if compiled is not None:
                over_compile.setdefault(name, []).append(compiled / times[name])
            share.setdefault(name, []).append(cell[name]["share_of_copy"])
        peers = [t for t in (eager, compiled) if t is not None]
        mine = [times[name] for name in ours if name in times]
        if peers and mine and min(peers) < min(mine):
            slower.append(shape)
    return {
        "shapes": len(cells),
        "over_eager": {k: geometric_mean(v) for k, v in over_eager.items()},
        "over_compile": {k: geometric_mean(v) for k, v in over_compile.items()},
        "share_of_copy": {k: geometric_mean(v) for k, v in share.items()},
        "slower": slower,
    }


def table(headings: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    rows = [list(headings), ["---"] * len(headings), *([str(c) for c in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def time_table(rows: Sequence[Row]) -> str:
    """One line a shape: microseconds of every provider, and our fastest against the others."""
    cells = by_shape(rows)
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = []
    for shape, cell in cells.items():
        times = {name: cell[name]["median_s"] for name in names if name in cell}
        mine = {n: t for n, t in times.items() if n.startswith(("native", "triton"))}
        best = min(mine, key=mine.__getitem__) if mine else None
        eager = min((times[n] for n in EAGER if n in times), default=None)
        line: list[object] = [shape]
        line += [f"{1e6 * times[name]:.1f}" if name in times else "" for name in names]
        if best is None:
            line += ["", "", ""]
        else:
            line.append("" if eager is None else f"{eager / mine[best]:.2f}")
            compiled = times.get("compile_cl")
            line.append("" if compiled is None else f"{compiled / mine[best]:.2f}")
            line.append(f"{cell[best]['share_of_copy']:.0%}")
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


def means(summary: Mapping[str, Any]) -> str:
    """The geometric means, one line each."""
    lines = [f"Geometric means over {summary['shapes']} shapes:", ""]
    for name, value in summary["over_eager"].items():
        text = f"- {name}: {value:.2f}x the faster eager layout"
        if (compiled := summary["over_compile"].get(name)) is not None:
            text += f", {compiled:.2f}x torch.compile"
        lines.append(text + f"; {summary['share_of_copy'][name]:.0%} of a device copy")
    slower = ", ".join(summary["slower"]) or "none"
    return "\n".join([*lines, f"- slower than PyTorch at its best: {slower}"])


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
            lines += ["", memory_table(part)]
            continue
        lines += ["Microseconds, medians.", "", time_table(part), "", means(summarize(part))]
    if left := notes(rows):
        lines += ["", "## Not timed", "", *(f"- {note}" for note in left)]
    return "\n".join(lines) + "\n"
