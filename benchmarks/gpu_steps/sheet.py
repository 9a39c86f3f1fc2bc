"""The results of ``benchmarks/gpu.py``: a file of JSON lines, one row appended as it is measured;
and the table at the end, at most 60 lines, made from the rows alone.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.harness.rows import split

Row = Mapping[str, Any]
SHAPES_SHOWN = {"eval": 10, "train": 3}  # of a group, slowest against eager first; else one
KEY = ("step", "case", "provider", "dtype", "layout", "batch", "mode")


def write_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row to a results file; numbers are cut to six digits."""
    short = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
    with path.open("a") as file:
        file.write(json.dumps(short) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; an unfinished last line is left out."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


@dataclass
class Sheet:
    """What a step is given: the results file and what stands in it already.

    With ``resume``, rows that the file holds already are not measured again, if their run had the
    same ``machine`` (device and torch); ours only if their digest is the same. ``common`` are
    fields of every row: digest of our sources, whether ``_C`` was there, the run. ``predicted`` are
    microseconds by mode, dtype, batch and shape, as the plan has them.
    """

    path: Path
    step: str
    common: Mapping[str, Any]
    predicted: Mapping[str, float]
    resume: bool = False
    machine: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        rows = read_rows(self.path) if self.resume else []
        runs = {r["run"] for r in rows if (r.get("device"), r.get("torch")) == self.machine}
        self.known = {self.key(row) for row in rows if "us" in row and row["run"] in runs}

    def key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        ours = str(row.get("provider")).startswith(("ours", "triton"))
        return (*(row.get(name) for name in KEY), row.get("digest") if ours else None)

    def wants(self, row: Mapping[str, Any]) -> bool:
        """Whether a row with these fields is still to be measured."""
        return self.key({**row, "step": self.step, **self.common}) not in self.known

    def add(self, row: Mapping[str, Any], timed: Mapping[str, Any] | None = None) -> None:
        """Append a row, with its times if it has any."""
        write_row(self.path, {"step": self.step, **row, **(timed or {}), **self.common})


def module_lines(rows: Sequence[Row], copy: float | None) -> list[str]:
    """A group of module rows: geometric means, then its shapes, slowest against eager first."""
    lines, ratios, shares = [], [], []
    for (case,), cell in split((row for row in rows if "us" in row), "case").items():
        eager = [row["us"] for row in cell if row["provider"].startswith("eager")]
        ours = [row for row in cell if row["provider"].startswith("ours")]
        if not eager or not ours:
            continue
        mine = min(ours, key=lambda row: row["us"])
        ratio = min(eager) / mine["us"]
        line = f"  {case:18} eager {min(eager):8.1f}  ours {mine['us']:7.1f} us  {ratio:5.2f}x"
        if copy:
            shares.append(mine["gbytes_per_s"] * 1e9 / copy)
            line += f"  {mine['gbytes_per_s']:5.0f} GB/s {shares[-1]:4.0%}"
        if mine.get("predicted_us"):
            line += f"  plan {mine['predicted_us']:6.1f}"
        line += "".join(f"  triton {r['us']:.1f}" for r in cell if r["provider"] == "triton")
        ratios.append(ratio)
        lines.append((ratio, line))
    if not ratios:
        return []
    first = rows[0]
    layout = "nchw" if mine["layout"] == "nchw" else ""
    words = (first["step"], first["mode"], first["dtype"], layout, f"batch {first['batch']}")
    head = " ".join(filter(None, words))
    head += f": {geometric_mean(ratios):.2f}x the faster eager layout over {len(ratios)} shapes"
    head += f", {geometric_mean(shares):.0%} of the copy" if shares else ""
    head += f", {sum(ratio < 1 for ratio in ratios)} slower"
    return [head, *(line for _, line in sorted(lines)[: SHAPES_SHOWN.get(first["step"], 1)])]


def network_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each network and provider; in brackets the same inside a CUDA graph."""
    names = ("case", "mode", "dtype", "batch", "provider")
    graphs = {tuple(r[k] for k in names): r for r in rows if r["provider"].endswith("+graph")}
    lines = []
    for row in rows:
        if row["provider"].endswith("+graph"):
            continue
        graph = graphs.get((*(row[k] for k in names[:-1]), f"{row['provider']}+graph"))
        us = f"({graph['us']:.0f}) " if graph else ""
        rate = f"({graph['images_per_s']:.0f}) " if graph else ""
        line = (
            f"{row['case']:18} {row['mode']:5} {row['dtype']:16} b{row['batch']:<3} "
            f"{row['provider']:12} {row['us']:6.0f} {us}us, {row['images_per_s']:.0f} {rate}img/s, "
            f"{row['launches']} launches, peak {row['peak_mib']:.0f} MiB"
        )
        lines.append(line + (f", kept {row['kept_mib']:.0f}" if "kept_mib" in row else ""))
    return lines


def other_line(row: Row) -> str | None:
    """A profiled kernel or a test run, in a line."""
    if "kernel" in row:
        stalls = ", ".join(f"{k} {v:.1f}" for k, v in list(row["stalls"].items())[:3])
        return (
            f"ncu {row['kernel']:29} {row['ncu_us']:6.1f} us, DRAM {row['dram_share']:.0f}%, issue "
            f"{row['issue_share']:.0f}%, warps {row['occupancy']:.0f}%; stalls {stalls}"
        )
    if "passed" in row:
        return f"{row['case']}: {row['passed']} passed, {row['failed']} failed {row['failures']}"
    return f"{row['case']}: {row['right']}, {row['summary']}" if "summary" in row else None


def render(rows: Sequence[Row]) -> str:
    """The whole table."""
    lines = []
    metas = [row for row in rows if row.get("step") == "meta"]
    if metas:
        m = metas[-1]
        without = sum(row.get("native_module") is False for row in rows)
        lines.append(
            f"{m['device']}, torch {m['torch']}, CUDA {m['cuda']}, commit {m['commit']}; "
            f"{without} rows without ghost_ops._C"
        )
    # The last row of each key: the file of a resumed run holds older ones too.
    measured = [row for row in rows if row.get("step") != "meta"]
    rows = list({tuple(row.get(name) for name in KEY): row for row in measured}.values())
    copy = next((row["copy_bytes_per_s"] for row in rows if "copy_bytes_per_s" in row), None)
    if copy:
        lines.append(f"device copy {copy / 1e9:.0f} GB/s, bytes read and written")
    first = ["note" in row for row in rows if row.get("step") == "correct" and "case" in row]
    if first:
        lines.append(f"first checks: {first.count(False)} right, {first.count(True)} wrong")
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if "bytes" in row and row["step"] != "correct":
            # NCHW beside channels_last is a candidate of one group, alone it is a group.
            alone = row["step"] == "more" and row["layout"] == "nchw" and row["provider"] == "ours"
            groups[row["step"], row["mode"], row["dtype"], row["batch"], alone].append(row)
    for (*key, alone), group in groups.items():
        if alone:
            group += [r for r in groups[(*key, False)] if r["provider"] == "eager"]
        lines += module_lines(group, copy)
    lines += network_lines([row for row in rows if "images_per_s" in row])
    lines += filter(None, map(other_line, rows))
    notes: Counter[str] = Counter()
    for row in rows:
        if "note" in row and "passed" not in row:
            where = " ".join(str(row[name]) for name in ("step", "provider") if name in row)
            notes[f"NOT MEASURED {where}: {row['note'][:150]}"] += 1
    lines += [line + (f" ({count} rows)" if count > 1 else "") for line, count in notes.items()]
    return "\n".join(lines)
