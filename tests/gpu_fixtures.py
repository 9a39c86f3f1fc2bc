"""Fixtures of the tests of the GPU report; a plugin, for pytest alone to import."""

from __future__ import annotations

import pathlib

import fake_gpu
import pytest
from gpu_cases import ROOT, workers

from benchmarks import gpu_programs


@pytest.fixture
def scratch(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Outputs and caches of this test alone."""
    monkeypatch.setattr(gpu_programs, "SCRATCH", tmp_path / "scratch")
    return tmp_path / "scratch"


@pytest.fixture
def on_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu.install(monkeypatch.setattr)


@pytest.fixture
def stub_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    workers(monkeypatch, str(ROOT / "tests" / "stub_worker.py"))


@pytest.fixture
def fake_workers(on_fake_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that measure, on a fake GPU."""
    workers(monkeypatch, str(ROOT / "tests" / "fake_gpu.py"))
