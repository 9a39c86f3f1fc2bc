"""Did anything become slower or larger between two results files, beyond the noise of both?

    python -m benchmarks.compare before.json after.json
    python -m benchmarks.compare before/ after/            files of the same names
    python -m benchmarks.compare A B --metric time         seconds instead of ratios

By default a time is taken relative to eager PyTorch's in the same rounds, which cancels what other
users of the machine did to a run. A change counts where it exceeds both ``--tolerance`` and the
spread (p80 - p20 over the median) of everything it was computed from, added in quadrature. Of the
geometric means that the report prints, those more than 10% apart are named, with the spread of
both. The exit status is 1 if ghost_ops regressed, 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness, means, report
from benchmarks.extras import MissingExtra
from benchmarks.providers import BASELINE

METRICS = ("relative", "time", "floors")
IDENTITY = (
    "question", "mode", "what", "axis", "value", "k", "s", "shape", "dtype", "layout", "batch",
    "threads", "provider",
)  # fmt: skip
BYTES = ("peak_bytes", "saved_total")
# A few pages more or less are no change of the high-water mark.
BYTES_SLACK = {"peak_bytes": 1 << 20, "saved_total": 0}
Key = tuple[Any, ...]


def load(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is none. OSError: it cannot be read.
    """
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a results file ({error})") from error
    if not isinstance(document, dict) or not {"meta", "rows"} <= document.keys():
        raise ValueError(f"{path}: not a results file (no meta and rows in it)")
    return document


def identity(row: report.Row) -> Key:
    """What makes a row the same measurement in two files."""
    return tuple(row.get(name) for name in IDENTITY)


def label(key: Key) -> str:
    """The parts of a key that say something, in one line."""
    named = dict(zip(IDENTITY, key, strict=True))
    parts = [str(named[n]) for n in ("question", "mode", "what", "shape") if named[n] is not None]
    parts += [f"{n} {named[n]}" for n in ("batch", "threads", "k", "s") if named[n] is not None]
    if named["axis"] is not None:
        parts.append(f"{named['axis']}={named['value']}")
    return ", ".join([*parts, str(named["provider"])])


@dataclass(frozen=True)
class Change:
    """One measurement in both files.

    Args:
        key: what was measured.
        unit: what was compared: a time or one of ``BYTES``.
        ratio: after / before; above 1 is worse.
        noise: relative change that means nothing.
    """

    key: Key
    unit: str
    ratio: float
    noise: float

    @property
    def ours(self) -> bool:
        """Whether it is a measurement of ghost_ops."""
        return report.family(str(self.key[-1])) == "ours"

    @property
    def worse(self) -> bool:
        """Slower or larger beyond noise."""
        return self.ratio > 1.0 + self.noise

    @property
    def better(self) -> bool:
        """Faster or smaller beyond noise."""
        return 1.0 / self.ratio > 1.0 + self.noise


def _spread(row: report.Row) -> float:
    return (row["p80_s"] - row["p20_s"]) / row["median_s"]


def _time(
    row: report.Row, rows: Mapping[Key, report.Row], metric: str
) -> tuple[float, list[float]] | None:
    """The number compared and the spreads that went into it; None where there is none."""
    if metric == "time":
        return row["median_s"], [_spread(row)]
    if metric == "floors":
        return (row["floors"], [_spread(row)]) if "floors" in row else None
    # The layout goes with the provider: that of the baseline is NCHW, or not in the row at all.
    layout = None if row.get("layout") is None else "nchw"
    base = rows.get(identity({**row, "provider": BASELINE, "layout": layout}))
    if base is None or base.get("median_s") is None:
        return None
    return row["median_s"] / base["median_s"], [_spread(row), _spread(base)]


def changes(
    before: Iterable[report.Row],
    after: Iterable[report.Row],
    *,
    metric: str = "relative",
    tolerance: float = 0.05,
) -> tuple[list[Change], list[str], int]:
    """Compare rows.

    Args:
        before, after: rows of two files.
        metric: one of ``METRICS``.
        tolerance: relative change that never counts.

    Returns:
        All changes; measurements of ours that failed after and not before; how many rows are in
        one file only.
    """
    old = {identity(row): row for row in before}
    new = {identity(row): row for row in after}
    found: list[Change] = []
    broken: list[str] = []
    for key, row in old.items():
        other = new.get(key)
        if other is None:
            continue
        if row.get("median_s") is not None:
            if other.get("median_s") is None:
                if report.family(str(key[-1])) == "ours":
                    broken.append(f"{label(key)}: {other.get('note', 'no time any more')}")
                continue
            was, now = _time(row, old, metric), _time(other, new, metric)
            if was is not None and now is not None and key[-1:] != (BASELINE,):
                spread = math.hypot(*was[1], *now[1])
                found.append(Change(key, "time", now[0] / was[0], max(tolerance, spread)))
        for unit in BYTES:
            if row.get(unit) and unit in other:
                slack = BYTES_SLACK[unit] / row[unit]
                noise = slack + (tolerance if unit == "peak_bytes" else 1e-3)
                found.append(Change(key, unit, other[unit] / row[unit], noise))
    return found, broken, len(old.keys() ^ new.keys())


def apart(
    before: Mapping[str, means.Mean], after: Mapping[str, means.Mean]
) -> list[tuple[str, means.Mean, means.Mean]]:
    """Geometric means of both reports, the largest difference first."""
    both = [(name, mean, after[name]) for name, mean in before.items() if name in after]
    return sorted(both, key=lambda line: -line[1].apart(line[2]))


def print_means(
    console: Any, lines: Sequence[tuple[str, means.Mean, means.Mean]], *, everything: bool = False
) -> None:
    """Which geometric means differ by more than ``means.AGREE``, with the spread of both."""
    far = [line for line in lines if line[1].apart(line[2]) > means.AGREE]
    for name, old, new in lines if everything else far:
        away = old.apart(new)
        note = ""
        if away > means.AGREE:
            note = ", within the spread" if old.overlaps(new) else ", [yellow]beyond the spread[/]"
        mark = "[yellow]apart[/]" if away > means.AGREE else "agrees"
        console.print(
            f"{mark}  {away:.0%}{note}: {report.escape(name)}: {old}, then {new}",
            soft_wrap=True,
        )
    if lines:
        console.print(
            f"{len(lines) - len(far)} of {len(lines)} geometric means agree within "
            f"{means.AGREE:.0%}"
        )


def _pairs(before: Path, after: Path) -> list[tuple[Path, Path]]:
    if before.is_dir() != after.is_dir():
        raise ValueError(f"expected two files or two folders, got {before} and {after}")
    if not before.is_dir():
        return [(before, after)]
    found = ({p.name for p in folder.glob("*.json")} for folder in (before, after))
    names = sorted(set.intersection(*found) - {harness.RUN_FILE})
    if not names:
        raise ValueError(f"{before} and {after} have no *.json of the same name")
    return [(before / name, after / name) for name in names]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if ghost_ops regressed, 2 if nothing can be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("before", type=Path, help="results file, or folder of them")
    parser.add_argument("after", type=Path)
    parser.add_argument("--metric", choices=METRICS, default="relative", help="of times")
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="relative change that never counts"
    )
    parser.add_argument(
        "--means", action="store_true", help="print all geometric means, not only those apart"
    )
    arguments = parser.parse_args(argv)
    if not 0.0 <= arguments.tolerance < math.inf:
        parser.error(f"tolerance: expected a number from 0 up, got {arguments.tolerance}")
    found: list[Change] = []
    broken: list[str] = []
    lonely = 0
    averages: tuple[dict[str, means.Mean], dict[str, means.Mean]] = ({}, {})
    try:
        console = report.console_for_tables()
        for one, two in _pairs(arguments.before, arguments.after):
            old, new = load(one), load(two)
            setups = [{**d["meta"], "instructions": harness.instructions(d["meta"])}
                      for d in (old, new)]  # fmt: skip
            for key in ("cpu", "torch", "threads", "clock", "instructions"):
                values = [setup.get(key) for setup in setups]
                if values[0] != values[1]:
                    console.print(f"[yellow]{one.name}: {key} differs: {values[0]}, {values[1]}[/]")
            part = changes(
                old["rows"], new["rows"], metric=arguments.metric, tolerance=arguments.tolerance
            )
            found += part[0]
            broken += part[1]
            lonely += part[2]
            for target, document in zip(averages, (old, new), strict=True):
                target.update(means.of_document(document))
    except (OSError, ValueError, MissingExtra) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not found and not broken:
        print("error: the files have no measurement in common", file=sys.stderr)
        return 2
    for text in broken:
        console.print(f"[red]broken[/] {report.escape(text)}")
    ours = sorted((c for c in found if c.ours), key=lambda c: -c.ratio)
    worse = [c for c in ours if c.worse]
    for change in worse:
        console.print(
            f"[red]worse[/]  {change.ratio:.2f}x {change.unit}, noise {change.noise:.0%}: "
            f"{label(change.key)}"
        )
    for change in reversed([c for c in ours if c.better]):
        console.print(
            f"[green]better[/] {change.ratio:.2f}x {change.unit}, noise {change.noise:.0%}: "
            f"{label(change.key)}"
        )
    print_means(console, apart(*averages), everything=arguments.means)
    moved = sum(1 for c in found if not c.ours and (c.worse or c.better))
    console.print(
        f"{len(worse)} of {len(ours)} measurements of ours are worse beyond noise, {len(broken)} "
        f"broken; {moved} of {len(found) - len(ours)} of the others moved; {lonely} rows are in "
        "one file only"
    )
    return 1 if worse or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
