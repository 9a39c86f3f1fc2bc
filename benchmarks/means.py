"""Every geometric mean of a report, with its spread: what the page prints and ``compare`` compares.

The spread of a ratio of two times runs from p20 / p80 to p80 / p20, that of a single time from its
p20 to its p80; of a mean, the geometric means of both ends: how far the machine's noise could have
moved it. Bytes have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import memory, paper, plan, product, report
from benchmarks.networks import CIFAR
from benchmarks.providers import BASELINE

AGREE = 0.10  # two runs whose means differ by less agree
Triple = tuple[float, float, float]
Cell = Mapping[str, report.Row]


@dataclass(frozen=True)
class Mean:
    """A geometric mean of ``count`` values, and where noise could have moved it."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[Triple]) -> Mean:
        """The mean of (value, low, high)."""
        value, low, high = (report.geometric_mean(c) or 0.0 for c in zip(*values, strict=True))
        return cls(value, low, high, len(values))

    def apart(self, other: Mean) -> float:
        """Relative difference of two means, the smaller counting as 1."""
        return max(self.value / other.value, other.value / self.value) - 1.0

    def overlaps(self, other: Mean) -> bool:
        """Whether the spreads have a value in common."""
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def _collect(found: Iterable[tuple[str, Triple]]) -> dict[str, Mean]:
    values: dict[str, list[Triple]] = {}
    for name, triple in found:
        values.setdefault(name, []).append(triple)
    return {name: Mean.of(v) for name, v in values.items()}


def _ratios(named: Iterable[tuple[str, Cell]]) -> dict[str, Mean]:
    """Ours over eager NCHW and over the best peer, of cells (provider -> timed row)."""
    found = []
    for name, cell in named:
        ours = report.fastest(cell, "ours")
        peers = {
            BASELINE: cell.get(BASELINE),
            "the best peer": report.fastest(cell, "pytorch", "engine"),
        }
        for who, peer in peers.items():
            if ours is not None and peer is not None:
                found.append((f"{name}: times faster than {who}", report.ratio(peer, ours)))
    return _collect(found)


def _cells(rows: Iterable[report.Row], *keys: str) -> dict[tuple[Any, ...], dict[str, report.Row]]:
    cells: dict[tuple[Any, ...], dict[str, report.Row]] = {}
    for row in report.timed(rows):
        cells.setdefault(tuple(row.get(key) for key in keys), {})[row["provider"]] = row
    return cells


def of_modules(rows: Sequence[report.Row]) -> dict[str, Mean]:
    """Ratios and times in floors by mode, batch and group."""
    found: dict[str, Mean] = {}
    for (mode, batch, group), part in report.groups(rows).items():
        if mode not in ("eval", "train"):
            continue
        name, summary = f"{group}, {mode}, batch {batch}", report.summarize(part)
        for what in ("speedup", "floors"):
            unit = {"speedup": "times faster, ", "floors": "floors of "}[what]
            for who, value in summary[what].items():
                low, high, count = summary[f"{what}_range"][who]
                found[f"{name}: {unit}{who}"] = Mean(value, low, high, count)
    return found


def of_networks(rows: Sequence[report.Row]) -> dict[str, Mean]:
    """Over all networks of a mode and batch, those for CIFAR apart."""
    cells = _cells(rows, "group", "mode", "batch", "shape")
    return _ratios(
        (f"{'CIFAR ' if k[0] == CIFAR else ''}networks, {k[1]}, batch {k[2]}", cell)
        for k, cell in cells.items()
    )


def of_scaling(rows: Sequence[report.Row]) -> dict[str, Mean]:
    """Over all points of an axis."""
    cells = _cells(rows, "axis", "value")
    return _ratios((f"along {key[0]}", cell) for key, cell in cells.items())


def of_memory(rows: Sequence[report.Row]) -> dict[str, Mean]:
    """Eager's bytes over ours, over all networks and modules."""
    names = {"peak_bytes_ratio": "peak", "saved_total_ratio": "saved"}
    return _collect(
        (f"memory: {name}, eager over ours", (line[key],) * 3)
        for key, name in names.items()
        for line in memory.summarize(rows)
        if line[key] > 0
    )


def of_plan(rows: Sequence[report.Row]) -> dict[str, Mean]:
    """Measured over predicted time."""
    return _collect(
        (f"plan, {name}: measured over predicted", triple)
        for name, part in plan.predictions(rows).items()
        for triple in ([row[key] / row["predicted_s"] for key in report.QUANTILES] for row in part)
    )


def of_product(rows: Sequence[report.Row]) -> dict[str, Mean]:
    """Rate over the GEMM peak of the deep products."""
    return {
        f"product, batch {batch}, K >= {product.DEEP}: share of the GEMM peak, {provider}": Mean.of(
            [product.share(row) for row in part]
        )
        for (batch, provider), part in product.deep(rows).items()
    }


def of_paper(rows: Sequence[report.Row]) -> dict[str, Mean]:
    """Measured speed-up over that by FLOPs."""
    return _collect(
        (f"paper, k={line['k']}: {who}, measured over r_s", _over(line[key], line["theory"]))
        for line in paper.summarize_speedup(rows)
        for key, who in (("pytorch_range", "PyTorch"), ("ours_range", "ghost_ops"))
    )


def _over(triple: Triple, by: float) -> Triple:
    return triple[0] / by, triple[1] / by, triple[2] / by


OF: dict[str, Callable[[Sequence[report.Row]], dict[str, Mean]]] = {
    "module": of_modules,
    "network": of_networks,
    "scaling": of_scaling,
    "memory": of_memory,
    "plan": of_plan,
    "product": of_product,
    "paper": of_paper,
}


def of_document(document: Mapping[str, Any]) -> dict[str, Mean]:
    """All geometric means of a results file; none for questions that have none."""
    questions = dict.fromkeys(row.get("question") for row in document["rows"])
    found: dict[str, Mean] = {}
    for question in questions:
        if question in OF:
            part = [row for row in document["rows"] if row.get("question") == question]
            found |= OF[question](part)
    return found
