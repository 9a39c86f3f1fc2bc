"""Rows and limits that the tests of the benchmarks share."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.harness import floor

LIMITS = floor.Roofline(
    1e11, 64, (1 << 16, 1 << 26), (5e10, 2e10), ("torch", "torch"), 1, "float32"
)


def row(**changes: object) -> dict:
    """A valid timed row."""
    made = {
        "question": "test",
        "mode": "eval",
        "shape": "16-48@112-relu",
        "dtype": "float32",
        "layout": "nchw",
        "batch": 1,
        "threads": 1,
        "provider": "fused_nchw",
        "median_s": 2.0,
        "p20_s": 1.0,
        "p80_s": 3.0,
        "rounds": 5,
        "repeats": 1,
        "bytes": 8,
        "flops": 16,
        "gbytes_per_s": 4e-9,
        "gflops": 8e-9,
        "floor_s": 0.5,
        "floors": 4.0,
        "bound": "memory",
    }
    return {**made, **changes}


def skip_without_native() -> None:
    from ghost_ops import backends

    try:
        backends.native.library()
    except RuntimeError as error:
        pytest.skip(str(error))


def installed(package: str) -> bool:
    """Whether an optional package is there."""
    return importlib.util.find_spec(package) is not None
