"""Fit the constants of the CUDA plans' model of time to plans measured on a GPU.

Rows of ``ghost_apply`` in float16, channels_last, batch 256: a CSV file with ``COLUMNS``, or the
``rows.jsonl`` of ``benchmarks/gpu.py --steps plans-1 plans-2 plans-3``. The constants stand in
``csrc/core/cuda_costs.inc``; constants counted or taken from data sheets are not fitted.

A coordinate search lowers the mean over the shapes of

    sum_i w_i |log(predicted_i / measured_i)| / sum_i w_i
    + sum_i s_i log(measured_i / best) / sum_i s_i

    w_i = (best / measured_i)^2,  s_i = predicted_i^(-1 / SPREAD)

over the plans i of a shape: the error, most of all that of good plans, and what a choice by
predicted time costs. A price on every change keeps constants that the rows do not determine.
"""

from __future__ import annotations

import csv
import math
import random
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_steps.sheet import read_rows
from benchmarks.harness import machine, shapes

TABLE = machine.ROOT / "csrc" / "core" / "cuda_costs.inc"
BATCH = 256
TILE = ("instance", "channels", "resident", "images", "rows", "cols")
CHECKED = ("smem_bytes", "blocks", "tiles_a_warp")  # as planned now, or the plan is another
COLUMNS = ("shape", *TILE, *CHECKED, "measured_us")  # besides, if there: device, sm

SPREAD = 0.02  # predictions that close leave the choice open
PRICE = 0.001  # of a factor e on one constant, or of FIRST
FIRST = {"share": 0.2, "bytes": 16.0}  # what a constant of 0 is first raised by, by its last word
SPLITS = 4  # of the shapes into two halves, for the held-out figures

Costs = Mapping[str, float]
Tile = tuple[int, ...]


@dataclass(frozen=True)
class Plans:
    """The measured plans of one shape: tile -> microseconds, the median of its rows."""

    shape: shapes.Shape
    sm: int
    measured: dict[Tile, float]

    def seen(self, costs: Costs, tiles: Sequence[Tile]) -> list[tuple[float, int, int, int] | None]:
        """Seconds, shared memory, blocks and tiles a warp of tiles, as the model has them."""
        from ghost_ops import backends

        s, library = self.shape, backends.native.library()
        sizes = (BATCH, s.inp, s.size, s.size, s.oup, s.ratio, s.dw_size, self.sm)
        found: list[Any] = library.cuda_predict(*sizes, list(tiles), dict(costs))
        return found

    def predict(self, costs: Costs) -> list[float]:
        """Microseconds of the measured tiles, in their order."""
        return [1e6 * one[0] for one in self.seen(costs, list(self.measured)) if one is not None]


class File(NamedTuple):
    """A file of measured plans: its device and rows, rows skipped, plans that exist today."""

    device: str
    rows: int
    skipped: list[str]
    plans: list[Plans]


def planned(shape: shapes.Shape, sm: int) -> dict[str, int]:
    """The plan that the launchers take for a shape: the columns of a row that name it, and sm."""
    import torch

    options = {"dtype": torch.float16, "channels_last": True, "device": f"sm_{sm}"}
    first = shape.explain(BATCH, **options).passes[0]
    tile = tuple(int(getattr(first, name)) for name in TILE)
    (seen,) = Plans(shape, sm, {}).seen({}, [tile])
    return {**dict(zip((*TILE, *CHECKED), (*tile, *seen[1:]), strict=True)), "sm": sm}


def _read_table(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix == ".jsonl":
        for row in read_rows(path):
            if "plan" in row and "us" in row:
                yield {**row["plan"], "shape": row["case"], "measured_us": row["us"]}
        return
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _number(row: Mapping[str, Any], number: int, column: str, kind: type) -> Any:
    if row.get(column) is None:
        raise ValueError(f"row {number} has no column {column}; expected {', '.join(COLUMNS)}")
    try:
        value = kind(row[column])
    except ValueError:
        value = -1
    if not (0 if column == "resident" else 1e-9) <= value < math.inf:
        raise ValueError(f"row {number}: {column} is {row[column]!r}, not a size or a time")
    return value


def read(path: Path) -> File:
    """The measured plans of a file.

    Raises:
        ValueError: it holds something else; the message names the row and the column.
        OSError: it cannot be read.
    """
    known = {shape.name: shape for shape in shapes.ALL}
    times: dict[tuple[str, int], dict[Tile, list[float]]] = {}
    skipped, count, devices = [], 0, set()
    for number, row in enumerate(_read_table(path), 1):
        if row.get("shape") not in known:
            raise ValueError(f"row {number}: shape is {row.get('shape')!r}, which is unknown")
        tile = tuple(_number(row, number, column, int) for column in TILE)
        seen = tuple(_number(row, number, column, int) for column in CHECKED)
        measured = _number(row, number, "measured_us", float)
        sm = _number({"sm": row.get("sm") or 90}, number, "sm", int)
        devices.add(row.get("device") or "unnamed GPU")
        count += 1
        (now,) = Plans(known[row["shape"]], sm, {}).seen({}, [tile])
        if now is None or now[1:] != seen:
            given = dict(zip((*TILE, *CHECKED), tile + seen, strict=True))
            skipped.append(f"{row['shape']} {given}")
            continue
        times.setdefault((row["shape"], sm), {}).setdefault(tile, []).append(measured)
    if len(devices) > 1:
        raise ValueError(f"rows of several devices: {', '.join(sorted(devices))}")
    plans = [
        Plans(known[name], sm, {tile: statistics.median(us) for tile, us in found.items()})
        for (name, sm), found in times.items()
    ]
    if not plans:
        raise ValueError(f"no row of a plan that exists; expected {', '.join(COLUMNS)}")
    return File(devices.pop(), count, skipped, plans)


def table() -> dict[str, dict[str, Any]]:
    """The constants as they are compiled: value, origin, meaning."""
    from ghost_ops import backends

    return {cost["name"]: cost for cost in backends.native.library().cuda_costs()}


def _loss(plans: Plans, costs: Costs) -> float:
    measured, predicted = list(plans.measured.values()), plans.predict(costs)
    best, first = min(measured), min(predicted)
    weights = [(best / m) ** 2 for m in measured]
    error = sum(
        w * abs(math.log(p / m)) for w, p, m in zip(weights, predicted, measured, strict=True)
    )
    chances = [(first / p) ** (1 / SPREAD) for p in predicted]
    regret = sum(c * math.log(m / best) for c, m in zip(chances, measured, strict=True))
    return error / sum(weights) + regret / sum(chances)


def fit(plans: Sequence[Plans], names: Iterable[str] | None = None) -> dict[str, float]:
    """The constants, of those that may be fitted, with the least loss.

    Args:
        plans: to fit to.
        names: which constants; by default those estimated or fitted before.
    """
    known = table()
    if names is None:
        names = [n for n, cost in known.items() if cost["origin"] in ("estimate", "fitted")]
    start = {name: float(known[name]["value"]) for name in names}

    unit = {name: value or FIRST[name.rpartition("_")[2]] for name, value in start.items()}

    def price(name: str, value: float) -> float:
        return abs(math.log(value / start[name])) if start[name] else value / unit[name]

    def total(costs: Costs) -> float:
        changes = sum(price(name, value) for name, value in costs.items())
        return statistics.fmean(_loss(one, costs) for one in plans) + PRICE * changes

    costs, step = dict(start), 0.5
    least = total(costs)
    while step > 0.01:
        moved = False
        for name in costs:
            old, most = costs[name], 8 * unit[name]
            for new in (old * (1 + step), old / (1 + step)) if old else (step * unit[name],):
                new = min(new, 1.0) if name.endswith("_share") else new
                if not start[name] / 8 <= new <= most:
                    continue
                loss = total({**costs, name: new})
                if loss < least * (1 - 1e-5):
                    least, costs[name], moved = loss, new, True
        step = step if moved else step / 2
    return costs


class Quality(NamedTuple):
    """How predictions and measured times agree.

    Attributes:
        factor: median of measured / predicted.
        error, error_p90: median and 90th percentile of |log(predicted / measured)|.
        rank: mean over the shapes of Spearman's rank correlation inside a shape.
        regret: shape -> measured time of the plan with the least prediction / least measured time.
    """

    factor: float
    error: float
    error_p90: float
    rank: float
    regret: dict[str, float]

    @property
    def mean_regret(self) -> float:
        return statistics.geometric_mean(self.regret.values())


def _ranks(values: Sequence[float]) -> list[int]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return sorted(range(len(order)), key=order.__getitem__)


def judge(plans: Sequence[Plans], costs: Costs) -> Quality:
    """The quality of predictions with these constants."""
    ratios, ranks, regret = [], [], {}
    for one in plans:
        measured, predicted = list(one.measured.values()), one.predict(costs)
        ratios += [m / p for m, p in zip(measured, predicted, strict=True)]
        chosen = measured[predicted.index(min(predicted))]
        regret[one.shape.name] = chosen / min(measured)
        if len(measured) > 2:
            ranks.append(statistics.correlation(_ranks(measured), _ranks(predicted)))
    errors = sorted(abs(math.log(ratio)) for ratio in ratios)
    p90, rank = errors[int(0.9 * (len(errors) - 1))], statistics.fmean(ranks or [math.nan])
    return Quality(statistics.median(ratios), statistics.median(errors), p90, rank, regret)


def held_out(plans: Sequence[Plans]) -> tuple[Quality, Quality] | None:
    """Quality before and after, on halves of the shapes that the fit has not seen; every shape
    counts ``SPLITS`` times. None for fewer than four shapes."""
    if len(plans) < 4:
        return None
    before, after = [], []
    for split in range(SPLITS):
        mixed = random.Random(split).sample(list(plans), len(plans))
        halves = mixed[::2], mixed[1::2]
        for given, others in (halves, halves[::-1]):
            before.append(judge(others, {}))
            after.append(judge(others, fit(given)))
    return _mean(before), _mean(after)


def _mean(parts: Sequence[Quality]) -> Quality:
    numbers = zip(*(part[:4] for part in parts), strict=True)
    names = dict.fromkeys(name for part in parts for name in part.regret)
    each = {n: [part.regret[n] for part in parts if n in part.regret] for n in names}
    regret = {name: statistics.geometric_mean(values) for name, values in each.items()}
    return Quality(*map(statistics.fmean, numbers), regret)


def _print(title: str, before: Quality, after: Quality) -> None:
    means = before.mean_regret, after.mean_regret
    lines = [
        ("measured / predicted, median", ".2f", before.factor, after.factor),
        ("|log(predicted / measured)|, median", ".3f", before.error, after.error),
        ("  and 90th percentile", ".3f", before.error_p90, after.error_p90),
        ("rank correlation inside a shape", ".3f", before.rank, after.rank),
        ("chosen / best measured time", ".4f", *means),
    ]
    for name, old in before.regret.items():
        if max(old, new := after.regret[name]) >= 1.0005:
            lines.append((f"  {name}", ".3f", old, new))
    print(title)
    for name, form, old, new in lines:
        print(f"  {name:46} {old:{form}} -> {new:{form}}")


def write_table(path: Path, costs: Costs, origin: str) -> None:
    """Put fitted values into the table, with their origin."""
    text = path.read_text()
    for name, value in costs.items():
        row = rf"(GHOST_COST\({name}, )[^,]+, k\w+, "
        text, count = re.subn(row, rf"\g<1>{value:.4g}, kFitted, ", text)
        if count != 1:
            raise ValueError(f"{path}: {count} rows of {name}")
    path.write_text(re.sub(r"// FITTED TO .*", f"// FITTED TO {origin}", text))


def main(path: Path, write: bool) -> int:
    """Fit to a file and print how good that is. Returns 2 for a malformed file, 1 for a fit that is
    not to be written."""
    try:
        file = read(path)
    except (OSError, ValueError, csv.Error) as error:
        print(f"--fit: {path}: {error}")
        return 2
    plans, known = file.plans, table()
    print(
        f"{file.device}: {file.rows} rows, {sum(len(one.measured) for one in plans)} plans of "
        f"{len(plans)} shapes; {len(file.skipped)} rows skipped, whose plan does not exist any more"
    )
    for text in file.skipped[:3]:
        print(f"  such as {text}")
    costs = fit(plans)
    changed = {n: v for n, v in costs.items() if f"{v:.4g}" != f"{known[n]['value']:.4g}"}
    for name, value in changed.items():
        print(f"  {name:24} {known[name]['value']:8.4g} -> {value:8.4g}  {known[name]['meaning']}")
    _print("all shapes", judge(plans, {}), judge(plans, costs))
    unseen = held_out(plans)
    if unseen is not None:
        _print("shapes that the fit has not seen", *unseen)
    if not write:
        return 0
    merits = [(quality.mean_regret, quality.error) for quality in unseen or ()]
    if not merits or not merits[1] < merits[0]:
        print("not written: no better on shapes that the fit has not seen")
        return 1
    write_table(TABLE, changed, f"{path.name}, {file.device}")
    print(f"written to {TABLE}: build again")
    return 0
