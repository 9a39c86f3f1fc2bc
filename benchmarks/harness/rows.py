"""Rows of results files: the fields they must have, and what is computed from several of them.

The spread of a ratio of two times runs from p20 / p80 to p80 / p20, that of a single time from its
p20 to its p80; of a geometric mean, the geometric means of both ends: how far the machine's noise
could have moved it. Bytes have no spread.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Cell = Mapping[str, Row]  # provider -> row
Triple = tuple[float, float, float]  # value, then the low and the high end of its spread

BASELINE = "eager_nchw"  # the provider that all others are compared with
ENGINE_FAMILIES = ("onnxruntime", "openvino")  # providers outside PyTorch
QUANTILES = ("median_s", "p20_s", "p80_s")
FUSED = ("fused_nchw", "fused_cl")
AGREE = 0.10  # two runs whose means differ by less agree

# Fields of every row, and further fields of a timed row.
ROW_FIELDS: dict[str, type] = {
    **dict.fromkeys(("question", "mode", "shape", "dtype", "layout", "provider"), str),
    **dict.fromkeys(("batch", "threads"), int),
}
TIMED_FIELDS: dict[str, type] = {
    **dict.fromkeys((*QUANTILES, "gbytes_per_s", "gflops", "floor_s", "floors"), float),
    **dict.fromkeys(("rounds", "repeats", "bytes", "flops"), int),
    "bound": str,
}
META_FIELDS = ("date", "command", "cpu", "cores", "torch", "python", "commit", "threads", "clock")


def check_row(row: Row) -> None:
    """Raise ValueError for a row that readers of the results could not use.

    A row without time says why in ``note`` or holds bytes instead.
    """
    fields = dict(ROW_FIELDS)
    if row.get("median_s") is not None:
        fields |= TIMED_FIELDS
    elif not {"note", "saved_total", "peak_bytes", "mse"} & set(row):
        raise ValueError(f"row without median_s, bytes or note: {dict(row)}")
    for name, kind in fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"row field {name!r}: expected {kind}, got {value!r} in {dict(row)}")
    if row.get("median_s") is not None and not row["p20_s"] <= row["median_s"] <= row["p80_s"]:
        raise ValueError(f"row quantiles out of order in {dict(row)}")


def check_document(document: Mapping[str, Any]) -> None:
    """Raise ValueError for a results file in which a part or a field is missing or wrong."""
    parts = {"meta", "rows", "question", "complete", "done"}
    if missing := (parts - document.keys()) or (set(META_FIELDS) - document["meta"].keys()):
        raise ValueError(f"results: no {', '.join(sorted(missing))}")
    for row in document["rows"]:
        check_row(row)


def load(path: Path) -> dict[str, Any]:
    """A results file; ValueError if it is none, OSError if it cannot be read."""
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a results file ({error})") from error
    if not isinstance(document, dict) or not {"meta", "rows"} <= document.keys():
        raise ValueError(f"{path}: not a results file (no meta and rows in it)")
    return document


def timed(rows: Iterable[Row]) -> list[Row]:
    """Rows that passed their check and were timed."""
    return [row for row in rows if row.get("median_s") is not None]


def split(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of ``keys``, in the order of the rows."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def cells(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Values of ``keys`` -> provider -> row."""
    return {key: {row["provider"]: row for row in part} for key, part in split(rows, *keys).items()}


def eager_and_ours(rows: Iterable[Row], key: str) -> list[tuple[str, int, int]]:
    """``shape, batch``, then the bytes ``key`` of eager NCHW and of ours (the better layout)."""
    found = []
    for (shape, batch), cell in cells((r for r in rows if key in r), "shape", "batch").items():
        ours = [row[key] for name, row in cell.items() if family(name) == "ours"]
        if BASELINE in cell and ours:
            found.append((f"{shape}, batch {batch}", cell[BASELINE][key], min(ours)))
    return found


def by_shape(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Shape -> provider -> timed row."""
    return {shape: cell for (shape,), cell in cells(timed(rows), "shape").items()}


def family(name: str) -> str:
    """``ours``, ``engine`` (outside PyTorch) or ``pytorch``, from a provider's name."""
    if name.startswith("fused_"):
        return "ours"
    return "engine" if name.startswith(ENGINE_FAMILIES) else "pytorch"


def fastest(cell: Cell, *families: str) -> Row | None:
    """The fastest row of one cell among the families named; None if there is none."""
    rows = [row for name, row in cell.items() if family(name) in families]
    return min(rows, key=lambda row: row["median_s"], default=None)


def ratio(other: Row, ours: Row) -> Triple:
    """other / ours of the medians, then its spread."""
    return (
        other["median_s"] / ours["median_s"],
        other["p20_s"] / ours["p80_s"],
        other["p80_s"] / ours["p20_s"],
    )


class Versus(NamedTuple):
    """The fastest of ours, the fastest peer and eager NCHW in one cell."""

    ours: Row
    best: Row
    eager: Row | None

    @property
    def over_best(self) -> float:
        """The best peer's time over ours."""
        return ratio(self.best, self.ours)[0]

    @property
    def over_eager(self) -> float | None:
        """Eager's time over ours; None without eager."""
        return None if self.eager is None else ratio(self.eager, self.ours)[0]


def versus(cell: Cell) -> Versus | None:
    """Ours and its peers; None if either is missing."""
    best, ours = fastest(cell, "pytorch", "engine"), fastest(cell, "ours")
    return Versus(ours, best, cell.get(BASELINE)) if ours and best else None


def versus_each(rows: Iterable[Row], *keys: str) -> list[tuple[tuple[Any, ...], Versus]]:
    """Ours and its peers by the values of ``keys``, where both and eager NCHW were timed."""
    found = ((key, versus(cell)) for key, cell in cells(timed(rows), *keys).items())
    return [(key, v) for key, v in found if v is not None and v.eager is not None]


def spread(rows: Iterable[Row]) -> float | None:
    """Median of (p80 - p20) / median over the timed rows; None without any."""
    found = [(row["p80_s"] - row["p20_s"]) / row["median_s"] for row in timed(rows)]
    return statistics.median(found) if found else None


class Point(NamedTuple):
    """One of the values of a geometric mean."""

    mean: str  # its name
    value: Triple
    label: str  # what was measured


@dataclass(frozen=True)
class Mean:
    """A geometric mean of ``count`` values, and its spread."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def means(points: Iterable[Point]) -> dict[str, Mean]:
    """The geometric mean of the values of each name."""
    values: dict[str, list[Triple]] = {}
    for point in points:
        values.setdefault(point.mean, []).append(point.value)
    return {
        name: Mean(*(statistics.geometric_mean(c) for c in zip(*v, strict=True)), len(v))
        for name, v in values.items()
    }


def speedups(mean: str, v: Versus, label: str) -> Iterable[Point]:
    """``mean: times faster than`` eager NCHW and the best peer."""
    for who, peer in ((BASELINE, v.eager), ("the best peer", v.best)):
        if peer is not None:
            yield Point(f"{mean}: times faster than {who}", ratio(peer, v.ours), label)
