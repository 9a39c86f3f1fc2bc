"""The results file of ``benchmarks/gpu.py``: JSON lines, one row appended as it is measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
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
