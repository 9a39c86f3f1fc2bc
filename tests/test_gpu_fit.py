"""``benchmarks/gpu.py --fit``, on rows that the model itself wrote and on malformed files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import native_module

from benchmarks import gpu
from benchmarks.gpu_steps import fit as gpu_fit
from benchmarks.harness import machine, shapes

pytestmark = pytest.mark.skipif(native_module() is None, reason="the native library is not built")

ROWS = machine.ROOT / "benchmarks" / "results" / "nvidia-h100-plans.csv"
SHAPES = ("40-240@28-relu", "72-24@56-linear", "80-184@14-relu", "960-160@7-linear")
TRUE = {"dram_share": 0.55, "launch_us": 6.0, "latency_x": 1500.0, "run_bytes": 30.0}


def write_rows(path: Path, costs: Mapping[str, float], *, names: tuple[str, ...] = SHAPES) -> Path:
    """Tiles of some shapes, with the times that the model predicts with these constants."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*gpu_fit.COLUMNS, "device"))
        for shape in shapes.select(names):
            plans = gpu_fit.Plans(shape, 90, {})
            m, size = shape.intrinsic, shape.size
            half = -(-size // 2)
            parts = ((1, size, size), (2, size, size), (1, half, size), (1, size, 7))
            tiles = [
                (instance, 8 * math.ceil(m / blocks / 8), 1, *part)
                for instance in (16, 32, 64)
                for blocks in {math.ceil(m / instance), math.ceil(m / 16)}
                for part in parts
            ]
            for tile, seen in zip(tiles, plans.seen(costs, tiles), strict=True):
                if seen is not None:
                    us = 1e6 * seen[0]
                    writer.writerow((shape.name, *tile, *seen[1:], f"{us:.6g}", "Some GPU"))
    return path


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the table, which --write changes."""
    copy = tmp_path / "costs.inc"
    copy.write_text(gpu_fit.TABLE.read_text())
    monkeypatch.setattr(gpu_fit, "TABLE", copy)
    return copy


def values(table: Path) -> dict[str, str]:
    rows = re.findall(r"^GHOST_COST\((\w+), (\S+), (\w+),", table.read_text(), re.MULTILINE)
    return {name: f"{value} {origin}" for name, value, origin in rows}


def test_known_constants_are_found_again(tmp_path: Path) -> None:
    file = gpu_fit.read(write_rows(tmp_path / "rows.csv", TRUE))
    assert (file.device, file.skipped, len(file.plans)) == ("Some GPU", [], 4)
    found = gpu_fit.fit(file.plans, TRUE)
    for name, value in TRUE.items():
        assert found[name] == pytest.approx(value, rel=0.1), name
    before, after = gpu_fit.judge(file.plans, {}), gpu_fit.judge(file.plans, found)
    assert after.error < 0.01 < before.error
    assert after.factor == pytest.approx(1, abs=0.02) and after.rank > 0.99
    assert after.mean_regret == pytest.approx(1, abs=0.001)


def test_what_is_written(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what changed, with the file and the device as its origin."""
    fit = gpu_fit.fit
    monkeypatch.setattr(gpu_fit, "fit", lambda plans, names=None: fit(plans, list(TRUE)))
    before = values(table)
    rows = write_rows(tmp_path / "rows.csv", {**TRUE, "latency_x": 5600.0, "dram_share": 0.2})
    assert gpu.main(["--fit", str(rows), "--write"]) == 0
    assert "build again" in capsys.readouterr().out
    assert "// FITTED TO rows.csv, Some GPU" in table.read_text()
    after = values(table)
    changed = {name for name in before if before[name] != after[name]}
    assert {"launch_us", "dram_share", "latency_x"} <= changed <= TRUE.keys()
    assert all(after[name].endswith("kFitted") for name in changed)


def test_a_fit_that_chooses_no_better_is_not_written(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_fit, "SPLITS", 1)
    before = table.read_text()
    assert gpu.main(["--fit", str(write_rows(tmp_path / "rows.csv", {})), "--write"]) == 1
    assert "not written" in capsys.readouterr().out
    assert table.read_text() == before


def test_rows_of_plans_that_are_gone(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", {})
    lines = path.read_text().splitlines()
    first = lines[1].split(",")
    first[gpu_fit.COLUMNS.index("smem_bytes")] = "1"
    wide = lines[2].split(",")
    wide[gpu_fit.COLUMNS.index("channels")] = "1000"
    path.write_text("\n".join([lines[0], ",".join(first), ",".join(wide), *lines[3:]]))
    file = gpu_fit.read(path)
    assert file.rows == len(lines) - 1 and len(file.skipped) == 2
    assert "'smem_bytes': 1," in file.skipped[0] and "'channels': 1000" in file.skipped[1]


HEADER = ",".join(gpu_fit.COLUMNS)
GOOD = "40-240@28-relu,64,64,1,1,10,28,109696,256,16,95.6"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no row of a plan that exists; expected shape, instance"),
        (HEADER, "no row of a plan that exists"),
        ("shape,measured_us\n40-240@28-relu,3\n", "row 1 has no column instance; expected shape,"),
        (f"{HEADER}\n{GOOD.replace('95.6', 'fast')}\n", "row 1: measured_us is 'fast', not a size"),
        (f"{HEADER}\n{GOOD.replace('95.6', '-1')}\n", "row 1: measured_us is '-1', not a size"),
        (f"{HEADER}\n{GOOD.replace('95.6', 'nan')}\n", "row 1: measured_us is 'nan'"),
        (f"{HEADER}\n{GOOD}\n{GOOD.replace(',10,', ',0,')}\n", "row 2: rows is '0', not a size"),
        (f"{HEADER}\n{GOOD.replace('40-240@', '9-9@')}\n", "row 1: shape is '9-9@28-relu', which"),
        (f"{HEADER},device\n{GOOD},A\n{GOOD},B\n", "rows of several devices: A, B"),
        ("\0\xff", ""),
    ],
)
def test_a_malformed_file(
    text: str, message: str, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, path = table.read_text(), tmp_path / "rows.csv"
    path.write_bytes(text.encode("latin-1"))
    assert gpu.main(["--fit", str(path), "--write"]) == 2
    assert f"--fit: {path}: {message}" in capsys.readouterr().out
    assert table.read_text() == before


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--fit", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().out


def test_the_table_as_text_is_the_table_as_compiled() -> None:
    compiled, text = gpu_fit.table(), values(gpu_fit.TABLE)
    assert compiled.keys() == text.keys()
    for name, cost in compiled.items():
        value, origin = text[name].split()
        assert float(value) == cost["value"]
        assert origin.lower() == "k" + cost["origin"].replace(" ", "")


def test_committed_rows() -> None:
    file = gpu_fit.read(ROWS)
    assert file.rows == 936 and len(file.plans) == len(shapes.GHOSTNET)
