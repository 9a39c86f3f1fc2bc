"""Two results files: what became slower or larger. Several: their means beside one another.

    python -m benchmarks compare before.json after.json
    python -m benchmarks compare before/ after/            files of the same names
    python -m benchmarks beside xeon-avx512.json xeon-avx2.json

A time is taken relative to eager PyTorch's in the same rounds, which cancels what other users of
the machine did to a run. A change counts where it exceeds both ``--tolerance`` and the spread (p80
- p20 over the median) of everything it was computed from, added in quadrature. Of the geometric
means, those more than 10% apart are named, with the spread of both.

``beside`` prints one Markdown table, a column a file: the geometric means, then the milliseconds of
whole networks. Above it stands each file's machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import machine
from benchmarks.harness.rows import AGREE, BASELINE, Mean, Row, family, load, split, timed
from benchmarks.questions import QUESTIONS, network
from benchmarks.questions.question import number
from benchmarks.report.page import RUN_FILE
from benchmarks.report.table import Table

Key = tuple[Any, ...]
Document = Mapping[str, Any]
IDENTITY = tuple(
    "question mode what order axis value k s shape dtype layout batch threads provider".split()
)
# Bytes, and by how many they may differ: a few pages are no change of the high-water mark.
SLACK = {"peak_bytes": 1 << 20, "saved_total": 0}


def means_of(document: Document) -> dict[str, Mean]:
    """All geometric means of a results file; none for questions that have none."""
    found: dict[str, Mean] = {}
    for (question,), part in split(document["rows"], "question").items():
        if question in QUESTIONS:
            found |= QUESTIONS[question].means(part)
    return found


def setup(document: Document, *more: str) -> dict[str, Any]:
    """What two files must share for their times to be compared."""
    meta = document["meta"]
    keys = ("cpu", "threads", "clock", "torch", *more)
    sets = {"instruction sets": machine.instructions(meta)}
    return sets | {key: meta.get(key, "unknown") for key in keys}


class Change(NamedTuple):
    """One measurement in both files."""

    what: str  # question, mode, shape and so on, and the provider
    unit: str  # time or one of SLACK
    ratio: float  # after / before; above 1 is worse
    noise: float  # relative change that means nothing
    ours: bool  # whether it is a measurement of ghost_ops

    @property
    def worse(self) -> bool:
        """Slower or larger beyond noise."""
        return self.ratio > 1.0 + self.noise

    @property
    def better(self) -> bool:
        """Faster or smaller beyond noise."""
        return 1.0 / self.ratio > 1.0 + self.noise

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x {self.unit}, noise {self.noise:.0%}: {self.what}"


class Changes(NamedTuple):
    """All changes; what of ours failed after and not before; how many rows are in one file only."""

    found: list[Change]
    broken: list[str]
    lonely: int


def identity(row: Row) -> Key:
    """What makes a row the same measurement in two files."""
    return tuple(row.get(name) for name in IDENTITY)


def label(key: Key) -> str:
    """The parts of a key that are set, in one line."""
    bare = ("question", "mode", "what", "order", "shape", "provider")
    named = {n: v for n, v in zip(IDENTITY, key, strict=True) if n not in ("dtype", "layout")}
    return ", ".join(str(v) if n in bare else f"{n} {v}" for n, v in named.items() if v is not None)


def relative(row: Row, rows: Mapping[Key, Row]) -> tuple[float, list[float]] | None:
    """Time over eager's, and the spreads of both; None where eager has no time."""
    # The layout goes with the provider: that of the baseline is NCHW, or not in the row at all.
    layout = None if row.get("layout") is None else "nchw"
    base = rows.get(identity({**row, "provider": BASELINE, "layout": layout}))
    if base is None or base.get("median_s") is None:
        return None
    spreads = [(part["p80_s"] - part["p20_s"]) / part["median_s"] for part in (row, base)]
    return row["median_s"] / base["median_s"], spreads


def compare(before: Iterable[Row], after: Iterable[Row], tolerance: float = 0.05) -> Changes:
    """Compare the rows of two files; a relative change up to ``tolerance`` never counts."""
    old, new = ({identity(row): row for row in rows} for rows in (before, after))
    found, broken = [], []
    for key in (key for key in old if key in new):
        row, other, ours = old[key], new[key], family(str(key[-1])) == "ours"
        if row.get("median_s") is not None and other.get("median_s") is None:
            if ours:
                broken.append(f"{label(key)}: {other.get('note', 'no time any more')}")
        elif row.get("median_s") is not None and key[-1] != BASELINE:
            was, now = relative(row, old), relative(other, new)
            if was and now:
                noise = max(tolerance, math.hypot(*was[1], *now[1]))
                found.append(Change(label(key), "time", now[0] / was[0], noise, ours))
        for unit, slack in SLACK.items():
            if row.get(unit) and unit in other:
                noise = slack / row[unit] + (tolerance if slack else 1e-3)
                found.append(Change(label(key), unit, other[unit] / row[unit], noise, ours))
    return Changes(found, broken, len(old.keys() ^ new.keys()))


def print_means(before: Mapping[str, Mean], after: Mapping[str, Mean], everything: bool) -> None:
    """Which geometric means differ by more than ``AGREE``, the largest difference first."""
    both = {name: (old, after[name]) for name, old in before.items() if name in after}
    ratios = {name: new.value / old.value for name, (old, new) in both.items()}
    apart = {name: max(ratio, 1 / ratio) - 1 for name, ratio in ratios.items()}
    for name in sorted(both, key=lambda name: -apart[name]):
        old, new = both[name]
        if apart[name] > AGREE:
            spread = "within" if old.low <= new.high and new.low <= old.high else "beyond"
            print(f"apart  {apart[name]:.0%}, {spread} the spread: {name}: {old}, then {new}")
        elif everything:
            print(f"agrees {apart[name]:.0%}: {name}: {old}, then {new}")
    if both:
        near = sum(value <= AGREE for value in apart.values())
        print(f"{near} of {len(both)} geometric means agree within {AGREE:.0%}")


def _pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    if before.is_dir() != after.is_dir():
        raise ValueError(f"expected two files or two folders, got {before} and {after}")
    if not before.is_dir():
        return [(before, after)]
    both = [(path, after / path.name) for path in sorted(before.glob("*.json"))]
    both = [(one, two) for one, two in both if two.exists() and one.name != RUN_FILE]
    if not both:
        raise ValueError(f"{before} and {after} have no *.json of the same name")
    return both


def main(argv: Sequence[str]) -> int:
    """Compare two files or folders; 1 if ghost_ops regressed, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=main.__doc__)
    add = parser.add_argument
    add("before", type=Path, help="results file, or folder of them")
    add("after", type=Path)
    kind = number(0, kind=float)
    add("--tolerance", type=kind, default=0.05, help="relative change that never counts")
    add("--means", action="store_true", help="print all geometric means, not only those apart")
    arguments = parser.parse_args(argv)
    changes, before, after = [], {}, {}
    try:
        for one, two in _pairs(arguments.before, arguments.after):
            old, new = load(one), load(two)
            for key, value in setup(old).items():
                if value != (other := setup(new)[key]):
                    print(f"{one.name}: {key} differs: {value}, {other}")
            changes.append(compare(old["rows"], new["rows"], arguments.tolerance))
            before |= means_of(old)
            after |= means_of(new)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = [change for part in changes for change in part.found]
    broken = [line for part in changes for line in part.broken]
    if not found and not broken:
        print("error: the files have no measurement in common", file=sys.stderr)
        return 2
    ours = sorted((change for change in found if change.ours), key=lambda change: -change.ratio)
    worse = [change for change in ours if change.worse]
    for line in broken:
        print(f"broken {line}")
    for change in (*worse, *reversed([change for change in ours if change.better])):
        print(f"{'worse ' if change.worse else 'better'} {change}")
    print_means(before, after, arguments.means)
    moved = sum(change.worse or change.better for change in found if not change.ours)
    print(
        f"{len(worse)} of {len(ours)} measurements of ours are worse beyond noise, {len(broken)} "
        f"broken; {moved} of {len(found) - len(ours)} of the others moved; "
        f"{sum(part.lonely for part in changes)} rows are in one file only"
    )
    return 1 if worse or broken else 0


def column(document: Document) -> dict[str, str]:
    """Description -> number, of one file: all means except those in floors, and network times."""
    means = means_of(document)
    found = {name: f"{m.value:.2f}" for name, m in means.items() if ": floors of " not in name}
    for row in timed(document["rows"]):
        if row.get("question") == "network":
            where = f"{network.name(row)}, {row['threads']} thread(s)"
            found[f"{where}: ms, {row['provider']}"] = f"{1e3 * row['median_s']:.2f}"
    return found


def beside(argv: Sequence[str]) -> int:
    """Print one table of several results files; 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks beside", description=beside.__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON, in the order of the columns")
    paths = parser.parse_args(argv).results
    # Files of the same name get their folder as title.
    stems = [path.stem for path in paths]
    titles = [str(path) if stems.count(path.stem) > 1 else path.stem for path in paths]
    try:
        documents = [load(path) for path in paths]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for title, document in zip(titles, documents, strict=True):
        parts = (f"{key} {what}" for key, what in setup(document, "commit", "date").items())
        print(f"- {title}: {'; '.join(parts)}")
    columns = [column(document) for document in documents]
    names = dict.fromkeys(name for found in columns for name in found)
    body = [(name, *(found.get(name, "") for found in columns)) for name in names]
    print("\n".join(["", *Table("", ("", *titles), body).lines()]))
    return 0
